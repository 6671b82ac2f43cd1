"""The attention of training-time test (TTT), EAGLE-3 paper section 3.2: a causal part and one key per later step."""

import torch


def ttt_attention(
    query: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], mask: torch.Tensor
) -> torch.Tensor:
    """Attention of TTT step k = len(keys) - 1.

    The keys of step 0 are seen causally (`mask` [B, 1, T, T] bool: document and causality); the keys of steps 1..k
    only from their own row t, where they stand at position t + step. One softmax over all of them, in float32.

    query [B, T, heads, D]; each key and value [B, T, kv_heads, D]; returns [B, T, heads, D].
    """
    batch, length, heads, head_dim = query.shape
    kv_heads = keys[0].shape[2]
    # Grouped heads by einsum: a batched `q @ k.transpose` makes the TPU partitioner gather q, k and v over tp.
    query = query.view(batch, length, kv_heads, heads // kv_heads, head_dim) * head_dim**-0.5
    causal = torch.einsum("btkgd,bskd->bkgts", query, keys[0]).float()
    causal = causal.masked_fill(~mask[:, :, None], torch.finfo(torch.float32).min)
    own_row = [torch.einsum("btkgd,btkd->bkgt", query, key).float()[..., None] for key in keys[1:]]
    weights = torch.cat([causal, *own_row], dim=-1).softmax(-1).to(query.dtype)  # [B, kv, group, T, T + k]
    output = torch.einsum("bkgts,bskd->btkgd", weights[..., :length], values[0])
    for step, value in enumerate(values[1:]):
        own = weights[..., length + step].permute(0, 3, 1, 2)[..., None]  # [B, T, kv, group, 1]
        output = output + own * value[:, :, :, None, :]
    return output.reshape(batch, length, heads, head_dim)
