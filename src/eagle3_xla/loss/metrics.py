"""Acceptance as the engines count it, from sums that add up over batches and devices."""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class AcceptanceSums(NamedTuple):
    """Sums per TTT step, each [K] float32.

    `drafts`: rows that count; `hits`: of these, the ones where the head's argmax is the target's;

    `chain_drafts`: rows whose earlier steps all hit; `chain_hits`: of these, the ones that hit too; where asked for,
    both of the rows alone at which decoding would draft (`decoding_rows`).
    """

    drafts: torch.Tensor
    hits: torch.Tensor
    chain_drafts: torch.Tensor
    chain_hits: torch.Tensor


def add_up(batches: Sequence[AcceptanceSums]) -> AcceptanceSums:
    return AcceptanceSums(*(torch.stack(column).sum(0) for column in zip(*batches)))


def rates(sums: AcceptanceSums) -> dict[str, list[float]]:
    """acc: hits per draft on teacher-forced text (the usual training accuracy, on answer rows only);
    acceptance_conditional: given that all earlier steps hit; acceptance: all steps up to k hit.
    """
    drafts, hits, chain_drafts, chain_hits = (value.double().tolist() for value in sums)
    conditional = [h / d if d else 0.0 for h, d in zip(chain_hits, chain_drafts)]
    plain, product = [], 1.0
    for rate in conditional:
        product *= rate
        plain.append(product)
    return {
        "acc": [h / d if d else 0.0 for h, d in zip(hits, drafts)],
        "acceptance": plain,
        "acceptance_conditional": conditional,
    }


def decoding_rows(accepted: torch.Tensor, drafted: torch.Tensor, first: torch.Tensor, depth: int) -> torch.Tensor:
    """The rows at which greedy decoding of the text would draft, of all at which it could: an answer's first, and from
    each of these the one after its accepted drafts and the token that the target adds to them.

    Calls so begin where a draft was refused, which is where the next one is likelier to be refused as well: means over
    every row are too high. accepted [G, R]: drafts accepted one after the other from each row, up to `depth`; drafted,
    first [G, R] bool: rows of answers, in order, and of these the first ones. Returns [G, R] bool.
    """
    skip = torch.arange(depth + 1, device=accepted.device).expand(*accepted.shape, -1)  # rows to pass over
    after = torch.where((skip == 0) | first[..., None], accepted[..., None], (skip - 1).clamp_min(0))
    reach = 1
    while reach < after.shape[1]:  # `after` holds what `reach` rows make of a number of rows to pass over
        earlier = torch.cat([skip[:, :reach], after[:, :-reach]], 1)
        after, reach = after.gather(-1, earlier), 2 * reach
    before = torch.cat([torch.zeros_like(after[:, :1, 0]), after[:, :-1, 0]], 1)
    return drafted & ((before == 0) | first)


def expected_tau(acceptance: list[float]) -> float:
    """Expected acceptance length of a greedy chain: 1 (the target's own token) + mean accepted drafts."""
    return 1.0 + sum(acceptance)
