"""What a target may be: the model types that are proven equal to transformers, and every field of their config.json.

A field that is neither here nor without effect is refused by name: a head that is trained on other maths than the
engine serves looks well in training and dies in serving. tests/target/test_families.py runs every family.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch

from eagle3_xla.data.tokenizer import load_config, written_config
from eagle3_xla.errors import UserError
from eagle3_xla.target import quantised

MIN_LAYERS = 8

# Fields that every family reads, and those that change nothing in a forward pass without training.
SHAPE = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters tie_word_embeddings""".split()
WITHOUT_EFFECT = """_attn_implementation _attn_implementation_autoset _attn_implementation_internal _name_or_path
architectures attention_dropout auto_map bad_words_ids begin_suppress_tokens bos_token_id cache_implementation
diversity_penalty do_sample dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size eos_token_id
exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id id2label initializer_range
label2id length_penalty max_length min_length model_type no_repeat_ngram_size num_beam_groups num_beams
num_return_sequences output_attentions output_hidden_states output_router_logits output_scores pad_token pad_token_id
prefix pretraining_tp problem_type quantization_config remove_invalid_values repetition_penalty resid_pdrop return_dict
return_dict_in_generate router_aux_loss_coef router_jitter_noise sep_token_id suppress_tokens task_specific_params
temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config
transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache""".split()
# Fields that are right at one value; at another one transformers, the engines or we compute something else.
ONLY: dict[str, Any] = {
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "cross_attention_hidden_size": None,
    "chunk_size_feed_forward": 0,
    "pruned_heads": {},
    "decoder_start_token_id": None,
    "use_bidirectional_attention": False,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "swiglu_limit": 7.0,  # transformers' gpt-oss has it as a constant
}

# Which of transformers' mask functions a family's layers call: one for each layer type, or one for all layers.
BY_LAYER, ALL_LAYERS = "by layer", "all layers"


# What serves a target's head as released; tests/engines/test_target_classes.py reads it in their sources.
# SGLang calls `set_eagle3_layers_to_capture` of any target's class, vLLM asks for SupportsEagle3.
SGLANG, VLLM, SGLANG_JAX = "SGLang 0.5.21", "vLLM 0.32", "sglang-jax"
LAST_IN_SGLANG = ("gpt_oss", "gemma3_text")  # whose classes in SGLang hand out the last layer's output too
WINDOWED_IN_SGLANG = ("gpt_oss", "gemma3_text")  # served there with windows; its Llama, Qwen and Phi-3 have none
IN_SGLANG_JAX = ("qwen2", "llama", "qwen3")  # at cddbf6f1: Qwen2 by patches/sglang-jax-qwen2.patch


class Family:
    """fields: of its config.json, beside SHAPE; masks: BY_LAYER, ALL_LAYERS or None (no windows); engines: which of
    SGLANG and VLLM hand its hidden states to a head.
    """

    def __init__(self, fields: str, masks: str | None = None, engines: tuple[str, ...] = (SGLANG, VLLM)):
        self.fields, self.masks, self.engines = fields.split(), masks, engines


