"""Acceptance on held-out rows, where decoding would draft, while the run goes: of each of their sources, and of all."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from eagle3_xla.data.batches import drafted_positions, rounded
from eagle3_xla.loss.metrics import AcceptanceSums, add_up, expected_tau, rates
from eagle3_xla.train.loader import Loader
from eagle3_xla.train.step import unpack_metrics


class HeldOut:
    """`limit` held-out rows at most, as many of each source, in batches of `batch` rows over all replicas.

    Of rows of several lengths, which lie one length after the other, a source's are evenly spread over all of its own.

    rows: the split's dataset, whose column `source` numbers `sources`; buckets: (row length, first row, rows).
    `rows` of the result are the chosen ones; `batches` number these.
    """

    def __init__(self, rows: Any, sources: list[str], buckets: list[tuple[int, int, int]], limit: int, batch: int):
        source = np.asarray(rows["source"][:]) if len(rows) else np.array([], int)
        each = max(1, limit // max(1, len(sources))) if limit else 0
        of_each = [np.flatnonzero(source == s) for s in range(len(sources))]
        of_each = [_spread(mine, each) if len(buckets) > 1 else mine[:each] for mine in of_each]
        chosen = np.sort(np.concatenate([np.array([], int), *of_each]))
        if len(chosen) > limit:  # more sources than rows
            chosen = chosen[np.arange(limit) * len(chosen) // limit]
        self.rows = rows.select(chosen)
        length_of = np.concatenate([np.full(count, length) for length, _, count in buckets])[chosen]
        self.batches: list[tuple[str, np.ndarray, np.ndarray]] = []  # (source, rows of a batch, which of them count)
        for number, length in sorted(set(zip(source[chosen].tolist(), length_of.tolist()))):
            same = np.flatnonzero((source[chosen] == number) & (length_of == length))
            for start in range(0, len(same), batch):
                part = same[start : start + batch]
                filled = np.concatenate([part, np.repeat(part[-1:], batch - len(part))])
                self.batches.append((sources[number], filled, np.arange(batch) < len(part)))
        self._placed: list[dict] = []  # the same batches on the devices, from the first evaluation on

    @property
    def lengths(self) -> list[int]:
        """Row lengths of the batches."""
        return sorted({self.rows["input_ids"][int(indices[0])].shape[0] for _, indices, _ in self.batches})

    def capacities(self, group: int) -> dict[int, int]:
        """By row length: the most drafted positions that a group of `group` rows has (data/batches.py)."""
        most: dict[int, int] = {}
        for _, indices, _ in self.batches:
            mask = self.rows["loss_mask"][indices]
            drafted = drafted_positions(mask).sum(1).reshape(-1, group).sum(1)
            most[mask.shape[1]] = max(most.get(mask.shape[1], 1), int(drafted.max()))
        return {length: rounded(count, group * length) for length, count in most.items()}

    def measure(self, loader: Loader, evaluate: Callable[[dict[str, torch.Tensor]], torch.Tensor]) -> dict:
        """evaluate(batch) -> metrics vector. Returns `tau`, `acceptance` per position, and `sources`: name -> tau."""
        if not self._placed:
            self._placed = [loader.load(indices, counts)[0] for _, indices, counts in self.batches]
        vectors = [evaluate(batch) for batch in self._placed]  # all of them, before the first is waited for
        sums: dict[str, list[AcceptanceSums]] = {}
        for (source, _, _), vector in zip(self.batches, vectors):
            sums.setdefault(source, []).append(unpack_metrics(vector)[1])
        acceptance = rates(add_up([each for of_source in sums.values() for each in of_source]))["acceptance"]
        by_source = {source: expected_tau(rates(add_up(of))["acceptance"]) for source, of in sums.items()}
        return {"tau": expected_tau(acceptance), "acceptance": acceptance, "sources": by_source}


def _spread(rows: np.ndarray, count: int) -> np.ndarray:
    """`count` of the rows, or all if there are fewer: of as many equal parts of them the middle ones."""
    count = min(count, len(rows))
    return rows[(2 * np.arange(count) + 1) * len(rows) // max(2 * count, 1)]
