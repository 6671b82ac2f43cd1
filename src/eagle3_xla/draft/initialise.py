"""The head before its first step.

`target`: random, but lm_head and final norm are the target's. `least_squares`: on top of that, the layer solves in
closed form, over the target's states of a sample of rows, for the target's final hidden state at the next token:

1. fc: the state from which the next token's embedding leads, by a linear map, to the target's at t+1, near the
   target's at t, so that a step which begins from aux states and one which begins from the head's own find the same.
2. Query and key: of the attention heads that share a key the first looks at its own row, and the next two look for
   rows before it that went on as this one does: whose state is what the embedding and the state at t let expect of the
   state at t+1. What followed there likely follows here.
3. Value and o_proj: what counts most of an embedding and a state, the own row's and the matching ones', and how it
   adds to the state; first where it begins from aux states, then where it begins from the head's own.
4. The MLP: random features of what the attention leaves, and the sum of them that is nearest to what is missing.

benchmarks/README.md says what this start is worth.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from eagle3_xla.draft.attention import causal_attention, merge_own_rows
from eagle3_xla.draft.model import Eagle3Head

RIDGE = 5e-2  # relative to each input's own second moment
NEAR = 0.3  # weight of the nearness to the target's state at t
STEPS = 3  # of the unroll that the start is fitted to
DECAY = 0.8  # step k weighs DECAY**k
GATE, UP = 2.0, 0.5  # standard deviations of the random features' gate and factor
SLOW = 64  # rows, over which a pair of RoPE's components that hardly tells places apart turns by less than a radian
OWN_SCORE = 12.0  # of a row's own key for the heads that look for it; those of other tokens are around 0
# Of the attention heads that share a key, in turns: what a matching row scores, 0: it looks at its own row.
SHARPNESS = (0.0, 40.0, 12.0)
SUREST = 0.98  # a canonical correlation counts as this at most


class SampledRows(NamedTuple):
    """What the start is fitted to, a batch of rows on the host.

    aux [B, T, 3H]: as fc reads them; embeds [B, T, H]; hidden [B, T, H]: the target's, after its final norm, divided by
    that norm's scale; loss_mask [B, T] bool; document_ids, position_ids [B, T] int.
    """

    aux: torch.Tensor
    embeds: torch.Tensor
    hidden: torch.Tensor
    loss_mask: torch.Tensor
    document_ids: torch.Tensor
    position_ids: torch.Tensor

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
    return torch.linalg.solve(_ridged(xx), xy)


def _ridged(xx: torch.Tensor) -> torch.Tensor:
    return xx + torch.diag(RIDGE * xx.diagonal() + 1e-9 * xx.diagonal().mean() + 1e-30)


def _least_squares(head: Eagle3Head, sample: list[SampledRows], generator: torch.Generator) -> None:
    layer, size = head.midlayer, head.config.hidden_size
    attention, mlp = layer.self_attn, layer.mlp
    _set_fc(head, sample)
    _set_query_and_key(head, sample, generator)
    _set_value(head, sample)
    for steps in (1, STEPS):  # step 0 alone first: what it makes is fed to the others
        missing = _Moments(attention.o_proj.in_features, size)
        for step in _unrolled(head, sample, steps):
            missing.add(step.attended, step.wanted - step.state, step.weight)
        attention.o_proj.weight.copy_(_solve(missing.xx, missing.xy).T)

    mlp.gate_proj.weight.normal_(std=GATE / size**0.5, generator=generator)
    mlp.up_proj.weight.normal_(std=UP / size**0.5, generator=generator)
    missing = _Moments(mlp.down_proj.in_features, size)
    for step in _unrolled(head, sample, STEPS):
        x = layer.post_attention_layernorm(step.output)
        missing.add(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), step.wanted - step.output, step.weight)
    mlp.down_proj.weight.copy_(_solve(missing.xx, missing.xy).T)


def _set_fc(head: Eagle3Head, sample: list[SampledRows]) -> None:
    layer, size = head.midlayer, head.config.hidden_size
    aux, embeds, both = slice(3 * size), slice(3 * size, 4 * size), slice(3 * size, 5 * size)
    seen = _Moments(5 * size, 2 * size)
    for batch in sample:
        rows = batch.drafted()
        state = head.fed_back(batch.hidden[:, :-2][rows].float())
        embedded = layer.input_layernorm(batch.embeds[:, 1:-1][rows].float())
        x = [batch.aux[:, :-2][rows].float(), embedded, layer.hidden_norm(state)]
        seen.add(torch.cat(x, -1), torch.cat([state, batch.hidden[:, 1:-1][rows].float()], -1))
    of_state, of_next = seen.xy[both].split(size, dim=1)  # the target's own share of its next state is there already
    of_embeds, of_state = _solve(seen.xx[both, both], of_next - of_state).split(size)

    # state = aux @ fc makes |state @ onward - what the embedding leaves|^2 + NEAR |state - the target's|^2 the least.
    wanted = seen.xy[aux, size:] - seen.xx[aux, embeds] @ of_embeds
    near, left = _solve(seen.xx[aux, aux], torch.cat([seen.xy[aux, :size], wanted], dim=1)).split(size, dim=1)
    onward = torch.eye(size, dtype=torch.float64) + of_state
    normal = onward @ onward.T + NEAR * torch.eye(size, dtype=torch.float64)
    head.fc.weight.copy_(torch.linalg.solve(normal, (left @ onward.T + NEAR * near).T))


def _set_query_and_key(head: Eagle3Head, sample: list[SampledRows], generator: torch.Generator) -> None:
    config, size, width = head.config, head.config.hidden_size, head.config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    # RoPE's fast components find the own row, by a random projection of its embedding. Matching rows may be anywhere,
    # and are found by the slow ones: by the surest directions where it turns the least.
    fast = int((head.rotary.inv_freq > 1 / SLOW).sum())
    own = [i for i in range(width) if i % (width // 2) < fast]
    slow = [i for pair in reversed(range(fast, width // 2)) for i in (pair, pair + width // 2)]
    of_query, of_key = _matching(head, sample, len(slow))
    match = slow[: of_key.shape[1]]
    of_query *= width**0.5  # attention divides by it
    even = (SHARPNESS[1] * of_query.norm() / of_key.norm()) ** 0.5  # both of one size, so that both learn

    query = torch.zeros(kv_heads, heads // kv_heads, width, 2 * size)
    key = torch.zeros(kv_heads, width, 2 * size)
    scale = (OWN_SCORE * width**0.5 / len(own) / size) ** 0.5
    key[:, own, :size] = scale * torch.randn(kv_heads, len(own), size, generator=generator)
    key[:, match, size:] = (of_key * even).T.float()
    for i in range(heads):
        kv_head, member = divmod(i, heads // kv_heads)
        sharpness = SHARPNESS[member % len(SHARPNESS)]
        query[kv_head, member, match] = (of_query * sharpness / even).T.float()
        if not sharpness:
            query[kv_head, member, own] = key[kv_head, own]
    head.midlayer.self_attn.q_proj.weight.copy_(query.flatten(0, 2))
    head.midlayer.self_attn.k_proj.weight.copy_(key.flatten(0, 1))


def _matching(head: Eagle3Head, sample: list[SampledRows], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How well one row's state is what another's next state will be, as a product: its factors by what a row has,
    embedding and state [2H, rank], and by the state of the other [H, rank].

    Of two Gaussians of canonical correlations c it is the log-likelihood ratio's product, c / (1 - c^2) of each pair of
    canonical variates. Nothing else in it depends on both; means are taken off through what is nearest to a constant.
    """
    layer, size = head.midlayer, head.config.hidden_size
    has, state = slice(2 * size), slice(2 * size, 3 * size)
    seen = _Moments(3 * size + 1, 0)
    for batch in sample:
        rows = batch.drafted()
        states = layer.hidden_norm(head.fc(batch.aux[:, :-1].float()))
        embedded = layer.input_layernorm(batch.embeds[:, 1:-1][rows].float())
        x = [embedded, states[:, :-1][rows], states[:, 1:][rows], torch.ones(len(embedded), 1)]
        seen.add(torch.cat(x, -1), embedded[:, :0])
    seen.xx /= seen.xx[-1, -1].clamp_min(1)
    mean, moments = seen.xx[:-1, -1], seen.xx[:-1, :-1]
    covariance = moments - mean[:, None] * mean
    roots = [torch.linalg.cholesky(_ridged(covariance[x, x])) for x in (has, state)]
    between = torch.linalg.solve_triangular(roots[0], covariance[has, state], upper=False)
    between = torch.linalg.solve_triangular(roots[1].T, between, upper=True, left=False)
    left, correlations, right = torch.linalg.svd(between, full_matrices=False)
    weight = (correlations / (1 - correlations.clamp(max=SUREST) ** 2))[:rank]
    weight = (weight / (weight @ correlations[:rank] + 1e-30)).sqrt()  # a row's own next state scores 1 on average
    factors = []
    for of, root, directions in ((has, roots[0], left), (state, roots[1], right.T)):
        factor = torch.linalg.solve_triangular(root.T, directions[:, :rank] * weight, upper=True)
        constant = _solve(moments[of, of], mean[of, None])
        factors.append(factor - constant * (mean[of] @ factor))
    return factors[0], factors[1]


