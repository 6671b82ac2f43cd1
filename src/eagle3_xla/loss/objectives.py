"""What is minimised at one TTT step. Row losses are [B, T]; the reductions are the caller's masks."""

import torch

from eagle3_xla.target.model import Teacher


def cross_entropy(logits: torch.Tensor, teacher: Teacher) -> torch.Tensor:
    """-sum_v p(v) log q(v) per row, p renormalised on the draft vocabulary. KL(p || q) plus the teacher's entropy.

    logits [B, T, D] float32 -> [B, T].
    """
    p = teacher.logits.softmax(-1)
    return logits.logsumexp(-1) - (p * logits).sum(-1)


def acceptance_rate(logits: torch.Tensor, teacher: Teacher) -> torch.Tensor:
    """sum_v min(p(v), q(v)) per row: the chance that speculative sampling accepts the draft (Leviathan et al., 2023).

    p is the target's real distribution, not renormalised: what lies outside the draft vocabulary is never accepted.
    logits [B, T, D] float32 -> [B, T].
    """
    p = (teacher.logits - teacher.logsumexp[..., None]).exp()
    return torch.minimum(p, logits.softmax(-1)).sum(-1)


def step_loss(
    objective: str, cross_entropies: torch.Tensor, acceptance: torch.Tensor, rows: torch.Tensor, denominator
) -> torch.Tensor:
    """Scalar loss of one TTT step.

    cross_entropies, acceptance [B, T]; rows [B, T] float32, 1 where a row counts; denominator: what the
    cross-entropy's sum is divided by. The LK objectives are those of "LK losses" as SpecForge's core/lk_loss.py
    has them (kl_scale = kl_decay = 1): their acceptance is a mean over the rows that count.
    """
    kl = (cross_entropies * rows).sum() / denominator
    if objective == "kl":
        return kl
    count = rows.sum().clamp_min(1e-8)
    if objective == "lk_alpha":
        positive = acceptance > 0
        log_acceptance = torch.where(positive, torch.where(positive, acceptance, 1.0).log(), 0.0)
        return -(log_acceptance * rows).sum() / count
    assert objective == "lk_lambda"
    mean_acceptance = (acceptance * rows).sum() / count
    kl_weight = torch.exp(-mean_acceptance.detach())
    return kl_weight * kl + (1 - kl_weight) * (1 - mean_acceptance)
