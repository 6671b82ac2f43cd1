"""Which engines serve a head, and with which options: for the model card and for what follows on `eval`."""

from typing import Any

from eagle3_xla.draft.saved import ARCHITECTURE, FLAGS, NORM_FLAGS, SavedHead, layers_of, window_of
from eagle3_xla.target.families import (
    FAMILIES,
    SGLANG,
    SGLANG_JAX,
    VLLM,
    WINDOWED_IN_SGLANG,
    aux_layers,
    context_length,
    is_longrope,
    sglang_captures,
    sglang_jax_serves,
)

# The drafts of every SGLang command here, where `served_by` names no others.
TREE = {"--speculative-num-steps": 5, "--speculative-eagle-topk": 4, "--speculative-num-draft-tokens": 8}
CHAIN = {"--speculative-eagle-topk": 1, "--speculative-num-draft-tokens": 6}  # of as many steps


def served_by(head: SavedHead, target: Any) -> dict[str, dict[str, int | str]]:
    """The engines that serve such a target and compute the head as it was trained, which `doctor` says -> the options
    that each needs for this pair beside the names of the two. target: its config.

    SGLang's are those of a GPU; launch/serve_sglang.sh finds the same in the two config.json.
    """
    family, config = FAMILIES.get(target.model_type), head.config
    known = family.engines if family else (SGLANG, VLLM)
    plain, window = config.get("architectures") == [ARCHITECTURE], window_of(config)
    context = context_length(target) if is_longrope(target) else None  # the head has no positions beyond it
    found: dict[str, dict[str, int | str]] = {}
    layers, default = layers_of(head, target.num_hidden_layers), aux_layers(target.num_hidden_layers)
    if plain and SGLANG in known and sglang_captures(target, layers or default):
        found[SGLANG] = _where_sglang_is_right(target.model_type, window)
        found[SGLANG] |= {"--context-length": context} if context else {}
    other = window or any(config.get(name) for name in (*FLAGS, *NORM_FLAGS))
    other = other or config.get("target_hidden_size") not in (None, config.get("hidden_size"))
    if plain and not other and layers in (None, default):
        found |= {SGLANG_JAX: {}} if sglang_jax_serves(target) else {}
    mapped = "d2t" in head.tensors and config["draft_vocab_size"] == target.vocab_size  # vLLM has no place for that d2t
    if VLLM in known and not mapped:
        found[VLLM] = {"--max-model-len": context} if context else {}
    return found


def _where_sglang_is_right(model_type: str, window: int | None) -> dict[str, int | str]:
    """What SGLang 0.5.21 needs on a GPU for the window of a head, or of a target that it serves with windows
    (layers/attention/ of its sources).
    """
    found: dict[str, int | str] = {}
    if window or model_type in WINDOWED_IN_SGLANG:
        # Of a tree FA3 counts gpt-oss's sinks twice, Triton counts a window by node in place of by position, trtllm_mha
        # refuses it; FA3 loses keys of a windowed head. A chain is right on each that is chosen for gpt-oss.
        found |= CHAIN
    if model_type == "gemma3_text":
        found["--attention-backend"] = "triton"  # FlashInfer checks drafts against the first window of a text
    if window:
        found["--speculative-draft-window-size"] = window - 1  # before a row's own
        # FlashInfer's head reads the first window, Triton's has no keys for its drafts.
        found["--speculative-draft-attention-backend"] = "fa3"
    return found