def _set_value(head: Eagle3Head, sample: list[SampledRows]) -> None:
    layer, attention, config = head.midlayer, head.midlayer.self_attn, head.config
    size, kv_heads = config.hidden_size, config.num_key_value_heads
    looks = 1 % (config.num_attention_heads // kv_heads)  # a head that looks for matching rows, where there are any
    seen = _Moments(4 * size, size)
    for batch in sample:
        rows, documents, positions = batch.drafted(), batch.document_ids[:, :-2], batch.position_ids[:, :-2]
        state, embeds = head.fc(batch.aux[:, :-2].float()), batch.embeds[:, 1:-1].float()
        has = torch.cat([layer.input_layernorm(embeds), layer.hidden_norm(state)], -1)
        rope = head.rotary(state, positions)
        query, key, _ = attention.project(head.embedded(embeds), layer.hidden_norm(state), rope)
        query = query.unflatten(2, (kv_heads, -1))[:, :, :1, looks, None] * config.head_dim**-0.5
        matched, _ = causal_attention(query, key[:, :, :1], has[:, :, None], documents, head.window)
        x = torch.cat([has, matched[:, :, 0, 0]], -1)[rows]
        seen.add(x, batch.hidden[:, 1:-1][rows].float() - state[rows])
    maps = torch.cat(_solve(seen.xx, seen.xy).split(2 * size), dim=1)  # of what a row has: the own's, the others'
    of_one = seen.xx[: 2 * size, : 2 * size]
    basis = torch.linalg.eigh(maps.T @ of_one @ maps).eigenvectors[:, -attention.v_proj.out_features :].flip(1)
    value = maps @ basis  # the strongest first
    mean_square = (value * (of_one @ value)).sum(0) / (of_one.trace() / len(of_one))
    rms = mean_square.clamp(min=0).sqrt()
    value = value / (rms + 1e-9 * rms.max() + 1e-30)
    rows = attention.v_proj.weight.clone()
    rows[: value.shape[1]] = value.T.float()  # values beyond all directions of what a row has stay random
    dealt = rows.unflatten(0, (-1, kv_heads)).transpose(0, 1)  # in turns, so that all have strong ones
    attention.v_proj.weight.copy_(dealt.flatten(0, 1))


class _Step(NamedTuple):
    """One TTT step at the rows that count there, [n, ..] each: the state fed in, what o_proj gets, what the attention
    leaves, and the target's state; weight: of the step.
    """

    state: torch.Tensor
    attended: torch.Tensor
    output: torch.Tensor
    wanted: torch.Tensor
    weight: float


def _unrolled(head: Eagle3Head, sample: list[SampledRows], steps: int) -> Iterator[_Step]:
    """The head's own unroll over the sample, without its MLP."""
    layer, attention = head.midlayer, head.midlayer.self_attn
    for batch in sample:
        length = batch.loss_mask.shape[1] - 1 - steps
        documents, positions = batch.document_ids[:, :length], batch.position_ids[:, :length]
        state, counts = head.fc(batch.aux[:, :length].float()), batch.loss_mask[:, 1 : 1 + length]
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        for k in range(steps):
            counts = counts & batch.loss_mask[:, 2 + k : 2 + k + length]
            embedded = head.embedded(batch.embeds[:, 1 + k : 1 + k + length].float())
            rope = head.rotary(state, positions + k)
            query, key, value = attention.project(embedded, layer.hidden_norm(state), rope)
            query = query.unflatten(2, (key.shape[2], -1)) * attention.head_dim**-0.5
            keys.append(key)
            values.append(value)
            reach = head.window and head.window - k
            attended, logsumexp = causal_attention(query, keys[0], values[0], documents, reach)
            if k > 0:
                attended = merge_own_rows(query, attended, logsumexp, keys[1:], values[1:])
            attended = attended.flatten(2)
            output = state + attention.o_proj(attended)
            wanted = batch.hidden[:, 1 + k : 1 + k + length].float()
            yield _Step(state[counts], attended[counts], output[counts], wanted[counts], DECAY**k)
            state = head.fed_back(output)
