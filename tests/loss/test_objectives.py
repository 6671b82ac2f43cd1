"""Each objective and its gradients against its formula in float64, written down plainly and differentiated by torch."""

import pytest
import torch

from eagle3_xla.loss.config import LossConfig
from eagle3_xla.loss.objectives import StepRows, unroll_loss
from eagle3_xla.loss.rows import shift_right
from eagle3_xla.target.model import Teacher

STEPS, ROWS, SIZE, DRAFT = 3, 12, 6, 10


def formula(objective: str, teacher_logits, logsumexp, logits, rows) -> torch.Tensor:
    log_p, log_q = teacher_logits.log_softmax(-1), logits.log_softmax(-1)
    p, q, real_p = log_p.exp(), log_q.exp(), (teacher_logits - logsumexp[..., None]).exp()
    overlap = torch.minimum(real_p, q).sum(-1)
    count = rows.sum()
    kl = (-(p * log_q).sum(-1) * rows).sum() / count
    mean_overlap = (overlap * rows).sum() / count
    weight = torch.exp(-mean_overlap.detach())
    return {
        "kl": kl,
        "reverse_kl": ((q * (log_q - log_p)).sum(-1) * rows).sum() / count,
        "tv": (0.5 * ((real_p - q).abs().sum(-1) + 1 - real_p.sum(-1)) * rows).sum() / count,
        "lk_alpha": -(overlap.log() * rows).sum() / count,
        "lk_lambda": weight * kl + (1 - weight) * (1 - mean_overlap),
    }[objective]


@pytest.mark.parametrize(
    "objective, terms",
    [(name, {name: 1.0}) for name in ("kl", "reverse_kl", "tv", "lk_alpha", "lk_lambda")]
    + [("kl + 0.5*tv + 2 * reverse_kl", {"kl": 1.0, "tv": 0.5, "reverse_kl": 2.0})],
)
def test_objectives(objective, terms):
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64) * 2

    teacher_logits, weight = drawn(2, ROWS, DRAFT), drawn(DRAFT, SIZE).requires_grad_()
    logsumexp = teacher_logits.logsumexp(-1) + 0.7  # the rest of the vocabulary has a third of the probability
    normed = [drawn(2, ROWS, SIZE).requires_grad_() for _ in range(STEPS)]
    rows = torch.zeros(2, ROWS, dtype=torch.bool)
    rows[:, 2:8] = True
    expected = sum(
        0.8**k * share * formula(name, teacher_logits, logsumexp, shift_right(x, k) @ weight.T, shift_right(rows, k))
        for k, x in enumerate(normed)
        for name, share in terms.items()
    )
    gradients = torch.autograd.grad(expected, [weight, *normed])

    ours = [x.detach().float().requires_grad_() for x in (weight, *normed)]
    teacher = Teacher(teacher_logits.float(), logsumexp.float(), teacher_logits.argmax(-1))
    steps = [StepRows(rows, rows.float(), rows.float().sum())] * STEPS
    config = LossConfig(ttt_length=STEPS, objective=objective)
    loss, *_ = unroll_loss(config, teacher, steps, ours[0], ours[1:])
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    for mine, wanted in zip(torch.autograd.grad(loss, ours), gradients):
        torch.testing.assert_close(mine.double(), wanted, rtol=1e-4, atol=1e-5)
