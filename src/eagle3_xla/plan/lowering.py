"""The step that `train` runs, lowered without data: the same modules, optimizer and TrainStep over placeholders."""

from typing import Any

import torch

from eagle3_xla.config import Recipe
from eagle3_xla.data.batches import anchor_count
from eagle3_xla.data.manifest import prepared_manifest
from eagle3_xla.data.prepare import load_prepared
from eagle3_xla.draft.model import Eagle3Head, draft_config
from eagle3_xla.target.model import Target
from eagle3_xla.train.loader import training_batches
from eagle3_xla.train.optimizer import Optimizer
from eagle3_xla.train.step import TrainStep
from eagle3_xla.xla.aot import AotBackend, LoweredStep

TOTAL_STEPS = 10_000  # the schedule's length is a constant in the graph; it changes no shape


def lower_step(recipe: Recipe, target_config: Any, coordinates: list | None = None) -> LoweredStep:
    """The micro-step that also updates the weights: of a run's graphs the one that needs the most.

    coordinates: of the slice's chips, which its mesh is laid over (xla/mesh.py).

    With prepared data its draft phase is as large as the run's will be; without, every position counts as drafted.
    """
    backend = AotBackend(recipe.xla, coordinates=coordinates)
    listed = _listed_positions(recipe, backend)
    draft_vocabulary, vocabulary = recipe.data.draft_vocab_size, target_config.vocab_size
    with torch.device("meta"):
        target = _target(recipe, target_config, backend)
        head = backend.place_head(Eagle3Head(draft_config(target_config, draft_vocabulary, recipe.draft)))
        parameters = dict(head.named_parameters())
        lr_scale = {"fc.weight": torch.zeros(head.fc.in_features)}
        optimizer = Optimizer(head, recipe.train, TOTAL_STEPS, backend, lr_scale)
        d2t, t2d = torch.zeros(draft_vocabulary, dtype=torch.int64), torch.zeros(vocabulary, dtype=torch.bool)
        step = TrainStep(recipe, backend, target, head, d2t, t2d, optimizer)
        batch = _rows(recipe, backend)
        groups, positions = backend.draft_groups, batch["input_ids"].numel()
        if listed:
            for name, count in (("rows", listed), ("slots", positions // groups)):
                batch[name] = torch.zeros(groups, count, dtype=torch.int32)
        if recipe.loss.anchors < 1:
            rows = listed or positions // groups
            for name, count in (("anchors", anchor_count(recipe.loss.anchors, rows)), ("anchor_slots", rows)):
                batch[name] = torch.zeros(groups, count, dtype=torch.int32)
        batch = backend.put(batch)
    state = {f"head.{name}": parameter for name, parameter in parameters.items()} | optimizer.state()
    state |= {f"gradient.{name}": p.grad for name, p in parameters.items() if p.grad is not None}
    last_micro_step = TOTAL_STEPS * recipe.train.gradient_accumulation - 1  # at the whole TTT length
    return backend.lower(lambda inputs: list(step.run(last_micro_step, inputs)), batch, state, _frozen(target))


def lower_target(recipe: Recipe, target_config: Any, coordinates: list | None = None) -> LoweredStep:
    """The target's layers alone, forward, as `lower_step` has them."""
    backend = AotBackend(recipe.xla, coordinates=coordinates)
    with torch.device("meta"):
        target = _target(recipe, target_config, backend)
        batch = _rows(recipe, backend)
        del batch["loss_mask"]
        batch = backend.put(batch)
    return backend.lower(lambda inputs: list(target.hidden_states(**inputs)), batch, {}, _frozen(target))


def _target(recipe: Recipe, target_config: Any, backend: AotBackend) -> Target:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(target_config, dtype=getattr(torch, recipe.target.dtype))
    model = model.eval().requires_grad_(False)
    return backend.place_target(Target(model, torch.zeros(recipe.data.draft_vocab_size, dtype=torch.int64)))


def _rows(recipe: Recipe, backend: AotBackend) -> dict[str, torch.Tensor]:
    shape = (recipe.train.batch_size * backend.data_parallel, recipe.data.row_length)
    ids = {name: torch.zeros(shape, dtype=torch.int32) for name in ("input_ids", "position_ids", "document_ids")}
    return {**ids, "loss_mask": torch.zeros(shape, dtype=torch.bool)}


def _frozen(target: Target) -> dict[str, torch.Tensor]:
    return dict(target.named_parameters()) | {f"target.{name}": buffer for name, buffer in target.named_buffers()}


def _listed_positions(recipe: Recipe, backend: AotBackend) -> int | None:
    """How many positions a group of the prepared data lists (loss/rows.py), None when all are computed or unknown."""
    if not prepared_manifest(recipe.data.prepared):
        return None
    rows, _, _, manifest = load_prepared(recipe.data.prepared)
    return training_batches(recipe, rows, manifest, backend)[1].listed.get(recipe.data.row_length)
