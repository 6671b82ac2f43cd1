"""The TTT unroll (EAGLE-3 paper, section 3.2; SpecForge's algorithms/eagle3) and its alignment.

At row t, step k: the hidden state g_t (step 0: fc of the aux states; later: the head's own, not detached, pre-norm),
the embedding of token x_{t+1+k}, the teacher p(. | x_{<=t+1+k}), RoPE position t + k. The row predicts x_{t+2+k}.
"""

from collections.abc import Callable, Iterable
from itertools import accumulate
from operator import and_
from typing import NamedTuple

import torch

from eagle3_xla.draft.attention import causal_attention
from eagle3_xla.draft.model import Eagle3Head
from eagle3_xla.loss.config import LossConfig
from eagle3_xla.loss.metrics import AcceptanceSums, decoding_rows
from eagle3_xla.loss.objectives import StepRows, unroll_loss
from eagle3_xla.loss.rows import Rows, shift_left, shift_right
from eagle3_xla.target.gather import gather
from eagle3_xla.target.model import Teacher
from eagle3_xla.target.order import after


class UnrollResult(NamedTuple):
    """loss: scalar with gradient; step_losses [K]: unweighted, detached; sums: acceptance sums, detached."""

    loss: torch.Tensor
    step_losses: torch.Tensor
    sums: AcceptanceSums


