"""The head that a run starts from (`train.warm_start`), and whether it was made for this target."""

import math
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from eagle3_xla.config import Recipe
from eagle3_xla.data.vocab import draft_ids_of
from eagle3_xla.draft.model import Eagle3Head, draft_config
from eagle3_xla.draft.saved import NORM_FLAGS, layers_of, load_head, read_head
from eagle3_xla.errors import UserError
from eagle3_xla.target.families import aux_layers

# The settings of draft.* that say what these are.
ATTENTION = {"num_attention_heads": "attention_heads", "num_key_value_heads": "key_value_heads", "head_dim": "head_dim"}


def read_warm_head(recipe: Recipe, target: Any) -> tuple[Eagle3Head, torch.Tensor]:
    """The head, and the target's ids [D] of its draft vocabulary, which the run keeps: its lm_head rows mean nothing
    under another. Raises UserError when it was made for another target. target: its Hugging Face config."""
    saved = read_head(recipe.train.warm_start)
    head, d2t = load_head(saved)
    wanted = draft_config(target, len(d2t), recipe.draft)
    layers = layers_of(saved, target.num_hidden_layers)
    refuse_other_head(head.config, wanted, recipe.train.warm_start, layers, aux_layers(target.num_hidden_layers))
    return head, draft_ids_of(d2t)


def refuse_other_head(
    warm: LlamaConfig, wanted: LlamaConfig, path: str, layers: tuple[int, ...] | None, of_target: tuple[int, ...]
) -> None:
    """Raises UserError when the head of a warm start was made for another target."""
    differences = []
    for name in ("hidden_size", "intermediate_size", *ATTENTION, "vocab_size", "rope_theta"):
        if getattr(warm, name) != getattr(wanted, name):
            setting = f" (setting draft.{ATTENTION[name]})" if name in ATTENTION else ""
            differences.append(f"{name} is {getattr(warm, name)}, not {getattr(wanted, name)}{setting}")
    if not _rotates_alike(warm, wanted):
        ours, its = (config.rope_scaling or {} for config in (wanted, warm))
        fields = [name for name in sorted(ours.keys() | its.keys()) if ours.get(name) != its.get(name)]
        differences += [f"rope_scaling.{name} is {its.get(name)}, not {ours.get(name)}" for name in fields]
    for name in NORM_FLAGS:
        if getattr(warm, name, False) != getattr(wanted, name, False):
            differences.append(f"its {name} is {getattr(warm, name, False)} (setting draft.variant)")
    for name, named in (("sliding_window", "window"), ("qk_norm", "qk_norm")):
        ours, its = (getattr(config, name, None) or None for config in (wanted, warm))
        if ours != its:
            differences.append(f"its {name} is {its} (setting draft.{named})")
    if layers is not None and layers != tuple(of_target):
        differences.append(f"its aux layers are {list(layers)}, not {list(of_target)}")
    if differences:
        raise UserError(f"train.warm_start: the head at {path} was made for another target: {'; '.join(differences)}")


def _rotates_alike(warm: LlamaConfig, wanted: LlamaConfig) -> bool:
    """Whether RoPE is the same, whichever way its scaling is written."""
    ours, its = LlamaRotaryEmbedding(wanted), LlamaRotaryEmbedding(warm)
    alike = ours.inv_freq.shape == its.inv_freq.shape and torch.allclose(ours.inv_freq, its.inv_freq)
    return alike and math.isclose(ours.attention_scaling, its.attention_scaling, rel_tol=1e-6)
