"""The rules for what config.json says of positions: RoPE, the longest context, the window. As config_rules.py."""

from typing import Any

from eagle3_xla.doctor.files import Finding, Target
from eagle3_xla.draft.saved import UNKNOWN, SavedHead, scaling_of, window_of
from eagle3_xla.target.families import context_length, is_longrope


def max_positions(head: SavedHead, target: Target) -> Finding:
    given, wanted = head.config.get("max_position_embeddings"), context_length(target.config)
    if isinstance(given, int) and given >= wanted:
        message = f"{given}, the target's {wanted}"
        if not is_longrope(target.config):
            return Finding("max_position_embeddings", "pass", message)
        message += f" before longrope takes other factors: serve it with --context-length {wanted} (SGLang) or "
        return Finding("max_position_embeddings", "warn", message + f"--max-model-len {wanted} (vLLM), as trained")
    what = "missing, which means 2048 to engines" if given is None else f"{given}"
    message = f"max_position_embeddings is {what}, the target's {wanted}: acceptance collapses beyond it, and SGLang "
    message += "refuses to start with the target's context length"
    return Finding("max_position_embeddings", "fail", message, {"max_position_embeddings": wanted})


def rope_theta(head: SavedHead, target: Target) -> Finding:
    config = head.config
    top, nested = config.get("rope_theta"), (config.get("rope_parameters") or {}).get("rope_theta")
    trained = head.record["rope_theta"] if head.record else None
    of_target = getattr(target.config, "rope_theta", None)
    if head.record and (trained != top or nested not in (None, trained)):
        fix = {"rope_theta": trained}
        if nested is not None:
            fix["rope_parameters"] = config["rope_parameters"] | fix
        message = f"rope_theta is {top} (rope_parameters: {nested}), and the head was trained with {trained}: every "
        return Finding("rope_theta", "fail", message + "position is rotated wrongly and acceptance collapses", fix)
    if top is None and nested is None:
        message = (
            f"rope_theta is missing, which means 10000 to engines; the target's is {of_target}: right only if the "
        )
        return Finding("rope_theta", "warn", message + "head was trained so")
    if top is None:
        message = f"rope_theta {nested} is in rope_parameters alone: readers before transformers 5 take 10000"
        return Finding("rope_theta", "fail" if nested != 10000 else "warn", message, {"rope_theta": nested})
    if nested not in (None, top):
        message = f"rope_theta is {top} at the top level and {nested} in rope_parameters: old and new readers differ"
        return Finding("rope_theta", "fail", message)
    if not head.record and top != of_target:
        message = f"rope_theta is {top}, the target's {of_target}: right only if the head was trained so"
        return Finding("rope_theta", "warn", message)
    return Finding("rope_theta", "pass", f"{top}")


def rope_scaling(head: SavedHead, target: Target) -> Finding:
    given = head.config.get("rope_scaling") or None
    wanted = head.record["rope_scaling"] if head.record else (getattr(target.config, "rope_scaling", None) or None)
    of_new = scaling_of(head.config)  # also those under rope_parameters
    if given == of_new == wanted:
        if given and given.get("type") not in ("linear", "dynamic"):
            message = f"{given}: SafeAILab's code knows `type` linear and dynamic only and stops; the engines load it"
            return Finding("rope_scaling", "warn", message)
        return Finding("rope_scaling", "pass", f"{given}")
    if given != of_new and (of_new == wanted or not head.record):
        message = f"rope_scaling {of_new} is in rope_parameters alone: readers before transformers 5 scale nothing"
        return Finding("rope_scaling", "fail", message, {"rope_scaling": of_new})
    whose = "trained with" if head.record else "the target's"
    message = f"rope_scaling is {of_new}, {whose} {wanted}: positions are scaled otherwise than in training"
    if not head.record:
        return Finding("rope_scaling", "warn", message)
    nested = {"rope_theta": head.record["rope_theta"], **(wanted or {"rope_type": "default"})}
    return Finding("rope_scaling", "fail", message, {"rope_scaling": wanted, "rope_parameters": nested})


def window(head: SavedHead, target: Target) -> Finding:
    """The sliding window: vLLM reads it in config.json by `layer_types`, SGLang takes it from its command line."""
    fields = ("sliding_window", "layer_types", "use_sliding_window")
    given, trained = window_of(head.config), (head.record or {}).get("window")
    if head.record and given != trained:
        message = f"the sliding window is {given or 'none'}, {trained or 'none'} was trained: vLLM reads it here"
        fix = dict(zip(fields, (trained, ["sliding_attention"], True))) if trained else dict.fromkeys(fields)
        return Finding("window", "fail", message, fix)
    if given:
        message = (
            f"the head sees {given} positions: vLLM reads that here, SGLang is to be told by "
            f"--speculative-draft-window-size {given - 1} (without a row's own) and is right on a GPU with "
            "--speculative-draft-attention-backend fa3 --speculative-eagle-topk 1 alone (without FA3: vLLM), "
            "sglang-jax sees all of them"
        )
        return Finding("window", "warn", message)
    if lent := _lent_window(target.config):
        message = (
            f"none, and vLLM 0.32 puts the target's on a head without one: it sees {lent} positions there, all of "
        )
        return Finding(
            "window", "warn", message + f"them in training and in SGLang; for vLLM train with draft.window={lent}"
        )
    size, types = head.config.get("sliding_window"), head.config.get("layer_types")
    if (size is None or head.config.get("use_sliding_window") is False) and types in UNKNOWN["layer_types"]:
        return Finding("window", "pass", "none")
    message = f"sliding_window is {size} and layer_types {types}: engines read a window where both say so; "
    return Finding("window", "warn", message + "`eval` and `gap` here refuse the head")


def _lent_window(config: Any) -> int | None:
    """The target's window where vLLM has it for every layer that names none: the head's too, whose cache_config is the
    target's (engine/arg_utils.py, layers/attention/attention.py). None for one as long as the context.
    """
    size = getattr(config, "sliding_window", None)
    windowed = {*(getattr(config, "layer_types", None) or ["sliding_attention"])} == {"sliding_attention"}
    return size if windowed and size and size < context_length(config) else None


RULES = (max_positions, rope_theta, rope_scaling, window)
