"""The TTT unroll (EAGLE-3 paper, section 3.2; SpecForge's algorithms/eagle3) and its alignment.

At row t, step k: the hidden state g_t (step 0: fc of the aux states; later: the head's own, pre-norm, not detached),
the embedding of token x_{t+1+k}, the teacher p(. | x_{<=t+1+k}), RoPE position t + k. The row predicts x_{t+2+k}.
"""

from typing import NamedTuple

import torch

from eagle3_xla.config import LossConfig
from eagle3_xla.draft.model import Eagle3Head
from eagle3_xla.loss.metrics import AcceptanceSums
from eagle3_xla.loss.objectives import acceptance_rate, cross_entropy, step_loss
from eagle3_xla.target.model import Teacher, document_mask


class UnrollResult(NamedTuple):
    """loss: scalar with gradient; step_losses [K]: unweighted, detached; sums: acceptance sums, detached."""

    loss: torch.Tensor
    step_losses: torch.Tensor
    sums: AcceptanceSums


def shift_left(x: torch.Tensor, by: int) -> torch.Tensor:
    """x[:, t] -> x[:, t + by] along dim 1, zeros at the right: static shapes at every step."""
    if by == 0:
        return x
    return torch.cat([x[:, by:], torch.zeros_like(x[:, :by])], dim=1)


def unroll(
    head: Eagle3Head,
    embed_tokens,
    batch: dict[str, torch.Tensor],
    aux: torch.Tensor,
    teacher: Teacher,
    t2d: torch.Tensor,
    d2t: torch.Tensor,
    config: LossConfig,
) -> UnrollResult:
    """Unroll the head `config.ttt_length` steps over packed rows.

    batch: input_ids, position_ids, document_ids [B, T] int, loss_mask [B, T] bool (token t was written by the
    assistant); aux [B, T, 3H] and teacher: the target's states at every position, unshifted; t2d [V] bool, d2t [D].
    """
    input_ids, loss_mask = batch["input_ids"], batch["loss_mask"]
    mask = document_mask(batch["document_ids"])
    hidden = head.features(aux)
    # The target's greedy choice is reachable only when the draft vocabulary holds it.
    reachable = t2d[teacher.argmax]
    keys, values = [], []
    total, step_losses, sums = 0.0, [], []
    serving_rows = shift_left(loss_mask, 1)  # drafting starts once x_{t+1} is the answer's
    chain = torch.ones_like(loss_mask)
    for k in range(config.ttt_length):
        embeds = embed_tokens(shift_left(input_ids, 1 + k)).to(aux.dtype)
        hidden = head.ttt_step(embeds, hidden, batch["position_ids"] + k, keys, values, mask)
        logits = head.logits(hidden).float()  # [B, T, D]
        step_teacher = Teacher(*(shift_left(x, 1 + k) for x in teacher))
        if config.rows == "serving":
            serving_rows = serving_rows & shift_left(loss_mask, 2 + k)  # x_{t+2+k} is the answer's too
            rows = serving_rows
        else:
            rows = shift_left(loss_mask, k)
        trained = (rows & shift_left(reachable, 1 + k)).float()
        denominator = trained.numel() if config.mean_over == "all" else trained.sum().clamp_min(1.0)
        row_losses = cross_entropy(logits, step_teacher)
        with torch.set_grad_enabled(config.objective != "kl"):
            overlap = acceptance_rate(logits, step_teacher)
        loss = step_loss(config.objective, row_losses, overlap, trained, denominator)
        total = total + config.decay**k * loss
        with torch.no_grad():
            choice = logits.argmax(-1)
            hit = (choice + d2t[choice] == step_teacher.argmax) & rows
            in_chain = chain & rows
            chain = in_chain & hit
            step_losses.append(loss.detach())
            sums.append([x.float().sum() for x in (rows, hit, in_chain, chain, overlap.detach() * rows)])
    stacked = [torch.stack(column) for column in zip(*sums)]
    return UnrollResult(total, torch.stack(step_losses), AcceptanceSums(*stacked))
