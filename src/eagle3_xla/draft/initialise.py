"""The head before its first step.

`target`: random, but lm_head and final norm are the target's. `least_squares`: on top of that, the layer solves in
closed form, at every step of an unroll, for the target's final hidden state at the next token:

1. The attention's value path: what the next token's embedding and the state at t add to that state, a regression of
   the rank that the values have. First from the target's own states, then from those that the head makes itself and
   is fed when it drafts.
2. fc: the state from which that path says the target's at t+1, near the target's at t, so that a step which begins
   from aux states and one which begins from the head's own state find the same.
3. The MLP: random features of what the attention leaves, and the sum of them that is nearest to what is missing.

benchmarks/README.md says what this start is worth.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from eagle3_xla.draft.model import Eagle3Head

RIDGE = 1e-2  # relative to each input's own second moment
NEAR = 0.3  # weight of the nearness to the target's state at t
STEPS = 3  # of the unroll that the start is fitted to
DECAY = 0.8  # step k weighs DECAY**k
GATE, UP = 2.0, 0.5  # standard deviations of the random features' gate and factor


class SampledRows(NamedTuple):
    """What the start is fitted to, a batch of rows on the host.

    aux [B, T, 3H]: as fc reads them; embeds [B, T, H]; hidden [B, T, H]: the target's, after its final norm, divided by
    that norm's scale; loss_mask [B, T] bool.
    """

    aux: torch.Tensor
    embeds: torch.Tensor
    hidden: torch.Tensor
    loss_mask: torch.Tensor

    def drafted(self) -> torch.Tensor:
        """[B, T - 2] bool: the rows that an engine drafts at."""
        return self.loss_mask[:, 1:-1] & self.loss_mask[:, 2:]


def unscaled(hidden: torch.Tensor, norm_weight: torch.Tensor) -> torch.Tensor:
    """hidden [.., H] after a norm of scale norm_weight [H] -> before that scale, 0 where a channel was scaled away."""
    return hidden * torch.where(norm_weight.abs() > 1e-3, 1 / norm_weight, 0.0)


def aux_rms(sample: list[SampledRows]) -> torch.Tensor:
    """Root mean square of each aux channel over the rows that an engine drafts at, [3H]."""
    rows = [batch.aux[:, :-2][batch.drafted()].float() for batch in sample]
    return (sum(x.square().sum(0) for x in rows) / max(sum(map(len, rows)), 1)).sqrt()


def initialise_head(
    head: Eagle3Head,
    how: str,
    seed: int,
    lm_head_rows: torch.Tensor,
    norm_weight: torch.Tensor,
    sample: list[SampledRows],
) -> None:
    """Fill the head's weights in place. lm_head_rows [D, H]: the target's rows of the draft vocabulary;
    norm_weight [H]: the scale of its final norm.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in head.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=0.02, generator=generator)
        # fc's inputs have very different scales (a few channels of the residual stream are huge): equal shares.
        head.fc.weight /= aux_rms(sample).clamp_min(1e-3)
        if how == "random":
            return
        head.lm_head.weight.copy_(lm_head_rows)
        head.norm.weight.copy_(norm_weight)
        if how == "least_squares":
            _least_squares(head, sample, generator)


class _Moments:
    """Second moments of inputs [.., n] among themselves and with outputs [.., m], on the host."""

    def __init__(self, inputs: int, outputs: int):
        self.xx = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.xy = torch.zeros(inputs, outputs, dtype=torch.float64)

    def add(self, x: torch.Tensor, y: torch.Tensor, weight: float = 1.0) -> None:
        self.xx += weight * (x.T @ x).double()
        self.xy += weight * (x.T @ y).double()


def _solve(xx: torch.Tensor, xy: torch.Tensor) -> torch.Tensor:
    """The map [n, m] from inputs to outputs, by their second moments xx [n, n] and xy [n, m]."""
    return torch.linalg.solve(xx + torch.diag(RIDGE * xx.diagonal() + 1e-9 * xx.diagonal().mean() + 1e-30), xy)


