"""An exported head, read back: what `eval` decodes with and what a warm start begins from."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from eagle3_xla.config import UserError
from eagle3_xla.draft.model import Eagle3Head

EXPORTED = "model.safetensors"


def load_head(folder: Path) -> tuple[Eagle3Head, torch.Tensor]:
    """An exported head (float32) and its d2t. Raises UserError when the folder is not a head or misses tensors."""
    from transformers import LlamaConfig

    folder = Path(folder)
    if not (folder / "config.json").is_file() or not (folder / EXPORTED).is_file():
        raise UserError(f"no head at {folder} (config.json and {EXPORTED} are expected)")
    settings = json.loads((folder / "config.json").read_text())
    if settings.get("architectures") != ["LlamaForCausalLMEagle3"]:
        raise UserError(f"{folder}: architectures is {settings.get('architectures')}, not LlamaForCausalLMEagle3")
    settings.pop("rope_parameters", None)  # what rope_theta and rope_scaling say already
    tensors = load_file(folder / EXPORTED)
    if "d2t" not in tensors:
        raise UserError(f"{folder}: d2t is missing, so draft tokens can't be mapped to the target's vocabulary")
    d2t, _ = tensors.pop("d2t"), tensors.pop("t2d", None)
    tensors.pop("embed_tokens.weight", None)
    head = Eagle3Head(LlamaConfig(**settings), fc_norm="fc_norm.0.weight" in tensors)
    difference = set(head.state_dict()) ^ set(tensors)
    if difference:
        raise UserError(f"{folder}: missing or unknown tensors: {', '.join(sorted(difference))}")
    head.load_state_dict({name: value.float() for name, value in tensors.items()})
    return head.eval().requires_grad_(False), d2t