def unroll(
    head: Eagle3Head,
    embed_tokens: Callable[[torch.Tensor], torch.Tensor],
    batch: dict[str, torch.Tensor],
    aux: torch.Tensor,
    teacher: Teacher,
    t2d: torch.Tensor,
    d2t: torch.Tensor,
    config: LossConfig,
    remat: Callable[..., tuple[torch.Tensor, ...]] | None = None,
    groups: int | None = None,
    decoding: bool = False,
) -> UnrollResult:
    """Unroll the head `config.ttt_length` steps over packed rows.

    batch: input_ids, position_ids, document_ids [B, T] int, loss_mask [B, T] bool (token t was written by the
    assistant), unless all rows count `rows` and `slots` (loss/rows.py), and, unless every step is unrolled at all of
    them, `anchors` and `anchor_slots`, which list some of those likewise; aux [B, T, 3H]: the target's states at
    every row; teacher [G, R, ...]: its distributions at the position after each listed row (`teacher_positions`);
    t2d [V] bool, d2t [D]. remat(function, *tensors): the caller's rematerialisation of one step; given, the steps
    begin after the target's last logits, and the loss too is made one step after the other. groups: G, how many
    devices share the batch (default: B). decoding: the chain's sums are of the rows at which decoding would draft, not
    of every one at which it could; not with anchors.
    """
    input_ids, position_ids, loss_mask = batch["input_ids"], batch["position_ids"], batch["loss_mask"]
    rows, anchors = rows_of(batch, groups), None
    if "anchors" in batch:
        anchors = Rows(len(batch["anchors"]), batch["anchors"], batch["anchor_slots"])
    rows_at = [rows] + [rows.at(anchors) if anchors else rows] * (config.ttt_length - 1)  # of each step

    def from_list(x: torch.Tensor, k: int) -> torch.Tensor:
        """x [G, R, ...] at the rows of `teacher` -> as step k needs it, k rows further on."""
        if anchors is None or anchors.index is None or k == 0:
            return shift_left(x, k)
        return gather(x, (anchors.index + k).clamp(max=x.shape[1] - 1))

    features = head.features(aux)
    embedded = head.embedded(embed_tokens(input_ids).to(aux.dtype))
    key0, value0 = head.context([shift_left(x, 1) for x in embedded], features, position_ids)

    def step_function(k: int) -> Callable[..., tuple[torch.Tensor, ...]]:
        def step(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            hidden: torch.Tensor,
            key0: torch.Tensor,
            value0: torch.Tensor,
            *own: torch.Tensor,
        ) -> tuple[torch.Tensor, ...]:
            def attend_context(query: torch.Tensor) -> Iterable[torch.Tensor]:
                query = rows_at[k].put(query, len(input_ids))
                reach = head.window and head.window - k  # row t is at position t + k
                return map(rows_at[k].take, causal_attention(query, key0, value0, batch["document_ids"], reach))

            embedded, keys, values = (query, key, value), own[: len(own) // 2], own[len(own) // 2 :]
            positions = rows_at[k].take(position_ids) + k
            return head.ttt_step(k, embedded, hidden, positions, attend_context, keys, values)

        return step

    hidden = rows.take(features)
    normed: list[torch.Tensor] = []
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    if remat:  # no step before the target has its last logits
        hidden = after(hidden, teacher.logsumexp[:, -1:, None])
    for k in range(config.ttt_length):
        if anchors and k == 1:
            hidden = anchors.take(hidden)
        shares = [rows_at[k].take(shift_left(x, 1 + k)) for x in embedded]
        tensors = (*shares, hidden, key0, value0, *keys, *values)
        hidden, key, value = remat(step_function(k), *tensors) if remat else step_function(k)(*tensors)
        normed.append(head.norm(hidden))
        hidden = head.fed_back(hidden, normed[-1])
        if k > 0:
            keys.append(key)
            values.append(value)

    # The target's greedy choice is reachable only when the draft vocabulary holds it.
    reachable = t2d[teacher.argmax]
    own_row = torch.arange(len(input_ids), device=input_ids.device)[:, None] * input_ids.shape[1]
    sequences = batch["document_ids"] + own_row  # another number for each
    steps: list[StepRows] = []
    drafting: list[torch.Tensor] = []  # [B, T] of each step
    for k in range(config.ttt_length):
        if config.rows == "serving":  # drafting starts once x_{t+1} is the answer's; x_{t+2+k} is it too
            before = drafting[-1] if k else shift_left(loss_mask, 1)
            drafting.append(before & shift_left(loss_mask, 2 + k))
        else:
            drafting.append(shift_left(loss_mask, k))
        drafted = rows_at[k].take(drafting[k])
        trained = drafted & from_list(reachable, k)
        weights = trained.float()
        if config.mean_over == "sequences":
            weights = weights / _in_same_sequence(rows_at[k].take(sequences), weights)
        denominator = float(input_ids.numel()) if config.mean_over == "all" else weights.sum().clamp_min(1.0)
        steps.append(StepRows(drafted, weights, denominator))
    loss, step_losses, choices = unroll_loss(
        config, teacher, steps, head.lm_head.weight, normed, remat is not None, anchors and anchors.index
    )

    with torch.no_grad():
        hits = [
            (choice + d2t[choice] == from_list(teacher.argmax, k)) & steps[k].drafted
            for k, choice in enumerate(choices)
        ]
        sums, chain = [], torch.ones_like(steps[0].drafted)
        if decoding:
            assert anchors is None
            accepted = torch.stack([*accumulate(hits, and_)]).int().sum(0)
            first = rows.take(drafting[0] & ~shift_right(drafting[0], 1))
            chain = decoding_rows(accepted, steps[0].drafted, first, config.ttt_length)
        for k, hit in enumerate(hits):
            drafted = steps[k].drafted
            if anchors and k == 1:
                chain = anchors.take(chain)
            in_chain = chain & drafted
            chain = in_chain & hit
            sums.append([x.float().sum() for x in (drafted, hit, in_chain, chain)])
        stacked = [torch.stack(column) for column in zip(*sums)]
    return UnrollResult(loss, step_losses, AcceptanceSums(*stacked))


def _in_same_sequence(sequences: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """For each row the sum of weights over its sequence's rows, at least 1; both [G, R]."""
    same = sequences[:, :, None] == sequences[:, None, :]
    return torch.where(same, weights[:, None, :], 0.0).sum(-1).clamp_min(1.0)


def rows_of(batch: dict[str, torch.Tensor], groups: int | None = None) -> Rows:
    """The rows of a batch that are computed: those it lists, or all."""
    if "rows" in batch:
        return Rows(len(batch["rows"]), batch["rows"], batch["slots"])
    return Rows(groups or len(batch["input_ids"]))


def teacher_positions(batch: dict[str, torch.Tensor], x: torch.Tensor, groups: int | None = None) -> torch.Tensor:
    """x [B, T, ...], of every position -> [G, R, ...], of the position t + 1 after each listed row t.

    The teacher of step k is k further on. Listed rows that count at step k have their k followers listed next to
    them, because the answer goes on, so there `shift_left(.., k)` of the list is right.
    """
    return rows_of(batch, groups).take(shift_left(x, 1))
