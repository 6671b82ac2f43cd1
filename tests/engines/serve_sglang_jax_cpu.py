"""sglang-jax's server on a CPU, for tests: `launch/serve_sglang_jax.sh --cpu` starts it in the engine's own Python.

The engine is unmodified but for two things that its CPU lacks: the paged attention kernel, written for TPU alone, is
plain JAX here; and what it hands to a device is copied first, for on a CPU jax shares the memory of a numpy array that
the scheduler then writes over.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import sgl_jax.srt.kernels.ragged_paged_attention.ragged_paged_attention_v3 as kernel
import sgl_jax.srt.utils.jax_utils as jax_utils

LONGEST = []  # tokens of a sequence: --context-length in whole pages


def ragged_paged_attention(
    queries,  # [tokens, heads, head_dim]
    keys,  # [tokens, KV heads, head_dim]
    values,
    cache,  # [pages, page_size, 2 x KV heads / packing, packing, head_dim padded]: keys and values in turn
    kv_lens,  # [sequences]: cached and new tokens
    page_indices,  # pages of all sequences, one after another
    cu_q_lens,  # [sequences + 1]
    cu_kv_lens,  # [sequences + 1], in whole pages
    distribution,  # [3], the last: number of sequences
    custom_mask,
    attention_sink=None,
    *,
    causal=1,
    sm_scale=1.0,
    **unused,
):
    """(attention [tokens, heads, head_dim], cache with the new keys and values)."""
    assert causal and custom_mask is None and attention_sink is None, "a chain of drafts: --speculative-eagle-topk 1"
    tokens, heads, head_dim = queries.shape
    pages, page_size, *inner = cache.shape
    sequences, slots = len(kv_lens), pages * page_size
    number = distribution[-1]
    flat = cache.reshape(slots, -1, inner[-1])

    token = jnp.arange(tokens)
    of = jnp.clip(jnp.searchsorted(cu_q_lens[1:], token, side="right"), 0, sequences - 1)
    real = token < cu_q_lens[number]
    position = kv_lens[of] - cu_q_lens[of + 1] + token
    page = cu_kv_lens[of] // page_size + position // page_size
    slot = page_indices[jnp.where(real, page, 0)] * page_size + position % page_size
    fused = jnp.stack([keys, values], 2).reshape(tokens, -1, head_dim)
    fused = jnp.pad(fused, ((0, 0), (0, 0), (0, inner[-1] - head_dim))).astype(cache.dtype)
    flat = flat.at[jnp.where(real, slot, slots)].set(fused, mode="drop")

    # Every token sees the cached positions of its own sequence up to itself.
    place = jnp.arange(LONGEST[0])
    pages = page_indices[jnp.clip(cu_kv_lens[:-1, None] + place, max=len(page_indices) * page_size - 1) // page_size]
    k, v = (
        jnp.repeat(flat[pages * page_size + place % page_size, i::2, :head_dim], heads // keys.shape[1], 2)
        for i in (0, 1)
    )
    scores = jnp.einsum("qhd,skhd->hqsk", queries, k, preferred_element_type=jnp.float32) * sm_scale
    seen = (of[:, None, None] == jnp.arange(sequences)[:, None]) & (place <= position[:, None, None])
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), (-2, -1))
    return jnp.einsum("hqsk,skhd->qhd", weights, v).astype(queries.dtype), flat.reshape(cache.shape)


def copying(device_array):
    return lambda data, *args, **more: device_array(jax.tree.map(copied, data), *args, **more)


def copied(value):
    return value.copy() if isinstance(value, np.ndarray) else value


def with_its_kernel(choose):
    """Its choice of an attention backend, without the fallback for a CPU: plain attention knows no drafts."""

    def choose_as_on_tpu(runner):
        LONGEST[:] = [-(-(runner.model_config.context_len + runner.page_size) // runner.page_size) * runner.page_size]
        runner.server_args.device = "tpu"
        try:
            return choose(runner)
        finally:
            runner.server_args.device = "cpu"

    return choose_as_on_tpu


# Before anything imports them by name; the scheduler's process imports this file too.
kernel.ragged_paged_attention = ragged_paged_attention
jax_utils.device_array = copying(jax_utils.device_array)
jax.device_put = copying(jax.device_put)

from sgl_jax.srt.model_executor.model_runner import ModelRunner  # noqa: E402

ModelRunner._get_attention_backend = with_its_kernel(ModelRunner._get_attention_backend)

if __name__ == "__main__":
    from sgl_jax.launch_server import main

    sys.exit(main())
