"""What is minimised, and its gradient at the draft logits, one TTT step after the other.

Losses of rows are [G, R]; which rows count, and what they are divided by, is the caller's (loss/unroll.py).
"""

from typing import Any, NamedTuple

import torch

from eagle3_xla.draft.attention import softmax
from eagle3_xla.loss.config import LossConfig, objective_terms
from eagle3_xla.loss.rows import shift_left, shift_right
from eagle3_xla.target.gather import gather
from eagle3_xla.target.model import Teacher
from eagle3_xla.target.order import after


class StepRows(NamedTuple):
    """Of one TTT step: drafted [G, R] bool, rows that an engine drafts at; trained [G, R] float32, the weight of a
    row in the loss, 0 where it doesn't count; denominator: of `kl` and `reverse_kl`, a scalar.
    """

    drafted: torch.Tensor
    trained: torch.Tensor
    denominator: torch.Tensor | float


class Statistics(NamedTuple):
    """What every objective is made of, [G, R] float32 each; p: the target's distribution, q: the head's.

    cross_entropies: -sum_v p(v) log q(v), p renormalised on the draft vocabulary; acceptance: sum_v min(p(v), q(v)),
    the chance that speculative sampling accepts the draft (Leviathan et al., 2023), where p is the target's real
    distribution: what lies outside the draft vocabulary is never accepted; reverse: sum_v q(v) log(q(v) / p(v)), p
    renormalised as well. The last two are zero where no objective asks for them.
    """

    cross_entropies: torch.Tensor
    acceptance: torch.Tensor
    reverse: torch.Tensor


def step_loss(
    terms: dict[str, float], statistics: Statistics, rows: torch.Tensor, denominator: torch.Tensor | float
) -> torch.Tensor:
    """Scalar loss of one TTT step: the weighted sum of objectives (objective_terms).

    rows [G, R] float32, the weights of the rows; denominator: of the sums of `kl` and `reverse_kl`. `tv` is the total
    variation distance of q and the target's real distribution, 1 less the acceptance, as a mean over the rows that
    count. The LK objectives are those of "LK losses" as SpecForge's core/lk_loss.py has them (kl_scale = kl_decay = 1):
    their acceptance is that mean too.
    """
    count = rows.sum().clamp_min(1e-8)
    kl = (statistics.cross_entropies * rows).sum() / denominator
    mean_acceptance = (statistics.acceptance * rows).sum() / count
    total = 0.0
    for objective, weight in terms.items():
        if objective == "kl":
            loss = kl
        elif objective == "reverse_kl":
            loss = (statistics.reverse * rows).sum() / denominator
        elif objective == "tv":
            loss = 1 - mean_acceptance
        elif objective == "lk_alpha":
            positive = statistics.acceptance > 0
            log_acceptance = torch.where(positive, torch.where(positive, statistics.acceptance, 1.0).log(), 0.0)
            loss = -(log_acceptance * rows).sum() / count
        else:
            assert objective == "lk_lambda"
            kl_weight = torch.exp(-mean_acceptance.detach())
            loss = kl_weight * kl + (1 - kl_weight) * (1 - mean_acceptance)
        total = total + weight * loss if weight != 1.0 else total + loss
    return total