WINDOWS = "use_sliding_window sliding_window max_window_layers"
GEMMA = "hidden_activation attention_bias query_pre_attn_scalar sliding_window layer_types final_logit_softcapping"
FAMILIES = {
    "qwen2": Family(f"hidden_act layer_types {WINDOWS}", BY_LAYER),
    "qwen3": Family(f"hidden_act attention_bias layer_types {WINDOWS}", BY_LAYER),
    "qwen3_moe": Family(
        f"hidden_act attention_bias {WINDOWS} decoder_sparse_step moe_intermediate_size num_experts_per_tok "
        "num_experts norm_topk_prob mlp_only_layers",
        ALL_LAYERS,
    ),
    "llama": Family("hidden_act attention_bias mlp_bias"),
    "mistral": Family("hidden_act sliding_window", ALL_LAYERS),
    "mixtral": Family("hidden_act sliding_window num_experts_per_tok num_local_experts", ALL_LAYERS, ()),
    "phi3": Family("hidden_act sliding_window partial_rotary_factor original_max_position_embeddings", ALL_LAYERS),
    "gemma2": Family(f"{GEMMA} hidden_act attn_logit_softcapping", BY_LAYER, ()),
    "gemma3_text": Family(
        f"{GEMMA} rope_local_base_freq sliding_window_pattern _sliding_window_pattern", BY_LAYER, (SGLANG,)
    ),
    "gpt_oss": Family(
        "hidden_act attention_bias sliding_window layer_types num_local_experts num_experts_per_tok experts_per_token "
        "initial_context_length",
        BY_LAYER,
    ),
    "smollm3": Family(
        f"hidden_act attention_bias mlp_bias no_rope_layers no_rope_layer_interval layer_types {WINDOWS}",
        BY_LAYER,
        (VLLM,),
    ),
    "olmo2": Family("hidden_act attention_bias", engines=(VLLM,)),
    "granite": Family(
        "hidden_act attention_bias mlp_bias embedding_multiplier logits_scaling residual_multiplier "
        "attention_multiplier",
        engines=(VLLM,),
    ),
}

# Why the well-known ones among the others are refused.
REFUSED = {
    "cohere": "Cohere scales its logits and shares one norm between attention and MLP",
    "cohere2": "Cohere scales its logits and shares one norm between attention and MLP",
    "gpt_neox": "GPT-NeoX has LayerNorm, parallel residuals and no `model.layers`",
    "gptj": "GPT-J has LayerNorm, parallel residuals and no `model.layers`",
    "gpt2": "GPT-2 has learned positions and LayerNorm",
    "opt": "OPT has learned positions and LayerNorm",
    "bloom": "BLOOM has ALiBi positions",
    "mpt": "MPT has ALiBi positions",
    "falcon": "Falcon has LayerNorm and parallel residuals",
    "phi": "Phi-1 and Phi-2 have LayerNorm, parallel residuals and a bias in lm_head",
    "starcoder2": "StarCoder-2 has LayerNorm with biases",
    "stablelm": "StableLM has LayerNorm",
    "glm": "GLM rotates pairs of neighbours, which no check here has compared",
    "glm4": "GLM-4 rotates pairs of neighbours and has norms after its layers, which no check here has compared",
    "deepseek_v2": "DeepSeek has latent attention (MLA)",
    "deepseek_v3": "DeepSeek has latent attention (MLA)",
    "qwen2_moe": "Qwen2-MoE adds a shared expert with a gate of its own",
    "qwen3_next": "Qwen3-Next has linear attention",
    "llama4": "Llama-4 has a vision tower and attention in chunks",
    "llama4_text": "Llama-4 has attention in chunks",
    "phimoe": "Phi-3.5-MoE routes by a rule of its own (sparsemixer)",
    "minicpm": "MiniCPM's code is in its repository",
    "mamba": "Mamba has no attention",
    "mamba2": "Mamba has no attention",
    "jamba": "Jamba mixes attention with Mamba",
    "granitemoe": "Granite-MoE's experts are in one tensor with a router of its own",
    "gemma": "Gemma 1 is not among the engines' EAGLE3 targets",
    "gemma3n": "Gemma-3n has several streams of hidden states",
}
# RoPE scalings that transformers, SGLang 0.5.21 and vLLM 0.32 compute alike, with the fields that all three read.
ROPE = {
    "default": [],
    "linear": ["factor"],
    "llama3": ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
    "yarn": ["factor", "original_max_position_embeddings"],
    "longrope": ["short_factor", "long_factor"],
}
ROPE_OPTIONS = {"yarn": ["beta_fast", "beta_slow", "truncate"]}
ROPE_REFUSED = {
    "dynamic": "transformers changes its base with the longest row of a forward, SGLang has another base at every "
    "length, vLLM none",
}


