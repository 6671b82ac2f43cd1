"""The rules for config.json but for positions (position_rules.py). Each takes (head, target) and returns one Finding.

What a rule holds the file against: the weights where they tell, the record of the training where there is one, the
target else. Without a record a doubt about the training is a warning, and no fix is offered for it.
"""

from typing import Any

from eagle3_xla.doctor.files import Finding, Target
from eagle3_xla.draft.saved import (
    ARCHITECTURE,
    FLAGS,
    LAYER_IDS,
    MODEL_TYPES,
    NESTED_IDS,
    QK_NORM_ARCHITECTURE,
    UNKNOWN,
    SavedHead,
    layer_ids,
)
from eagle3_xla.errors import UserError
from eagle3_xla.target.families import (
    FAMILIES,
    IN_SGLANG_JAX,
    MIN_LAYERS,
    SGLANG,
    VLLM,
    aux_layers,
    sglang_captures,
    sglang_jax_serves,
)

RULED = (
    *FLAGS,
    "attention_bias",
    "mlp_bias",
    "bias",
    "tie_word_embeddings",
    "num_hidden_layers",
    "sliding_window",
    "layer_types",
)  # have their own rule


def architecture(head: SavedHead, target: Target) -> Finding:
    names, kind = head.config.get("architectures"), head.config.get("model_type")
    normed = "midlayer.self_attn.q_norm.weight" in head.tensors
    wanted = QK_NORM_ARCHITECTURE if normed else ARCHITECTURE
    if names == [wanted] and kind == MODEL_TYPES[wanted]:
        if normed:
            message = f"{wanted}, query and key normed: vLLM 0.32 serves it, SGLang and sglang-jax have no such class"
            return Finding("architecture", "warn", message)
        return Finding("architecture", "pass", wanted)
    message = f"architectures is {names} and model_type {kind!r}: engines choose the model class by them and load none "
    message += f"or another one; they must be ['{wanted}'] and '{MODEL_TYPES[wanted]}'"
    ours = "midlayer.self_attn.q_proj.weight" in head.tensors
    fix = {"architectures": [wanted], "model_type": MODEL_TYPES[wanted]}
    return Finding("architecture", "fail", message, fix if ours else None)


def engines(head: SavedHead, target: Target) -> Finding:
    """Which engines hand the target's hidden states to a head.

    A warning even where none does: the head may be right, and for another release or an engine of one's own; a failure
    would keep `eval` and `push` from it.
    """
    kind = target.config.model_type
    if kind not in FAMILIES:
        return Finding("engines", "pass", f"not looked at: {kind} is no family that is trained here")
    without = [engine for engine in (SGLANG, VLLM) if engine not in FAMILIES[kind].engines]
    if not without:
        served = sglang_jax_serves(target.config)
        tied = " with tied embeddings" if kind in IN_SGLANG_JAX else ""
        jax = "" if served else f"; sglang-jax, for TPUs, does not{tied}"
        return Finding("engines", "pass", f"{SGLANG} and {VLLM} hand {kind}'s hidden states to a head{jax}")
    message = f"{' and '.join(without)} can't serve a head for {kind}: the model's class hands no hidden states out; "
    message += f"{FAMILIES[kind].engines[0]} does" if FAMILIES[kind].engines else "an engine that does so is needed"
    return Finding("engines", "warn", message)


def one_layer(head: SavedHead, target: Target) -> Finding:
    layers = head.config.get("num_hidden_layers")
    if layers == 1:
        return Finding("one_layer", "pass", "num_hidden_layers 1")
    message = (
        f"num_hidden_layers is {layers} and the head has one layer: SGLang 0.5.1 and sglang-jax refuse it, others "
    )
    message += "build layers that no weight fills"
    return Finding("one_layer", "fail", message, {"num_hidden_layers": 1})


