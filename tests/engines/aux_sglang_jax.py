"""Aux hidden states of sglang-jax's own Qwen2ForCausalLM, one prefill on the CPU; run by that engine's Python.

Arguments and output as of aux_sglang_051.py. Its EAGLE3 path needs Pallas kernels, hence a TPU; the model, its weight
loader and its logits processor run here with the engine's own plain attention.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file
from sgl_jax.srt.configs.model_config import ModelConfig
from sgl_jax.srt.layers.attention.native_backend import NativeAttention
from sgl_jax.srt.layers.logits_processor import LogitsMetadata
from sgl_jax.srt.mem_cache.memory_pool import MemoryPools, MHATokenToKVPool
from sgl_jax.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sgl_jax.srt.models.qwen2 import Qwen2ForCausalLM

TOKENS = 128  # slots of the KV pool


def main(target: str, job: str, out: str) -> None:
    with open(job) as file:
        job = json.load(file)
    # As its ModelRunner makes it; the axes are "data" and "tensor".
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    settings = ModelConfig(target, dtype="float32")
    config = settings.hf_config
    with jax.set_mesh(mesh):
        model = Qwen2ForCausalLM(config, mesh, dtype=jnp.float32)
        model.load_weights(settings)
        starts = np.cumsum([len(ids) for ids in job["requests"]])[:-1]
        tensors = {}
        for k, layer_ids in enumerate(job["layer_ids"]):
            model.set_eagle3_layers_to_capture(*[] if layer_ids is None else [layer_ids])
            output = model(*prefill(config, mesh, job["requests"]))[0]
            aux = np.split(np.asarray(output.hidden_states), starts)
            tensors |= {f"aux.{k}.{i}": np.ascontiguousarray(rows) for i, rows in enumerate(aux)}
            tensors |= {f"logits.{k}.{i}": row.copy() for i, row in enumerate(np.asarray(output.next_token_logits))}
        embed, head = model.get_embed_and_head()  # what the draft worker asks the target for
        assert embed.shape == head.shape == (config.vocab_size, config.hidden_size)
    save_file(tensors, out)


def prefill(config, mesh, requests: list[list[int]]) -> tuple[ForwardBatch, MemoryPools, LogitsMetadata]:
    """Batch, KV pool and logits metadata of one prefill of all requests, from an empty cache."""
    lengths = np.array([len(request) for request in requests], np.int32)

    def place(values):
        return jax.device_put(jnp.asarray(values, jnp.int32), NamedSharding(mesh, P("data")))

    pool = MHATokenToKVPool(
        size=TOKENS,
        page_size=1,
        dtype=jnp.float32,
        head_num=config.num_key_value_heads,
        head_dim=config.hidden_size // config.num_attention_heads,  # 128: this attention takes no other
        layer_num=config.num_hidden_layers,
        mesh=mesh,
    )
    slots = place(np.arange(1, 1 + lengths.sum()))
    batch = ForwardBatch(
        bid=0,
        forward_mode=ForwardMode.EXTEND,
        batch_size=len(requests),
        input_ids=place(np.concatenate(requests)),
        req_pool_indices=place(np.arange(len(requests))),
        seq_lens=place(lengths),
        out_cache_loc=slots,
        positions=place(np.concatenate([np.arange(length) for length in lengths])),
        attn_backend=NativeAttention(config.num_attention_heads, config.num_key_value_heads, mesh),
        cache_loc=slots,
        extend_prefix_lens=place(np.zeros(len(requests))),
        extend_seq_lens=place(lengths),
        capture_hidden_mode=CaptureHiddenMode.FULL,
    )
    last = place(np.cumsum(lengths) - 1)
    metadata = LogitsMetadata(ForwardMode.EXTEND, CaptureHiddenMode.FULL, logits_indices=last)
    return batch, MemoryPools(token_to_kv_pool=pool), metadata


if __name__ == "__main__":
    main(*sys.argv[1:])
