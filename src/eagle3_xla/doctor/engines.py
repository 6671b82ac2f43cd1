"""Which engines serve a head, and with which options: for the model card and for what follows on `eval`."""

from typing import Any

from eagle3_xla.draft.saved import ARCHITECTURE, FLAGS, NORM_FLAGS, SavedHead, layers_of, window_of
from eagle3_xla.target.families import (
    FAMILIES,
    SGLANG,
    SGLANG_JAX,
    VLLM,
    aux_layers,
    context_length,
    is_longrope,
    sglang_captures,
    sglang_jax_serves,
)


def served_by(head: SavedHead, target: Any) -> dict[str, dict[str, int]]:
    """The engines that serve such a target and compute the head as it was trained, which `doctor` says -> the options
    that each needs for this pair beside the names of the two. target: its config.
    """
    family, config = FAMILIES.get(target.model_type), head.config
    known = family.engines if family else (SGLANG, VLLM)
    plain, window = config.get("architectures") == [ARCHITECTURE], window_of(config)
    context = context_length(target) if is_longrope(target) else None  # the head has no positions beyond it
    found: dict[str, dict[str, int]] = {}
    layers, default = layers_of(head, target.num_hidden_layers), aux_layers(target.num_hidden_layers)
    if plain and SGLANG in known and sglang_captures(target, layers or default):
        found[SGLANG] = {"--speculative-draft-window-size": window - 1} if window else {}  # before a row's own
        found[SGLANG] |= {"--context-length": context} if context else {}
    other = window or any(config.get(name) for name in (*FLAGS, *NORM_FLAGS))
    other = other or config.get("target_hidden_size") not in (None, config.get("hidden_size"))
    if plain and not other and layers in (None, default):
        found |= {SGLANG_JAX: {}} if sglang_jax_serves(target) else {}
    mapped = "d2t" in head.tensors and config["draft_vocab_size"] == target.vocab_size  # vLLM has no place for that d2t
    if VLLM in known and not mapped:
        found[VLLM] = {"--max-model-len": context} if context else {}
    return found
