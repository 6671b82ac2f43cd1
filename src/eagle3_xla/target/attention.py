"""The target's attention for the TPU partitioner, as a transformers attention function."""

import torch
from transformers import AttentionInterface

GROUPED_EINSUM = "grouped_einsum"


def grouped_einsum_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Softmax attention with grouped heads and no repeated keys.

    As `torch.nn.functional.scaled_dot_product_attention`, heads sharded over tp make the partitioner gather query, key
    and value, and every chip then computes all heads (benchmarks/README.md).

    query [B, heads, T, D]; key, value [B, kv_heads, T, D]; attention_mask [B, 1, T, T] bool -> [B, T, heads, D], None.
    """
    batch, heads, length, head_dim = query.shape
    kv_heads = key.shape[1]
    query = query.reshape(batch, kv_heads, heads // kv_heads, length, head_dim) * scaling
    scores = torch.einsum("bkgtd,bksd->bkgts", query, key).float()
    scores = scores.masked_fill(~attention_mask[:, :, None], torch.finfo(torch.float32).min)
    weights = scores.softmax(-1).to(value.dtype)
    output = torch.einsum("bkgts,bksd->btkgd", weights, value)
    return output.reshape(batch, length, heads, head_dim), None


AttentionInterface.register(GROUPED_EINSUM, grouped_einsum_attention)