def _least_squares(head: Eagle3Head, sample: list[SampledRows], generator: torch.Generator) -> None:
    layer, config = head.midlayer, head.config
    attention, mlp, size = layer.self_attn, layer.mlp, config.hidden_size
    # Every attention head looks at its own row: query and key are the same random projection of the embedding.
    group = config.num_attention_heads // config.num_key_value_heads
    key = torch.randn(config.num_key_value_heads, config.head_dim, size, generator=generator) / size**0.5
    attention.k_proj.weight.zero_()
    attention.k_proj.weight[:, :size] = key.flatten(0, 1)
    attention.q_proj.weight.zero_()
    attention.q_proj.weight[:, :size] = key[:, None].expand(-1, group, -1, -1).flatten(0, 2)

    # The value path from the target's own states: their own share of the next state is there already.
    both, seen = slice(3 * size, 5 * size), _Moments(5 * size, 2 * size)
    for batch in sample:
        rows = batch.drafted()
        state = head.fed_back(batch.hidden[:, :-2][rows].float())
        embeds = layer.input_layernorm(batch.embeds[:, 1:-1][rows].float())
        x = [batch.aux[:, :-2][rows].float(), embeds, layer.hidden_norm(state)]
        seen.add(torch.cat(x, -1), torch.cat([state, batch.hidden[:, 1:-1][rows].float()], -1))
    of_state, of_next = seen.xy[both].split(size, dim=1)
    value = _low_rank(seen.xx[both, both], of_next - of_state, attention.k_proj.out_features)
    _set_fc_and_values(head, seen, *value)

    # And from the states that the head makes: what it is fed when it drafts.
    unrolled = _Moments(2 * size, size)
    for step in _unrolled(head, sample):
        unrolled.add(torch.cat([step.embeds, layer.hidden_norm(step.state)], -1), step.wanted - step.state, step.weight)
    value = _low_rank(unrolled.xx, unrolled.xy, attention.k_proj.out_features)
    _set_fc_and_values(head, seen, *value)

    mlp.gate_proj.weight.normal_(std=GATE / size**0.5, generator=generator)
    mlp.up_proj.weight.normal_(std=UP / size**0.5, generator=generator)
    missing = _Moments(config.intermediate_size, size)
    for step in _unrolled(head, sample):
        x = layer.post_attention_layernorm(step.output)
        missing.add(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), step.wanted - step.output, step.weight)
    mlp.down_proj.weight.copy_(_solve(missing.xx, missing.xy).T)


def _low_rank(xx: torch.Tensor, xy: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Least squares of a rank: the map [n, rank] and the basis [m, rank] of its outputs, the strongest first."""
    solution = _solve(xx, xy)
    basis = torch.linalg.eigh(solution.T @ xx @ solution).eigenvectors[:, -rank:].flip(1)
    return solution @ basis, basis


def _set_fc_and_values(head: Eagle3Head, seen: _Moments, into: torch.Tensor, basis: torch.Tensor) -> None:
    """The value path [embedding, state] @ into @ basis.T, and the fc that goes with it."""
    config, size, attention = head.config, head.config.hidden_size, head.midlayer.self_attn
    rank, group = basis.shape[1], config.num_attention_heads // config.num_key_value_heads
    attention.v_proj.weight.zero_()
    attention.v_proj.weight[:rank] = into.T.float()
    out_of_value = torch.zeros(size, attention.v_proj.out_features)
    out_of_value[:, :rank] = basis.float()
    per_head = out_of_value.view(size, config.num_key_value_heads, 1, config.head_dim).expand(-1, -1, group, -1)
    attention.o_proj.weight.copy_(per_head.reshape(size, -1) / group)

    # state = aux @ fc makes |state @ onward - what the embedding leaves|^2 + NEAR |state - the target's|^2 the least.
    of_embeds, of_state = (into @ basis.T).split(size)
    aux, embeds = slice(3 * size), slice(3 * size, 4 * size)
    wanted = seen.xy[aux, size:] - seen.xx[aux, embeds] @ of_embeds
    near, left = _solve(seen.xx[aux, aux], torch.cat([seen.xy[aux, :size], wanted], dim=1)).split(size, dim=1)
    onward = torch.eye(size, dtype=torch.float64) + of_state
    normal = onward @ onward.T + NEAR * torch.eye(size, dtype=torch.float64)
    head.fc.weight.copy_(torch.linalg.solve(normal, (left @ onward.T + NEAR * near).T))


class _Step(NamedTuple):
    """One TTT step at the rows that count there, [n, H] each: the normed embeddings, the state fed in, what the
    attention leaves of it when every row sees itself alone, and the target's state; weight: of the step.
    """

    embeds: torch.Tensor
    state: torch.Tensor
    output: torch.Tensor
    wanted: torch.Tensor
    weight: float


def _unrolled(head: Eagle3Head, sample: list[SampledRows]) -> Iterator[_Step]:
    """The head's own unroll over the sample, without its MLP."""
    config, layer, attention = head.config, head.midlayer, head.midlayer.self_attn
    group = config.num_attention_heads // config.num_key_value_heads
    for batch in sample:
        length = batch.loss_mask.shape[1] - 1 - STEPS
        state = head.fc(batch.aux[:, :length].float())
        counts = batch.loss_mask[:, 1 : 1 + length]
        for k in range(STEPS):
            counts = counts & batch.loss_mask[:, 2 + k : 2 + k + length]
            embeds = layer.input_layernorm(batch.embeds[:, 1 + k : 1 + k + length].float())
            value = attention.v_proj(torch.cat([embeds, layer.hidden_norm(state)], -1))
            value = value.unflatten(-1, (-1, 1, config.head_dim)).expand(-1, -1, -1, group, -1).flatten(-3)
            output = state + attention.o_proj(value)
            wanted = batch.hidden[:, 1 + k : 1 + k + length][counts].float()
            yield _Step(embeds[counts], state[counts], output[counts], wanted, DECAY**k)
            state = head.fed_back(output)