def load_target_config(path: str) -> Any:
    """The Hugging Face config of a supported target, of a folder, a URL or a hub id. Raises UserError: why not."""
    check(written_config(path), path)
    config = load_config(path)
    aux_layers(config.num_hidden_layers)
    windowless = getattr(config, "sliding_window", None) is None or not getattr(config, "use_sliding_window", True)
    if windowless and "sliding_attention" in (getattr(config, "layer_types", None) or []):
        raise UserError(
            f"target {path!r} is not supported: layer_types in config.json has sliding_attention, and sliding_window "
            "or use_sliding_window says that there is no window"
        )
    _within_original_context(config)
    return config


def _within_original_context(config: Any) -> None:
    """Cut a longrope target's context to `context_length`."""
    if not is_longrope(config):
        return
    longest, original = config.max_position_embeddings, config.original_max_position_embeddings
    # Of cos and sin at every length; transformers takes it from the two contexts.
    factor = math.sqrt(1 + max(0.0, math.log(longest / original)) / math.log(original))
    config.rope_scaling["attention_factor"] = factor
    config.max_position_embeddings = original


def context_length(config: Any) -> int:
    """How many positions a target is used with: of a longrope target those that it was first trained with.

    Beyond them transformers switches to the long factors by the longest row of a forward, SGLang by the longest request
    of a batch (keys that are cached keep theirs), vLLM by the server's context length.
    """
    return config.original_max_position_embeddings if is_longrope(config) else config.max_position_embeddings


def refuse_longer_rows(config: Any, row_length: int, where: str) -> None:
    """Raises UserError for rows beyond the context of a config of `load_target_config`: one conversation may fill a
    row, and would be trained on at positions that the target is never used at. where: what says `row_length`.
    """
    scaling, longest = getattr(config, "rope_scaling", None) or {}, config.max_position_embeddings
    if _rope_type(scaling) in ("yarn", "linear"):  # max_position_embeddings may be that without it (Qwen3's own advice)
        longest = max(longest, int(scaling["factor"] * scaling.get("original_max_position_embeddings", longest)))
    if row_length > longest:
        raise UserError(
            f"{where}: rows of {row_length} tokens are longer than the {longest} positions that the target is used "
            "with; prepare the data with a data.row_length of at most that"
        )


def is_longrope(config: Any) -> bool:
    return _rope_type(getattr(config, "rope_scaling", None) or {}) == "longrope"


def _rope_type(rope: dict) -> str:
    return rope.get("rope_type", rope.get("type", "default"))


def _strange_rope(rope: dict) -> str | None:
    """Why this rope_scaling is not the same in transformers and in the engines."""
    kind = _rope_type(rope)
    if not isinstance(kind, str) or kind not in ROPE:
        return f"rope_scaling {kind!r}: " + ROPE_REFUSED.get(str(kind), f"unknown here; known: {', '.join(ROPE)}")
    given = {field for field, value in rope.items() if value is not None} - {"rope_type", "type"}
    if missing := [field for field in ROPE[kind] if field not in given]:
        return f"rope_scaling {kind!r} without {', '.join(missing)}, which vLLM needs"
    if strange := given - {*ROPE[kind], *ROPE_OPTIONS.get(kind, [])}:
        return f"rope_scaling has {', '.join(sorted(strange))}, which SGLang, vLLM and transformers don't read alike"
    return None


