"""Which rows a step sees: a pure function of (seed, step), so that a resumed run continues exactly where it was,
whatever the number of hosts.

A batch is `replicas` groups of rows, one for each device that shares the draft phase. Rows are dealt so that the groups
of an epoch hold about the same number of drafted positions: what a device computes is as large as its largest group.
"""

import math

import numpy as np
import torch

DEAL = 64  # batches that are dealt together; more would even out no further and repeat the same neighbours each epoch
ROUND = 64  # listed rows are a multiple of it


class Batches:
    """The batches of a run; those of one epoch follow each other in random order, each from one bucket.

    buckets: those whose rows fill a batch; unfilled: the others, whose rows are never in one.

    drafted [N] int: positions that an engine would draft at, of every row (`drafted_positions`); buckets: (row length,
    first row, rows) of the rows of one length each; group: rows of such a device in a micro-step; replicas: how many.
    """

    def __init__(self, drafted: np.ndarray, buckets: list[tuple[int, int, int]], group: int, replicas: int, seed: int):
        self.drafted, self.group, self.replicas, self.seed = drafted, group, replicas, seed
        self.buckets = [bucket for bucket in buckets if bucket[2] >= group * replicas]
        self.unfilled = [bucket for bucket in buckets if bucket[2] < group * replicas]
        # What doesn't fill a batch is left out, other rows each epoch.
        self.steps_per_epoch = sum(rows // (group * replicas) for _, _, rows in self.buckets)
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty((0, 0), np.int64))

    def indices(self, step: int) -> np.ndarray:
        """Row numbers [replicas * group] of micro-step `step`, counted from 0 over the whole run."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            dealt = np.concatenate(self._deal(epoch))
            self._epoch = (epoch, np.random.default_rng([self.seed, epoch, 1]).permutation(dealt))
        return self._epoch[1][position]

    def capacities(self, epochs: int) -> dict[int, int]:
        """By row length: the most drafted positions of a group in `epochs` epochs, rounded up to a multiple of ROUND,
        at most all its positions."""
        most = dict.fromkeys((length for length, _, _ in self.buckets), 1)
        for epoch in range(epochs):
            for (length, _, _), batches in zip(self.buckets, self._deal(epoch)):
                groups = batches.reshape(-1, self.group)
                most[length] = max([most[length], *self.drafted[groups].sum(1)])
        return {length: rounded(count, self.group * length) for length, count in most.items()}

    def _deal(self, epoch: int) -> list[np.ndarray]:
        """Row numbers of every batch of an epoch, [steps, replicas * group] for each bucket."""
        random = np.random.default_rng([self.seed, epoch])
        batch = self.replicas * self.group
        # There and back through rows with more and more drafts: every batch, and every group of it, gets some with
        # many and some with few. Which rows a batch has doesn't depend on how it is split into groups.
        to_groups = np.arange(batch).reshape(self.group, self.replicas)
        to_groups[1::2] = to_groups[1::2, ::-1]
        dealt = []
        for _, first, rows in self.buckets:
            order = first + random.permutation(rows)[: rows // batch * batch]
            batches: list[np.ndarray] = [np.empty((0, batch), np.int64)]
            for start in range(0, len(order), DEAL * batch):
                part = order[start : start + DEAL * batch]
                part = part[np.argsort(self.drafted[part], kind="stable")].reshape(batch, -1)
                part[1::2] = part[1::2, ::-1]
                batches.append(part.T[:, to_groups.T.ravel()])
            dealt.append(np.concatenate(batches))
        return dealt


def rounded(count: int, limit: int) -> int:
    """`count` listed rows as a multiple of ROUND, at most `limit`."""
    return min(-(-int(count) // ROUND) * ROUND, limit)


def share_of_process(indices: np.ndarray, process: int, processes: int) -> np.ndarray:
    """The part of a global batch that one host reads: equal consecutive parts, the first for process 0."""
    part = len(indices) // processes
    return indices[process * part : (process + 1) * part]


def drafted_positions(loss_mask: np.ndarray) -> np.ndarray:
    """loss_mask [N, T] bool -> [N, T] bool: t such that t + 1 and t + 2 are the assistant's (step 0 of the unroll)."""
    drafted = np.zeros_like(loss_mask)
    drafted[:, :-2] = loss_mask[:, 1:-1] & loss_mask[:, 2:]
    return drafted


def to_tensors(rows: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Packed rows as host tensors [B, T]: ids int32, loss_mask bool."""
    types = {
        "input_ids": torch.int32,
        "position_ids": torch.int32,
        "document_ids": torch.int32,
        "loss_mask": torch.bool,
    }
    return {name: torch.from_numpy(np.ascontiguousarray(rows[name])).to(dtype) for name, dtype in types.items()}


def list_rows(loss_mask: torch.Tensor, groups: int, capacity: int) -> dict[str, torch.Tensor]:
    """`rows` [groups, capacity] and `slots` [groups, B / groups * T] int32 of a batch, as loss/rows.py takes them.

    loss_mask [B, T] bool. What the drafted positions leave free is filled with other rows, each at most once.
    """
    drafted = drafted_positions(loss_mask.numpy()).reshape(groups, -1)
    assert drafted.sum(1).max() <= capacity <= drafted.shape[1]
    rows = np.argsort(~drafted, axis=1, kind="stable")[:, :capacity]
    return {"rows": torch.from_numpy(rows.astype(np.int32)), "slots": _slots(rows, drafted.shape[1])}


def draw_anchors(drafted: np.ndarray, count: int, seed: int, step: int, first: int) -> dict[str, torch.Tensor]:
    """`anchors` [groups, count] and `anchor_slots` [groups, R] int32 of a batch, as loss/unroll.py takes them.

    drafted [groups, R] bool: which of the listed rows an engine drafts at: anchors are some of these, and others only
    where there are too few; first: the number of the first group among those of all hosts, which draw alike.
    """
    groups, rows = drafted.shape
    random = np.stack([np.random.default_rng([seed, step, first + group, 2]).random(rows) for group in range(groups)])
    anchors = np.sort(np.argsort(random + ~drafted, axis=1)[:, :count], axis=1)
    return {"anchors": torch.from_numpy(anchors.astype(np.int32)), "anchor_slots": _slots(anchors, rows)}


def _slots(listed: np.ndarray, rows: int) -> torch.Tensor:
    """Numbers [groups, count] of the listed ones of `rows` rows -> [groups, rows] int32: where in its group's list each
    row is, `count` where it isn't."""
    groups, count = listed.shape
    slots: np.ndarray = np.full((groups, rows), count, np.int32)
    np.put_along_axis(slots, listed, np.arange(count, dtype=np.int32)[None], axis=1)
    return torch.from_numpy(slots)


def anchor_count(share: float, rows: int) -> int:
    """Of `rows` listed ones, as a multiple of ROUND."""
    return rounded(math.ceil(share * rows), rows)
