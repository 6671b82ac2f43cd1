"""What a run needs on disk, in bytes."""

from pathlib import Path
from typing import Any

import torch

from eagle3_xla import storage
from eagle3_xla.config import Recipe
from eagle3_xla.draft.model import Eagle3Head, draft_config
from eagle3_xla.plan.depth import layer_period, with_layers
from eagle3_xla.train.optimizer import by_muon

# Of a prepared row's position: id int32, mask one bit, document int16, position int32 (data/rows.py).
POSITION = 4 + 1 / 8 + 2 + 4
MXFP4 = 0.5 + 1 / 32  # of an element: 4 bits, and a byte for 32 of them


def disk_bytes(recipe: Recipe, target: Any, tokens: int | None) -> dict[str, int | None]:
    """Kind -> bytes. target: its Hugging Face config; tokens: positions of the whole run, None when unknown.

    target_download: 0 for a folder, and for a URL, which is read in parts; checkpoints: those that `train.keep` leaves,
    the best one, the untrained head's, and the one that is being written, which is all that is here when train.out is
    a URL; prepared_rows: the training rows (`prepare` holds them twice for a moment); target_states: with
    train.reuse_states.
    """
    path = recipe.target.path
    checkpoints = 1 if storage.is_url(recipe.train.out) else recipe.train.keep + 3
    rows = tokens / recipe.train.epochs if tokens else None
    states = 2 * 4 * target.hidden_size + 4 + 4  # aux and hidden in bfloat16, argmax, logsumexp (target/states.py)
    needed: dict[str, int | None] = {
        "target_download": 0 if storage.is_url(path) or Path(path).exists() else checkpoint_bytes(target),
        "prepared_rows": round(rows * POSITION) if rows else None,
        "checkpoints": checkpoints * _training_state_bytes(recipe, target),
        "target_states": (round(rows * states) if rows else None) if recipe.train.reuse_states else 0,
    }
    known = [size for size in needed.values() if size is not None]
    return needed | {"total": sum(known) if len(known) == len(needed) else None}


def checkpoint_bytes(target: Any) -> int:
    """The target's weights as its checkpoint stores them. All layers of a kind are alike: few are built."""
    every, period = target.num_hidden_layers, layer_period(target)
    few = every % period + period
    low, high = (_stored_bytes(with_layers(target, layers)) for layers in (few, few + period))
    return round(low + (every - few) // period * (high - low))


def _stored_bytes(config: Any) -> float:
    from transformers import AutoModelForCausalLM

    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    size = 0.0
    for name, parameter in model.named_parameters():
        width = parameter.element_size()
        if method == "mxfp4" and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            width = MXFP4
        elif method in ("fp8", "compressed-tensors") and name.endswith("proj.weight"):
            width = 1
        size += parameter.numel() * width
    return size


def _training_state_bytes(recipe: Recipe, target: Any) -> int:
    """A checkpoint: the head and its two moments (Muon: one) in float32, the draft vocabulary's maps."""
    draft_vocabulary = recipe.data.draft_vocab_size
    with torch.device("meta"):
        head = Eagle3Head(draft_config(target, draft_vocabulary, recipe.draft))
    parameters = dict(head.named_parameters())
    one_moment = by_muon(parameters, recipe.train)
    values = sum((2 if name in one_moment else 3) * p.numel() for name, p in parameters.items())
    return 4 * values + 8 * draft_vocabulary + target.vocab_size