def _unread_rope(written: dict) -> str | None:
    """What `rope_parameters`, which the engines' transformers 5 reads and 4.57 doesn't, says beyond the top level."""
    scaling, newer = written.get("rope_scaling") or {}, written.get("rope_parameters") or {}
    top = {"original_max_position_embeddings": written.get("original_max_position_embeddings")} | scaling
    top |= {"rope_type": _rope_type(scaling), "rope_theta": written.get("rope_theta")}
    top["partial_rotary_factor"] = written.get("partial_rotary_factor", 1.0)
    said, parts = {"rope_parameters": top}, {"rope_parameters": newer}
    if any(isinstance(value, dict) for value in newer.values()):  # Gemma-3 has one for each type of layer
        if written.get("model_type") != "gemma3_text":
            return f"rope_parameters by layer type ({', '.join(newer)}) are known here of gemma3_text alone"
        local = {"rope_type": "default", "rope_theta": written.get("rope_local_base_freq")}
        said = {"rope_parameters.full_attention": top, "rope_parameters.sliding_attention": local}
        parts = {f"rope_parameters.{layers}": value for layers, value in newer.items()}
    for where, part in parts.items():
        if where not in said or not isinstance(part, dict):
            return f"{where} is {part!r} in config.json, of which nothing is known here"
        for field, value in part.items():
            field = "rope_type" if field == "type" else field
            if value in (None, said[where].get(field)):
                continue
            theta = "rope_theta" if said[where] is top else "rope_local_base_freq"
            places = {"rope_theta": theta, "partial_rotary_factor": field}
            return (
                f"{where}.{field} is {value!r}, as transformers 5 writes it, and 4.57, which computes here, reads "
                f"{places.get(field, f'rope_scaling.{field}')} ({said[where].get(field)!r}) at the top level instead: "
                "say all of it there too"
            )
    return None


def sglang_captures(config: Any, layers: Iterable[int]) -> bool:
    """Whether SGLang's class of this target, where it has one for a head, hands out the outputs of these layers."""
    last = config.num_hidden_layers - 1 in layers
    return not last or config.model_type in LAST_IN_SGLANG or config.model_type not in FAMILIES


def sglang_jax_serves(config: Any) -> bool:
    """Whether sglang-jax hands this target's hidden states to a head. Its Llama and Qwen3 share an lm_head with it
    (get_embed_and_head), which they lack where it is tied; the patched Qwen2 has the embedding in its place.
    """
    tied = config.tie_word_embeddings and config.model_type != "qwen2"
    return config.model_type in IN_SGLANG_JAX and not tied


