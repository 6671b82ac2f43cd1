"""The target's attention for the TPU partitioner and for decoding, as a transformers attention function."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

GROUPED_EINSUM = "grouped_einsum"
DECODING = "decoding"


def grouped_einsum_attention(
    module: torch.nn.Module | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Softmax attention with grouped heads and no repeated keys.

    As `torch.nn.functional.scaled_dot_product_attention`, heads sharded over tp make the partitioner gather query, key
    and value, and every chip then computes all heads (benchmarks/README.md).

    query [B, heads, T, D]; key, value [B, kv_heads, S, D]; attention_mask [B, 1, T, S] bool, windows included;
    softcap: scores become softcap * tanh(scores / softcap) (Gemma-2); s_aux [heads]: attention sinks, one more score
    in every softmax, without a value (gpt-oss) -> [B, T, heads, D], None.
    """
    batch, heads, length, head_dim = query.shape
    kv_heads = key.shape[1]
    scaling = head_dim**-0.5 if scaling is None else scaling
    query = query.reshape(batch, kv_heads, heads // kv_heads, length, head_dim) * scaling
    scores = torch.einsum("bkgtd,bksd->bkgts", query, key).float()
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~attention_mask[:, :, None], torch.finfo(torch.float32).min)
    if s_aux is None:
        weights = scores.softmax(-1).to(value.dtype)
    else:
        sinks = s_aux.float().view(1, kv_heads, -1, 1, 1)
        largest = scores.amax(-1, keepdim=True).maximum(sinks)
        weights = (scores - largest).exp()
        weights = (weights / (weights.sum(-1, keepdim=True) + (sinks - largest).exp())).to(value.dtype)
    output = torch.einsum("bkgts,bksd->btkgd", weights, value)
    return output.reshape(batch, length, heads, head_dim), None


def decoding_attention(
    module: torch.nn.Module | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As `grouped_einsum_attention`, by torch's kernel where it computes what the family does: for a few rows over long
    caches, where transformers' own call of that kernel spends its time on repeating the keys.
    """
    if softcap is not None or s_aux is not None:
        return grouped_einsum_attention(
            module, query, key, value, attention_mask, scaling, softcap=softcap, s_aux=s_aux
        )
    attend = torch.nn.functional.scaled_dot_product_attention
    output = attend(query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2), None


@contextmanager
def decoding(model: torch.nn.Module) -> Iterator[None]:
    """The model attends by `decoding_attention`; its masks are given."""
    before = model.config._attn_implementation
    model.config._attn_implementation = DECODING
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _bool_mask(*arguments: Any, **keywords: Any) -> Any:
    """transformers' own bool mask, which sdpa leaves out where its kernel has a flag for it."""
    return sdpa_mask(*arguments, **keywords | {"allow_is_causal_skip": False})


AttentionInterface.register(GROUPED_EINSUM, grouped_einsum_attention)
AttentionInterface.register(DECODING, decoding_attention)
AttentionMaskInterface.register(GROUPED_EINSUM, _bool_mask)
AttentionMaskInterface.register(DECODING, _bool_mask)
