"""The head before its first step.

`target`: random, but lm_head and final norm are the target's. `least_squares`: on top of that, fc and the attention's
value path solve in closed form, for the target's final hidden state at t+1 from what row t sees (its aux states and
the embedding of token t+1). `launch/quickstart.sh` prints what that start alone is worth: acceptance length 1.31.
"""

import torch
from torch import nn

from eagle3_xla.draft.model import Eagle3Head

RIDGE = 1e-3  # relative to each input's own second moment


class InputMoments:
    """Second moments of what a row sees and what it should say, accumulated batch by batch on the host.

    x: [aux_t (3H), RMS-normed embedding of x_{t+1} (H)]; y: the target's RMS-normed final hidden state at t+1 (H).
    """

    def __init__(self, hidden_size: int):
        self.hidden_size = hidden_size
        self.xx = torch.zeros(4 * hidden_size, 4 * hidden_size, dtype=torch.float64)
        self.xy = torch.zeros(4 * hidden_size, hidden_size, dtype=torch.float64)
        self.rows = 0

    def add(
        self,
        aux: torch.Tensor,
        embeds: torch.Tensor,
        hidden: torch.Tensor,
        norm_weight: torch.Tensor,
        loss_mask: torch.Tensor,
    ) -> None:
        """aux [B, T, 3H], embeds [B, T, H], hidden [B, T, H] after the final norm, whose scale is norm_weight [H];
        loss_mask [B, T] bool. Only rows that an engine drafts at count.
        """
        rows = loss_mask[:, 1:-1] & loss_mask[:, 2:]
        embeds = embeds[:, 1:-1][rows].float()
        embeds = embeds * torch.rsqrt(embeds.square().mean(-1, keepdim=True) + 1e-6)
        x = torch.cat([aux[:, :-2][rows].float(), embeds], dim=-1)
        unscale = torch.where(norm_weight.abs() > 1e-3, 1 / norm_weight, 0.0)  # a channel scaled away can't be known
        self.xx += (x.T @ x).double()
        self.xy += (x.T @ (hidden[:, 1:-1][rows].float() * unscale)).double()
        self.rows += len(x)

    def aux_rms(self) -> torch.Tensor:
        """Root mean square of each aux channel, [3H]."""
        return (self.xx.diagonal()[: 3 * self.hidden_size] / max(self.rows, 1)).sqrt().float()


def initialise_head(
    head: Eagle3Head, how: str, seed: int, lm_head_rows: torch.Tensor, norm_weight: torch.Tensor, moments: InputMoments
) -> None:
    """Fill the head's weights in place. lm_head_rows [D, H]: the target's rows of the draft vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in head.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=0.02, generator=generator)
        # fc's inputs have very different scales (a few channels of the residual stream are huge): equal shares.
        head.fc.weight /= moments.aux_rms().clamp_min(1e-3)
        if how == "random":
            return
        head.lm_head.weight.copy_(lm_head_rows)
        head.norm.weight.copy_(norm_weight)
        if how == "least_squares":
            _least_squares(head, moments, generator)


def _least_squares(head: Eagle3Head, moments: InputMoments, generator: torch.Generator) -> None:
    size, config = head.config.hidden_size, head.config
    ridge = RIDGE * moments.xx.diagonal() + 1e-6 * max(moments.rows, 1)
    solution = torch.linalg.solve(moments.xx + torch.diag(ridge), moments.xy)  # [4H, H]
    head.fc.weight.copy_(solution[: 3 * size].T)

    # The embedding's part goes through the attention: value projection and o_proj, a factorisation of rank kv_dim.
    of_embedding = solution[3 * size :]  # [H, H]
    covariance = of_embedding.T @ moments.xx[3 * size :, 3 * size :] @ of_embedding
    attention = head.midlayer.self_attn
    kv_dim = attention.v_proj.out_features
    basis = torch.linalg.eigh(covariance).eigenvectors[:, -kv_dim:].flip(1)  # [H, rank], strongest first
    rank = basis.shape[1]
    attention.v_proj.weight.zero_()
    attention.v_proj.weight[:rank, :size] = (of_embedding @ basis).T.float()
    group = config.num_attention_heads // config.num_key_value_heads
    attention.o_proj.weight.mul_(0.1)
    out_of_value = torch.zeros(size, kv_dim)
    out_of_value[:, :rank] = basis.float()
    per_head = out_of_value.view(size, config.num_key_value_heads, 1, config.head_dim).expand(-1, -1, group, -1)
    attention.o_proj.weight += per_head.reshape(size, -1) / group

    # Every head looks at its own row: query and key are the same random projection of the embedding.
    key = torch.randn(config.num_key_value_heads, config.head_dim, size, generator=generator) / size**0.5
    attention.k_proj.weight.zero_()
    attention.k_proj.weight[:, :size] = key.flatten(0, 1)
    attention.q_proj.weight.zero_()
    attention.q_proj.weight[:, :size] = key[:, None].expand(-1, group, -1, -1).flatten(0, 2)
    head.midlayer.mlp.down_proj.weight.mul_(0.1)