def vocabulary(head: SavedHead, target: Target) -> Finding:
    size, wanted = head.config.get("vocab_size"), target.config.vocab_size
    if size == wanted:
        return Finding("vocab_size", "pass", f"{size}, the target's")
    message = (
        f"vocab_size is {size} and the target's {wanted}: the target's embeddings, which engines lend to the head, "
    )
    message += "don't fit"
    return Finding("vocab_size", "fail", message, {"vocab_size": wanted})


def draft_vocabulary(head: SavedHead, target: Target) -> Finding:
    size, rows = head.config.get("draft_vocab_size"), (head.shape("lm_head.weight") or (None,))[0]
    if size == rows and size is not None:
        return Finding("draft_vocab_size", "pass", f"{size} rows of lm_head")
    message = f"draft_vocab_size is {size if size is not None else 'missing'} and lm_head has {rows} rows: SGLang and "
    message += "sglang-jax stop at loading"
    return Finding("draft_vocab_size", "fail", message, {"draft_vocab_size": rows} if rows else None)


def sizes(head: SavedHead, target: Target) -> Finding:
    """hidden_size and intermediate_size, which the weights tell."""
    wanted = {
        "hidden_size": (head.shape("fc.weight") or (None,))[0],
        "intermediate_size": (head.shape("midlayer.mlp.gate_proj.weight") or (None,))[0],
    }
    wrong = {key: value for key, value in wanted.items() if value and head.config.get(key) != value}
    if not wrong:
        return Finding("sizes", "pass", "hidden_size and intermediate_size are the weights'")
    text = ", ".join(f"{key} is {head.config.get(key)}, the weights' {value}" for key, value in wrong.items())
    return Finding("sizes", "fail", f"{text}: no engine loads the weights", wrong)


def target_size(head: SavedHead, target: Target) -> Finding:
    """The features that the head reads are the target's; its own hidden size may be another one."""
    hidden, given = target.config.hidden_size, head.config.get("target_hidden_size")
    fc = head.shape("fc.weight")
    if fc and (len(fc) != 2 or fc[1] != 3 * hidden or (fc[0] != hidden and given is None)):
        message = f"fc.weight is {list(fc)} and the target's hidden size {hidden}, so [{hidden}, {3 * hidden}] is "
        return Finding("target_size", "fail", message + "expected: this is a head for another target")
    own = fc[0] if fc else head.config.get("hidden_size")
    if given is None:
        return Finding("target_size", "pass", f"hidden size {hidden}")
    if own == hidden:
        message = f"target_hidden_size is {given}; of a head of the target's hidden size it must be left out, for one "
        message += "reader of it then doesn't load the embeddings"
        return Finding("target_size", "warn" if given == hidden else "fail", message, {"target_hidden_size": None})
    if given != hidden:
        message = f"target_hidden_size is {given} and the target's hidden size {hidden}, which fc.weight has"
        return Finding("target_size", "fail", message, {"target_hidden_size": hidden} if fc else None)
    message = f"hidden size {own}, the target's {hidden}: SGLang and vLLM serve it, with embeddings of its own; `eval` "
    return Finding("target_size", "warn", message + "and `gap` here refuse the head")