def unroll_loss(
    config: LossConfig,
    teacher: Teacher,
    steps: list[StepRows],
    weight: torch.Tensor,
    normed: list[torch.Tensor],
    in_order: bool = False,
    anchors: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """sum_k decay**k * step_loss over all TTT steps.

    teacher [G, R, ...] at step 0's positions (step k's are k further on); weight [D, H]: lm_head; normed: K hidden
    states [G, R, H] after the final norm. Returns the loss with gradient, and detached: the unweighted step losses
    [K] and the head's choices [K] of [G, R] int64 (draft ids). in_order: each step's logits only after the step before
    has used its own (target/order.py), for the memory. anchors [G, N]: the rows at which all steps but the first are
    unrolled; R is then N in what belongs to these.
    """
    loss, step_losses, *choices = _UnrollLoss.apply(
        config, teacher, steps, torch.is_grad_enabled(), in_order, anchors, weight, *normed
    )
    return loss, step_losses, choices


class _UnrollLoss(torch.autograd.Function):
    """Logits and their gradient live for one step only: the gradients of `normed` and `weight` are made at once, so
    one [G, R, D] float32 tensor exists where plain autograd keeps several for each step."""

    @staticmethod
    def forward(
        ctx: Any,
        config: LossConfig,
        teacher: Teacher,
        steps: list[StepRows],
        with_gradient: bool,
        in_order: bool,
        anchors: torch.Tensor | None,
        weight: torch.Tensor,
        *normed: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        terms = objective_terms(config.objective)
        every_p, every_logsumexp = softmax(teacher.logits)  # [G, R, D] float32
        # p, its logits, their logsumexp over the draft vocabulary, and its share of the full one
        every = (every_p, teacher.logits, every_logsumexp, (every_logsumexp - teacher.logsumexp).exp())
        # One sum for each group until the end: the partitioner then reduces over dp once, not at every step.
        d_weight = torch.zeros(len(every_p), *weight.shape, dtype=torch.float32, device=weight.device)
        total, step_losses, choices, d_normed = 0.0, [], [], []
        before: list[torch.Tensor] = []  # with in_order: what step k - 1 computes from its logits
        for k, (hidden, rows) in enumerate(zip(normed, steps)):
            if anchors is None or k == 0:
                # The states go to their teachers, not the other way: no part of p is copied, every shape is the same.
                hidden, trained, back = shift_right(hidden, k), shift_right(rows.trained, k), k
                p, teacher_logits, logsumexp, in_vocabulary = every
            else:
                at, trained, back = (anchors + k).clamp(max=every_p.shape[1] - 1), rows.trained, 0
                p, teacher_logits, logsumexp, in_vocabulary = (gather(x, at) for x in every)
            hidden = after(hidden, *(x[:, : hidden.shape[1]] for x in before))
            logits = torch.einsum("grh,dh->grd", hidden, weight).float()
            q, log_norm = softmax(logits)
            with torch.set_grad_enabled(with_gradient):
                cross_entropies = (log_norm - (p * logits).sum(-1)).requires_grad_(with_gradient)
                acceptance, reverse = torch.zeros_like(log_norm), torch.zeros_like(log_norm)
                if terms.keys() & {"tv", "lk_alpha", "lk_lambda"}:
                    real_p = p * in_vocabulary[..., None]
                    acceptance = torch.minimum(real_p, q).sum(-1)
                if "reverse_kl" in terms:
                    reverse = (q * (logits - teacher_logits)).sum(-1) - (log_norm - logsumexp)
                acceptance.requires_grad_(with_gradient)
                statistics = Statistics(cross_entropies, acceptance, reverse.requires_grad_(with_gradient))
                loss = step_loss(terms, statistics, trained, rows.denominator)
                decayed = config.decay**k * loss
                if with_gradient:
                    d_rows = torch.autograd.grad(decayed, statistics, allow_unused=True)
            if with_gradient:
                if in_order:
                    q = after(q, acceptance.detach()[..., None])  # its own tensor is no longer needed then
                d_logits: Any = (q - p).mul_(d_rows[0][..., None]) if d_rows[0] is not None else 0.0
                if d_rows[1] is not None:
                    limiting = torch.where(q < real_p, q, 0.0)  # where q, not p, limits the acceptance
                    d_logits = d_logits + d_rows[1][..., None] * (limiting - q * limiting.sum(-1, keepdim=True))
                if d_rows[2] is not None:
                    log_ratio = logits - teacher_logits - (log_norm - logsumexp)[..., None]
                    d_logits = d_logits + d_rows[2][..., None] * q * (log_ratio - reverse.detach()[..., None])
                d_logits = d_logits.to(hidden.dtype)
                d_hidden = torch.einsum("grd,dh->grh", d_logits, weight).to(hidden.dtype)
                d_normed.append(shift_left(d_hidden, back))
                d_weight += torch.einsum("grd,grh->gdh", d_logits, hidden).float()
            total = total + decayed.detach()
            step_losses.append(loss.detach())
            choices.append(shift_left(logits.argmax(-1), back))
            if in_order:  # not d_hidden: with tensor parallelism its reduction would have to be waited for
                before = [x.detach()[..., None] for x in (cross_entropies, acceptance, choices[-1])] + [d_weight[:, :1]]
        ctx.save_for_backward(d_weight.sum(0), *d_normed)
        results = (torch.stack(step_losses), *choices)
        ctx.mark_non_differentiable(*results)
        return total, *results

    @staticmethod
    def backward(ctx: Any, d_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        d_weight, *d_normed = ctx.saved_tensors
        return None, None, None, None, None, None, d_loss * d_weight, *(d_loss.to(d.dtype) * d for d in d_normed)