def aux_layers(num_layers: int) -> tuple[int, int, int]:
    """0-based decoder layers whose outputs feed the head: {1, L//2-1, L-4}, as every engine takes by default.

    Hugging Face's `hidden_states` index of layer i is i + 1. Raises UserError when the three are not distinct.
    """
    if num_layers < MIN_LAYERS:
        raise UserError(
            f"the target has {num_layers} decoder layers; EAGLE3 takes hidden states of three distinct ones "
            f"and needs at least {MIN_LAYERS}"
        )
    return (1, num_layers // 2 - 1, num_layers - 4)


def check(written: dict, path: str) -> None:
    """Raises UserError unless a target with this config.json is computed as transformers does."""

    def refuse(why: str) -> UserError:
        return UserError(f"target {path!r} is not supported: {why}")

    kind = written.get("model_type")
    for part in ("vision_config", "audio_config"):
        if part in written:
            raise refuse(f"it has a {part.removesuffix('_config')} tower ({kind}); take a text-only checkpoint")
    if written.get("is_encoder_decoder"):
        raise refuse(f"{kind} is an encoder-decoder; EAGLE3 drafts for a decoder alone")
    if kind not in FAMILIES:
        if kind in REFUSED:
            raise refuse(REFUSED[kind])
        if "auto_map" in written:
            raise refuse(f"model type {kind!r} brings its own code (auto_map), which is never run here")
        raise refuse(f"model type {kind!r} is unknown here; known: {', '.join(FAMILIES)}")
    act, activation = written.get("hidden_act"), written.get("hidden_activation")
    if kind == "gemma2" and act not in (None, activation):
        raise refuse(f"hidden_act is {act!r} and hidden_activation, which transformers' Gemma-2 reads, {activation!r}")
    family = FAMILIES[kind]
    known = {*SHAPE, *WITHOUT_EFFECT, *family.fields}
    for field, value in written.items():
        if field in ONLY:
            if value not in (ONLY[field], None):
                raise refuse(f"{field} is {value!r} in config.json; only {ONLY[field]!r} is computed here")
        elif field not in known and value not in (None, False, [], {}):  # a field that is off changes nothing
            raise refuse(f"{field} ({value!r}) in config.json is no field of {kind} that is known here")
    if why := quantised.refusal(written.get("quantization_config") or {}):
        raise refuse(why)
    if why := _strange_rope(written.get("rope_scaling") or {}):
        raise refuse(why)
    if _rope_type(written.get("rope_scaling") or {}) == "longrope" and kind != "phi3":
        raise refuse(f"rope_scaling 'longrope' is known here of phi3 alone, not of {kind}")
    if strange := set(written.get("layer_types") or []) - {"full_attention", "sliding_attention"}:
        raise refuse(f"layer_types has {', '.join(sorted(strange))}; known: full_attention, sliding_attention")
    if why := _unread_rope(written):
        raise refuse(why)


def attention_masks(
    config: Any, visible: torch.Tensor, distance: torch.Tensor
) -> torch.Tensor | dict[str, torch.Tensor]:
    """What the family's decoder takes as ready-made masks: a 4-D tensor, or one for each of its layer types.

    visible [B, Q, K] bool: what a query may see without any window (its own document, its own past); distance, which
    broadcasts against it: how many positions a key lies before its query. A layer with a window sees
    distance < sliding_window, as transformers' `sliding_window_overlay` has it.
    """
    masks = FAMILIES[config.model_type].masks
    full, window = visible[:, None], config.sliding_window if masks else None
    within = full if window is None else (visible & (distance < window))[:, None]
    return {"full_attention": full, "sliding_attention": within} if masks == BY_LAYER else within


def logits_of(config: Any, products: torch.Tensor) -> torch.Tensor:
    """The model's logits from lm_head's products, elementwise: Granite's scaling, Gemma's soft cap."""
    if scaling := getattr(config, "logits_scaling", None):
        products = products / scaling
    if cap := getattr(config, "final_logit_softcapping", None):
        products = cap * (products / cap).tanh()
    return products


def routed_layers(config: Any) -> list[bool]:
    """Which layers are a mixture of experts."""
    every, chosen = config.num_hidden_layers, getattr(config, "num_experts_per_tok", 0)
    if config.model_type == "qwen3_moe":
        dense = set(config.mlp_only_layers)
        return [i not in dense and (i + 1) % config.decoder_sparse_step == 0 for i in range(every)]
    return [chosen > 0] * every


def inner_widths(config: Any) -> list[int]:
    """How wide the MLP of each layer is for one token: of its chosen experts together in a mixture-of-experts layer."""
    chosen = getattr(config, "num_experts_per_tok", 0)
    of_expert = getattr(config, "moe_intermediate_size", config.intermediate_size)
    return [chosen * of_expert if routed else config.intermediate_size for routed in routed_layers(config)]


def linear_rows(config: Any, rows: torch.Tensor) -> torch.Tensor:
    """lm_head rows with a constant scaling of the logits folded in, for a head that has none; a soft cap stays out."""
    return rows / (getattr(config, "logits_scaling", None) or 1.0)


def norm_offset(config: Any) -> float:
    """What the family's RMSNorm adds to its weight: Gemma scales by 1 + weight."""
    return 1.0 if config.model_type.startswith("gemma") else 0.0


def plain_attention(config: Any) -> str:
    """transformers' attention implementation for plain torch: sdpa where that computes what the family does."""
    from eagle3_xla.target.attention import GROUPED_EINSUM

    capped = getattr(config, "attn_logit_softcapping", None)
    return GROUPED_EINSUM if config.model_type == "gpt_oss" or capped else "sdpa"
