"""The attention of training-time test (TTT), EAGLE-3 paper section 3.2: a causal part and one key per later step.

The causal part is computed in blocks of queries that are computed again in the backward pass, so memory grows with T,
not with T squared; the own-row keys join it by log-sum-exp.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch

from eagle3_xla.target.order import after

LEAST = -87.0  # exp of less is no normal float32


def block_length(length: int) -> int:
    """Queries that are looked at together: an eighth of the row, but 256 to 512. Fewer are a larger graph."""
    return min(max(256, length // 8), 512)


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, document_ids: torch.Tensor, reach: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention inside each document, to the last `reach` rows (None: all of them), its own included.

    query [B, T, kv_heads, group, D], already scaled; key, value [B, T, kv_heads, D]; document_ids [B, T] int.
    Returns the output [B, T, kv_heads, group, D] and the log-sum-exp of its scores [B, T, kv_heads, group] float32.
    Query and key are taken in the value's dtype: under autocast a norm leaves them in float32, and the backward pass,
    which runs without it, has to compute the same scores.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)
    return _CausalAttention.apply(query, key, value, document_ids, reach)


def exp_(x: torch.Tensor) -> torch.Tensor:
    """exp of a fresh float32 tensor, in its place; 0 below LEAST."""
    if x.device.type != "cpu":
        return x.exp_()
    # MKL takes ten times as long over what underflows, as masked scores do: 8.1 against 0.8 ms for 4 x 3 x 256 x 512.
    return torch.nn.functional.threshold_(x.clamp_(min=LEAST).exp_(), 1.01 * math.exp(LEAST), 0.0)


def softmax(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax [.., S] and logsumexp [..] over the last dimension, from one exponential."""
    largest = scores.amax(-1, keepdim=True)
    weights = exp_(scores - largest)
    total = weights.sum(-1, keepdim=True)
    return weights.mul_(1 / total), (largest + total.log())[..., 0]


def merge_own_rows(
    query: torch.Tensor,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
) -> torch.Tensor:
    """Let each row see, beside its causal part, its own keys of the TTT steps 1..k: one softmax over all of them.

    query, output [G, R, kv_heads, group, D]; logsumexp [G, R, kv_heads, group] float32, as `causal_attention` gives
    them; each key and value [G, R, kv_heads, D]. Returns [G, R, kv_heads, group, D].
    """
    own = torch.stack([torch.einsum("brkgd,brkd->brkg", query, key).float() for key in keys], dim=-1)
    weights = torch.cat([logsumexp[..., None], own], dim=-1).softmax(-1).to(output.dtype)  # [G, R, kv, group, 1 + k]
    merged = weights[..., :1] * output
    for step, value in enumerate(values, 1):
        merged = merged + weights[..., step, None] * value[:, :, :, None, :]
    return merged


class _CausalAttention(torch.autograd.Function):
    # einsum, not `q @ k.transpose`: that makes the TPU partitioner gather query, key and value over tp.

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        document_ids: torch.Tensor,
        reach: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        outputs, logsumexps = [], []
        for scores, _, seen in _blocks(query, key, document_ids, reach):
            weights, logsumexp = softmax(scores)
            outputs.append(torch.einsum("bkgts,bskd->btkgd", weights.to(value.dtype), value[:, seen]))
            logsumexps.append(logsumexp.permute(0, 3, 1, 2))  # [B, block, kv, group]
        output, logsumexp = torch.cat(outputs, 1), torch.cat(logsumexps, 1)
        ctx.save_for_backward(query, key, value, document_ids, output, logsumexp)
        ctx.reach = reach
        return output, logsumexp

    @staticmethod
    def backward(
        ctx: Any, d_output: torch.Tensor, d_logsumexp: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        query, key, value, document_ids, output, logsumexp = ctx.saved_tensors
        # d score = weight * (d weight - sum(weight * d weight) + d logsumexp), and that sum is output * d output.
        shared = d_logsumexp - (d_output * output).float().sum(-1)  # [B, T, kv, group]
        d_output = d_output.to(value.dtype)
        query = after(query, d_output)  # else XLA keeps the weights of the forward pass instead of making them again
        d_query, d_key, d_value = [], torch.zeros_like(key), torch.zeros_like(value)
        for scores, block, seen in _blocks(query, key, document_ids, ctx.reach):
            weights = exp_(scores - logsumexp[:, block].permute(0, 2, 3, 1)[..., None])
            d_weights = torch.einsum("btkgd,bskd->bkgts", d_output[:, block], value[:, seen]).float()
            d_scores = (weights * (d_weights + shared[:, block].permute(0, 2, 3, 1)[..., None])).to(query.dtype)
            d_query.append(torch.einsum("bkgts,bskd->btkgd", d_scores, key[:, seen]))
            d_key[:, seen] += torch.einsum("bkgts,btkgd->bskd", d_scores, query[:, block])
            d_value[:, seen] += torch.einsum("bkgts,btkgd->bskd", weights.to(value.dtype), d_output[:, block])
        return torch.cat(d_query, 1), d_key, d_value, None, None


def _blocks(
    query: torch.Tensor, key: torch.Tensor, document_ids: torch.Tensor, reach: int | None
) -> Iterator[tuple[torch.Tensor, slice, slice]]:
    """(masked scores [B, kv, group, block, seen] float32, rows of the block, rows that it may see) of all blocks."""
    length = query.shape[1]
    position = torch.arange(length, device=query.device)
    for start in range(0, length, block_length(length)):
        block = slice(start, min(start + block_length(length), length))
        seen = slice(max(0, start - reach + 1) if reach else 0, block.stop)
        distance = position[block, None] - position[None, seen]
        visible = (distance >= 0) & (document_ids[:, block, None] == document_ids[:, None, seen])  # [B, block, seen]
        if reach:
            visible = visible & (distance < reach)
        scores = torch.einsum("btkgd,bskd->bkgts", query[:, block], key[:, seen]).float()
        yield scores.masked_fill(~visible[:, None, None], torch.finfo(torch.float32).min), block, seen
