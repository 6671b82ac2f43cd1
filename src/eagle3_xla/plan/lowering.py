"""The step that `train` runs, lowered without data: the same modules, optimizer and TrainStep over placeholders."""

import torch

from eagle3_xla import storage
from eagle3_xla.config import Recipe
from eagle3_xla.data.prepare import load_prepared
from eagle3_xla.draft.model import Eagle3Head, draft_config
from eagle3_xla.target.model import Target
from eagle3_xla.train.loader import training_batches
from eagle3_xla.train.optimizer import AdamW
from eagle3_xla.train.step import TrainStep
from eagle3_xla.xla.aot import AotBackend, LoweredStep

TOTAL_STEPS = 10_000  # the schedule's length is a constant in the graph; it changes no shape


def lower_step(recipe: Recipe, target_config, coordinates: list | None = None) -> LoweredStep:
    """The micro-step that also updates the weights: of a run's graphs the one that needs the most.

    coordinates: of the slice's chips, which its mesh is laid over (xla/mesh.py).

    With prepared data its draft phase is as large as the run's will be; without, every position counts as drafted.
    """
    from transformers import AutoModelForCausalLM

    backend = AotBackend(recipe.xla, coordinates=coordinates)
    listed = _listed_positions(recipe, backend)
    draft_vocabulary, vocabulary = recipe.data.draft_vocab_size, target_config.vocab_size
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(target_config, dtype=getattr(torch, recipe.target.dtype))
        model = model.eval().requires_grad_(False)
        target = backend.place_target(Target(model, torch.zeros(draft_vocabulary, dtype=torch.int64)))
        head = backend.place_head(Eagle3Head(draft_config(target_config, draft_vocabulary)))
        parameters = dict(head.named_parameters())
        lr_scale = {"fc.weight": torch.zeros(head.fc.in_features)}
        optimizer = AdamW(parameters, recipe.train, TOTAL_STEPS, backend, lr_scale)
        d2t, t2d = torch.zeros(draft_vocabulary, dtype=torch.int64), torch.zeros(vocabulary, dtype=torch.bool)
        step = TrainStep(recipe, backend, target, head, d2t, t2d, optimizer)
        shape = (recipe.train.batch_size * backend.data_parallel, recipe.data.row_length)
        ids = {name: torch.zeros(shape, dtype=torch.int32) for name in ("input_ids", "position_ids", "document_ids")}
        batch = {**ids, "loss_mask": torch.zeros(shape, dtype=torch.bool)}
        if listed:
            groups = backend.draft_groups
            for name, count in (("rows", listed), ("slots", shape[0] * shape[1] // groups)):
                batch[name] = torch.zeros(groups, count, dtype=torch.int32)
        batch = backend.put(batch)
    state = {f"head.{name}": parameter for name, parameter in parameters.items()} | optimizer.state()
    state |= {f"gradient.{name}": p.grad for name, p in parameters.items() if p.grad is not None}
    frozen = dict(target.named_parameters()) | {f"target.{name}": buffer for name, buffer in target.named_buffers()}
    last_micro_step = recipe.train.gradient_accumulation - 1
    return backend.lower(lambda inputs: list(step.run(last_micro_step, inputs)), batch, state, frozen)


def _listed_positions(recipe: Recipe, backend) -> int | None:
    """How many positions a group of the prepared data lists (loss/rows.py), None when all are computed or unknown."""
    if not recipe.data.prepared or not storage.exists(storage.join(recipe.data.prepared, "manifest.json")):
        return None
    rows, _, _, manifest = load_prepared(recipe.data.prepared)
    if manifest["row_length"] != recipe.data.row_length:
        return None
    return training_batches(recipe, rows, manifest, backend)[1].listed.get(recipe.data.row_length)
