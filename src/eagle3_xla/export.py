"""`export`: a checkpoint into the one directory that SGLang, sglang-jax and vLLM load.

config.json         LlamaForCausalLMEagle3, as the engines' readers expect it (with draft.qk_norm vLLM's class for it)
model.safetensors   fc, midlayer, norm, lm_head, d2t (int64 offsets), t2d (bool); the embedding is the target's

A head over the target's whole vocabulary has neither d2t nor t2d: vLLM stops at a d2t there (models/llama_eagle3.py).

The metadata of model.safetensors also holds what weights can't tell: how the head was trained. Engines ignore it;
`doctor` compares config.json, which travels and is edited by hand, with it.
"""

import json

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from eagle3_xla import checkpoint as checkpoints
from eagle3_xla import local_copies, storage
from eagle3_xla.draft.saved import (
    ARCHITECTURE,
    MODEL_TYPES,
    NORM_FLAGS,
    QK_NORM_ARCHITECTURE,
    RECORD,
    TRAINED,
    window_of,
)
from eagle3_xla.errors import UserError
from eagle3_xla.outputs import claim_output
from eagle3_xla.storage import Location
from eagle3_xla.target.weights import SINGLE

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def export(checkpoint: Location, out: Location, dtype: str = "bfloat16") -> dict:
    """Write the head of a checkpoint folder to `out`; of a run's folder: its best by held-out tau, else its newest.

    Aux layer ids are left out: the head reads the layers that every engine takes by default. `fc_norm` and
    `norm_output` are written for an EAGLE-3.1 head alone: elsewhere the latter has another meaning. The result's
    `chosen` says which checkpoint and why.
    """
    run = storage.join(checkpoint, "checkpoints")
    if storage.is_folder(run):
        saved = checkpoints.load_best(run, warn=print)
        if saved is None:
            raise UserError(f"{checkpoint} has no whole checkpoint yet")
        why = "the newest, no tau is known" if saved.tau is None else f"the best, held-out tau {saved.tau:.3f}"
    else:
        saved, why = checkpoints.load(checkpoint), "as named"
    out = claim_output(out, "export", ours=_holds_our_head)
    config = serving_config(saved.draft_config, len(saved.d2t), dtype)
    tensors = {name: value.to(DTYPES[dtype]).contiguous() for name, value in saved.head.items()}
    record = {key: config[key] for key in TRAINED} | {"aux_layers": "default"}
    record |= {key: config.get(key, False) for key in NORM_FLAGS}
    record |= {"window": window_of(config), "qk_norm": config["architectures"] == [QK_NORM_ARCHITECTURE]}
    metadata = {"format": "pt", RECORD: json.dumps(record)}
    if not (len(saved.t2d) == len(saved.d2t) and not saved.d2t.any()):
        tensors |= {"d2t": saved.d2t, "t2d": saved.t2d}
    with storage.whole_file(storage.join(out, SINGLE)) as partial:
        save_file(tensors, partial, metadata=metadata)
    storage.write(storage.join(out, "config.json"), json.dumps(config, indent=2) + "\n")
    chosen = f"step {saved.micro_step} ({why})"
    return {"out": str(out), "micro_step": saved.micro_step, "tau": saved.tau, "chosen": chosen, "dtype": dtype}


def _holds_our_head(out: Location) -> bool:
    if not storage.exists(storage.join(out, SINGLE)):
        return False
    try:
        with safe_open(local_copies.local_file(storage.join(out, SINGLE)), framework="pt") as file:
            return RECORD in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def serving_config(draft: dict, draft_vocab_size: int, dtype: str) -> dict:
    """config.json of the head. draft: the head's LlamaConfig as a dict."""
    keys = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "max_position_embeddings",  # missing means 2048 to the engines: acceptance collapses past it
        "bos_token_id",
        "eos_token_id",
    )
    rope = {"rope_theta": draft["rope_theta"], "rope_scaling": draft["rope_scaling"]}
    scaling = draft["rope_scaling"] or {"rope_type": "default"}
    architecture = QK_NORM_ARCHITECTURE if draft.get("qk_norm") else ARCHITECTURE
    window = {"use_sliding_window": True, "layer_types": ["sliding_attention"]}  # for Qwen3's reader, for vLLM's
    return {
        "architectures": [architecture],
        "model_type": MODEL_TYPES[architecture],
        "num_hidden_layers": 1,
        **{key: draft[key] for key in keys},
        "draft_vocab_size": draft_vocab_size,
        # Old readers take rope_theta and rope_scaling, new ones rope_parameters.
        **rope,
        "rope_parameters": {"rope_theta": draft["rope_theta"], **scaling},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        **{key: True for key in NORM_FLAGS if draft.get(key)},
        **({"sliding_window": draft["sliding_window"], **window} if draft.get("sliding_window") else {}),
    }
