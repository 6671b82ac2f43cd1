"""What a plan knows of its run's rows: of the prepared data, or what the settings say while there is none."""

import dataclasses

import numpy as np

from eagle3_xla.config import Recipe
from eagle3_xla.data.batches import Batches
from eagle3_xla.data.manifest import prepared_manifest
from eagle3_xla.data.prepare import load_prepared
from eagle3_xla.draft.saved import load_head, read_head
from eagle3_xla.train.budget import planned_graphs
from eagle3_xla.train.heldout import HeldOut
from eagle3_xla.train.loader import buckets_of


def as_the_run(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe with the rows and the draft vocabulary of the prepared data, and the vocabulary of the head of a warm
    start, which the run takes whatever the settings say, and what is to be said of that. Raises UserError for prepared
    data or a head that is damaged.
    """
    taken, sources, remarks = {}, {}, []
    if prepared_manifest(recipe.data.prepared):
        manifest = load_prepared(recipe.data.prepared)[3]
        taken = {name: manifest[name] for name in ("row_length", "draft_vocab_size")}
        sources = dict.fromkeys(taken, "the prepared data")
        batches, batch = _batches(recipe, manifest), recipe.train.batch_size * recipe.xla.dp
        if not batches.buckets:
            remarks = [f"the {manifest['train']['rows']} prepared rows fill no batch of {batch}, so a run refuses them"]
        elif (longest := max(length for length, _, _ in batches.buckets)) < taken["row_length"]:
            taken["row_length"] = longest
            sources["row_length"] = f"the longest prepared rows that fill a batch of {batch}"
    if recipe.train.warm_start:
        taken["draft_vocab_size"] = len(load_head(read_head(recipe.train.warm_start))[1])
        sources["draft_vocab_size"] = "the head of train.warm_start"
    notes = remarks + [
        f"data.{name} is {value}, that of {sources[name]}, not {getattr(recipe.data, name)}"
        for name, value in taken.items()
        if value != getattr(recipe.data, name)
    ]
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **taken))
    if recipe.train.reuse_states:
        notes.append("train.reuse_states spares the target's forward, which is in these figures: the run needs less")
    return recipe, notes


def planned_tokens(recipe: Recipe) -> tuple[int | None, str | None]:
    """Positions of the whole run, padding included, and where the number is from: the prepared data in all epochs,
    without rows of a length that fills no batch, or what `plan.tokens` assumes while nothing is prepared.

    Raises UserError for prepared data that is damaged.
    """
    if not prepared_manifest(recipe.data.prepared):
        return (recipe.plan.tokens, "plan.tokens") if recipe.plan.tokens else (None, None)
    batches = _batches(recipe, load_prepared(recipe.data.prepared)[3])
    positions = sum(length * count for length, _, count in batches.buckets or batches.unfilled)
    return positions * recipe.train.epochs, "data.prepared"


def run_graphs(recipe: Recipe) -> dict[str, int]:
    """The graphs that the run compiles, as its CompileBudget plans them. While no data is prepared, of rows of all the
    lengths that the settings name.

    Raises UserError for prepared data that is damaged.
    """
    from eagle3_xla.plan.lowering import TOTAL_STEPS

    settings = recipe.train
    if not prepared_manifest(recipe.data.prepared):
        lengths = len({*recipe.data.buckets, recipe.data.row_length})
        return planned_graphs(recipe, TOTAL_STEPS, lengths, lengths if settings.heldout_rows else 0)
    _, rows, _, manifest = load_prepared(recipe.data.prepared)
    batches, batch = _batches(recipe, manifest), settings.batch_size * recipe.xla.dp
    updates = settings.epochs * batches.steps_per_epoch // settings.gradient_accumulation
    buckets = buckets_of(manifest, "heldout", len(rows))
    heldout = HeldOut(rows, manifest["heldout_sources"], buckets, settings.heldout_rows, batch)
    return planned_graphs(recipe, updates, len(batches.buckets), len(heldout.lengths))


def _batches(recipe: Recipe, manifest: dict) -> Batches:
    """The run's, without what its rows hold."""
    buckets = buckets_of(manifest, "train", manifest["train"]["rows"])
    return Batches(np.empty(0), buckets, recipe.train.batch_size, recipe.xla.dp, recipe.train.seed)