def heads(head: SavedHead, target: Target) -> Finding:
    config, q, k = head.config, *(head.shape(f"midlayer.self_attn.{name}_proj.weight") for name in "qk")
    keys = ("num_attention_heads", "num_key_value_heads", "head_dim")
    given: tuple[Any, ...] = tuple(config.get(key) for key in keys)
    if not given[2] and given[0]:
        given = (*given[:2], (config.get("hidden_size") or 0) // given[0])  # what readers assume
    if not q or not k:
        return Finding("heads", "fail", "the attention's weights are missing")
    of_target = (target.config.num_attention_heads, target.config.num_key_value_heads, target.head_dim)
    known = tuple(head.record[key] for key in keys) if head.record else None
    fits = all(isinstance(value, int) for value in given) and (given[0] * given[2], given[1] * given[2]) == (q[0], k[0])
    if fits and given[0] and config.get("model_type") == "llama" and (config.get("hidden_size") or 0) % given[0]:
        message = f"{given[0]} heads don't divide hidden_size {config.get('hidden_size')}: transformers' LlamaConfig, "
        return Finding("heads", "fail", message + "by which SGLang and vLLM read config.json, refuses that")
    if fits and (given == known or known is None):
        status = "pass" if known or given == of_target else "warn"
        other = "" if status == "pass" else f", the target's are {of_target}: check what the head was trained with"
        return Finding("heads", status, f"heads, KV heads, head_dim {given}{other}")
    wanted = known or of_target
    safe = (wanted[0] * wanted[2], wanted[1] * wanted[2]) == (q[0], k[0])
    message = f"heads, KV heads, head_dim are {given}, and {wanted} " + ("were trained" if known else "fit the weights")
    if not safe:
        message = f"heads, KV heads, head_dim are {given}: q_proj and k_proj have {q[0]} and {k[0]} rows"
    message += ": engines split the attention wrongly or stop at loading"
    return Finding("heads", "fail", message, dict(zip(keys, wanted)) if safe else None)


def activation(head: SavedHead, target: Target) -> Finding:
    """hidden_act and rms_norm_eps: what they are when missing, and what they should be."""
    assumed = {"hidden_act": "silu", "rms_norm_eps": 1e-6}
    given = {key: head.config.get(key, value) for key, value in assumed.items()}
    wanted = {"hidden_act": "silu", "rms_norm_eps": getattr(target.config, "rms_norm_eps", given["rms_norm_eps"])}
    wanted |= {key: head.record[key] for key in assumed} if head.record else {}
    wrong = {key: value for key, value in wanted.items() if given[key] != value}
    if given["hidden_act"] != "silu" and not (head.record and wrong):
        message = f"hidden_act is {given['hidden_act']}: SGLang and vLLM have silu alone for a head and refuse to start"
        return Finding("activation", "fail", message)
    if not wrong:
        return Finding("activation", "pass", f"{given['hidden_act']}, eps {given['rms_norm_eps']}")
    text = ", ".join(f"{key} is {given[key]}, {value} was trained" for key, value in wrong.items())
    if head.record:
        return Finding("activation", "fail", f"{text}: the head computes something else", wrong)
    text = ", ".join(f"{key} is {given[key]}, the target's {value}" for key, value in wrong.items())
    return Finding("activation", "warn", f"{text}: right only if the head was trained so")


def norm_flags(head: SavedHead, target: Target) -> Finding:
    nested = head.config.get("eagle_config") or {}
    here = {key: head.config[key] for key in FLAGS if key in head.config}
    inside = {key: nested[key] for key in FLAGS if key in nested}
    normed = bool((head.record or {}).get("norm_output"))
    if normed and not here.get("norm_output"):
        message = "norm_output is missing: the head was trained on normed states, engines will feed it others"
        return Finding("norm_flags", "fail", message, {"norm_output": True})
    if not here and not inside:
        return Finding("norm_flags", "pass", "none, which every engine reads alike")
    text = ", ".join(f"{key} {value}" for key, value in (here | inside).items())
    if here == {"norm_output": True} and not inside and normed:
        message = "norm_output, as the head was trained: SGLang 0.5.21 and vLLM 0.32 feed the normed state back, "
        return Finding("norm_flags", "warn", message + "SGLang 0.5.1 and sglang-jax don't: acceptance falls there")
    message = f"{text}: engines differ in what they make of these (norm_output cost 3.40 -> 2.55 accepted tokens)"
    fix = dict.fromkeys(here)
    if inside:
        fix["eagle_config"] = {key: value for key, value in nested.items() if key not in FLAGS} or None
    if not any((here | inside).values()):
        return Finding("norm_flags", "warn", message + "; leave them out", fix)
    if head.record:
        return Finding("norm_flags", "fail", message + "; the head was trained without", fix)
    return Finding("norm_flags", "fail", message + "; serve it only in the engine that it was trained for")


def fc_norm(head: SavedHead, target: Target) -> Finding:
    """RMSNorm of each aux state: weights and flag belong together, and old engines know neither."""
    flag, weights = bool(head.config.get("fc_norm")), any(name.startswith("fc_norm.") for name in head.tensors)
    if not flag and not weights:
        return Finding("fc_norm", "pass", "none")
    if flag and weights:
        message = "fc_norm is used: SGLang 0.5.21 and vLLM 0.32 read it, SGLang 0.5.1 and sglang-jax drop it silently"
        return Finding("fc_norm", "warn", message)
    if weights:
        message = "fc_norm weights without `fc_norm: true`: engines drop them silently"
        return Finding("fc_norm", "fail", message, {"fc_norm": True})
    return Finding("fc_norm", "fail", "fc_norm is set and its weights are missing", {"fc_norm": None})


def biases(head: SavedHead, target: Target) -> Finding:
    """SGLang builds q, k, v and the MLP without biases whatever config.json says; vLLM goes by it."""
    wrong = [key for key in ("attention_bias", "mlp_bias", "bias") if head.config.get(key)]
    found = {name for name in head.tensors if name.endswith(".bias")}
    if not wrong and not found:
        return Finding("biases", "pass", "none")
    if not found:
        message = f"{', '.join(wrong)} set, and the weights have no bias: engines add biases that no weight fills"
        return Finding("biases", "fail", message, dict.fromkeys(wrong, False))
    parts = {"attention_bias": ("self_attn", "qkvo"), "mlp_bias": ("mlp", ("gate", "up", "down"))}
    promised = {f"midlayer.{parts[key][0]}.{name}_proj.bias" for key in wrong if key in parts for name in parts[key][1]}
    if found == {"fc.bias"} and wrong == ["bias"]:
        message = "bias: SGLang 0.5.21 alone adds fc.bias, vLLM stops at it; `eval` and `gap` here refuse the head"
        return Finding("biases", "warn", message)
    if found == promised and "bias" not in wrong:
        message = f"{', '.join(wrong)}: vLLM 0.32 alone adds the biases, SGLang drops those of q, k, v and the MLP "
        return Finding("biases", "warn", message + "without a word; `eval` and `gap` here refuse the head")
    differ = ", ".join(sorted(found ^ promised)) or "bias"
    message = f"the weights have biases, and not those that config.json promises ({differ}): SGLang drops those of "
    return Finding(
        "biases", "fail", message + "q, k, v and the MLP without a word, vLLM stops at one it doesn't expect"
    )


def tied(head: SavedHead, target: Target) -> Finding:
    given = head.config.get("tie_word_embeddings", False)
    if not given:
        return Finding("tie_word_embeddings", "pass", "false")
    message = "tie_word_embeddings is true: engines score drafts by the embedding in place of the head's own lm_head"
    return Finding("tie_word_embeddings", "fail", message, {"tie_word_embeddings": False})


def other_fields(head: SavedHead, target: Target) -> Finding:
    """Fields that no other rule knows, and that change what a head computes."""
    others = {name: UNKNOWN[name] for name in UNKNOWN if name not in RULED}
    found = [name for name, harmless in others.items() if head.config.get(name) not in harmless]
    if not found:
        return Finding("other_fields", "pass", "none that changes what the head computes")
    message = f"{', '.join(found)} set: some engines compute by it, others don't, and `eval` and `gap` here refuse it"
    return Finding("other_fields", "warn", message)


def dtype(head: SavedHead, target: Target) -> Finding:
    given = head.config.get("torch_dtype") or head.config.get("dtype")
    kinds = {str(value.dtype).removeprefix("torch.") for value in head.tensors.values() if value.is_floating_point()}
    if len(kinds) == 1 and given != (kind := kinds.pop()):
        message = f"torch_dtype is {given or 'missing'} and the weights are {kind}"
        return Finding("torch_dtype", "warn", message + ": engines cast them unasked", {"torch_dtype": kind})
    ours = _sglang_auto(given, head.config.get("model_type"))
    of_target = _sglang_auto(target.config.dtype, target.config.model_type)
    if (getattr(target.config, "quantization_config", None) or {}).get("quant_method") == "mxfp4":
        of_target = "bfloat16"  # arg_groups/model_overrides/gpt_oss.py: of both
    if ours == of_target:
        return Finding("torch_dtype", "pass", f"{given}")
    message = f"{given}: SGLang's --dtype auto makes {ours} of the head and {of_target} of the target, and stops at "
    return Finding("torch_dtype", "warn", message + "the first draft; serve it with --dtype bfloat16 or another one")


def _sglang_auto(dtype: Any, model_type: Any) -> str:
    """What SGLang's --dtype auto makes of a model of this dtype in config.json (configs/model_config.py)."""
    kind = str(dtype or "float32").removeprefix("torch.")
    of_float32 = "bfloat16" if str(model_type).startswith("gemma") else "float16"
    return of_float32 if kind == "float32" else kind


def aux_layer_ids(head: SavedHead, target: Target) -> Finding:
    """Which decoder layers each engine would capture, from the ids that it reads; sglang-jax reads none."""
    number = target.config.num_hidden_layers
    if number < MIN_LAYERS:
        message = f"the target has {number} layers; the default aux layers are distinct from {MIN_LAYERS} on"
        return Finding("aux_layers", "fail", message)
    default, config, key = list(aux_layers(number)), head.config, LAYER_IDS
    nested = config.get("eagle_config") or {}
    try:
        read = {engine: ids or default for engine, ids in layer_ids(config, number).items()}
    except UserError as error:
        return Finding("aux_layers", "fail", str(error))
    sglang, v1, v2 = read.values()
    trained = default if head.record else None
    written = [ids for ids in (config.get(key), nested.get(key), nested.get(NESTED_IDS)) if ids and ids != sorted(ids)]
    order = f"{written[0]}: engines hand the layers on from the lowest, so fc must be trained so" if written else ""
    rest = {name: value for name, value in nested.items() if name not in (key, NESTED_IDS)}
    fix = {name: value for name, value in ((key, None), ("eagle_config", rest or None)) if name in config}
    if nested.get("use_aux_hidden_state") is False:
        message = "eagle_config.use_aux_hidden_state is false: engines then hand the last hidden state to fc"
        return Finding("aux_layers", "fail", message, {"eagle_config": {**nested, "use_aux_hidden_state": True}})
    says = f"SGLang would capture layers {sglang}, vLLM "
    says += f"{v1}" if v1 == v2 else f"{v1} by its V1 runner, {v2} by its V2, which runs where Triton is"
    if sglang == v1 == v2 == default:
        if order and not trained:
            return Finding("aux_layers", "warn", order)
        return Finding("aux_layers", "pass", f"{default}, the default ones")
    if trained:
        message = f"{says}; the head was trained on {trained}: acceptance falls (3.40 -> 2.01 for ids off by one)"
        return Finding("aux_layers", "fail", message, fix)
    if not sglang == v1 == v2:
        message = f"{says}: one of them is wrong; vLLM counts Hugging Face's hidden_states, so its ids go to the top "
        message += "level, one higher than those under eagle_config"
        return Finding("aux_layers", "fail", message, fix if sglang == default else None)
    if sglang in ([i + 1 for i in default], [i - 1 for i in default]):
        return Finding("aux_layers", "fail", f"{says}: the default layers {default} off by one")
    message = f"{says}, not the default {default}: sglang-jax and the CUDA graphs of SGLang up to 0.5.3 take only those"
    if not sglang_captures(target.config, sglang):
        message = f"{says}: {SGLANG} hands out no output of {target.config.model_type}'s last layer, {number - 1}, and "
        message += "stops; vLLM serves it"
    message += f"; {order}" if order else ""
    return Finding("aux_layers", "warn", message)


RULES = (
    engines,
    architecture,
    one_layer,
    vocabulary,
    draft_vocabulary,
    sizes,
    target_size,
    heads,
    aux_layer_ids,
    activation,
    norm_flags,
    fc_norm,
    biases,
    tied,
    other_fields,
    dtype,
)
