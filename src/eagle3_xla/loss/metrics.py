"""Acceptance as the engines count it, from sums that add up over batches and devices."""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class AcceptanceSums(NamedTuple):
    """Sums per TTT step, each [K] float32.

    `drafts`: rows that count; `hits`: of these, the ones where the head's argmax is the target's;

    `chain_drafts`: rows whose earlier steps all hit; `chain_hits`: of these, the ones that hit too;
    `overlap`: sum of min(p, q) over `drafts`.
    """

    drafts: torch.Tensor
    hits: torch.Tensor
    chain_drafts: torch.Tensor
    chain_hits: torch.Tensor
    overlap: torch.Tensor


def add_up(batches: Sequence[AcceptanceSums]) -> AcceptanceSums:
    return AcceptanceSums(*(torch.stack(column).sum(0) for column in zip(*batches)))


def rates(sums: AcceptanceSums) -> dict[str, list[float]]:
    """acc: hits per draft on teacher-forced text (the usual training accuracy, on answer rows only);
    acceptance_conditional: given that all earlier steps hit; acceptance: all steps up to k hit;
    overlap: acceptance of speculative sampling at temperature 1.
    """
    drafts, hits, chain_drafts, chain_hits, overlap = (value.double().tolist() for value in sums)
    conditional = [h / d if d else 0.0 for h, d in zip(chain_hits, chain_drafts)]
    plain, product = [], 1.0
    for rate in conditional:
        product *= rate
        plain.append(product)
    return {
        "acc": [h / d if d else 0.0 for h, d in zip(hits, drafts)],
        "overlap": [o / d if d else 0.0 for o, d in zip(overlap, drafts)],
        "acceptance": plain,
        "acceptance_conditional": conditional,
    }


def expected_tau(acceptance: list[float]) -> float:
    """Expected acceptance length of a greedy chain: 1 (the target's own token) + mean accepted drafts."""
    return 1.0 + sum(acceptance)
