"""Which rows a step sees: a pure function of (seed, step), so that a resumed run continues exactly where it was,
whatever the number of hosts.

A batch is `replicas` groups of rows, one a data-parallel replica. Rows are dealt so that the groups of an epoch hold
about the same number of drafted positions: what a replica computes is as large as its largest group.
"""

import numpy as np
import torch

DEAL = 64  # groups that are dealt together; more would even out no further and repeat the same neighbours each epoch
ROUND = 64  # listed rows are a multiple of it


class Batches:
    """The batches of a run.

    drafted [N] int: positions that an engine would draft at, of every row (`drafted_positions`); group: rows of a
    replica in a micro-step; replicas: how many.
    """

    def __init__(self, drafted: np.ndarray, group: int, replicas: int, seed: int):
        self.drafted, self.group, self.replicas, self.seed = drafted, group, replicas, seed
        self.steps_per_epoch = len(drafted) // (group * replicas)  # the remainder is left out, another one each epoch
        self._epoch = (-1, None)

    def indices(self, step: int) -> np.ndarray:
        """Row numbers [replicas * group] of micro-step `step`, counted from 0 over the whole run."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._deal(epoch))
        return self._epoch[1][position]

    def capacity(self, epochs: int, row_length: int) -> int:
        """The most drafted positions that a group has in `epochs` epochs, rounded up to a multiple of ROUND, at most
        group * row_length."""
        most = 0
        for epoch in range(epochs):
            groups = self._deal(epoch).reshape(-1, self.group)
            most = max(most, int(self.drafted[groups].sum(1).max()))
        return min(-(-max(most, 1) // ROUND) * ROUND, self.group * row_length)

    def _deal(self, epoch: int) -> np.ndarray:
        """Row numbers of every batch of an epoch, [steps, replicas * group]."""
        random = np.random.default_rng([self.seed, epoch])
        used = self.steps_per_epoch * self.replicas * self.group
        order = random.permutation(len(self.drafted))[:used]
        groups = []
        for start in range(0, used, DEAL * self.group):
            part = order[start : start + DEAL * self.group]
            part = part[np.argsort(self.drafted[part], kind="stable")].reshape(self.group, -1)
            part[1::2] = part[1::2, ::-1]  # there and back again: every group gets a few of the long and of the short
            groups.append(part.T[random.permutation(part.shape[1])])
        return np.concatenate(groups).reshape(self.steps_per_epoch, -1)


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
    return {
        name: torch.from_numpy(np.ascontiguousarray(values)).to(torch.bool if name == "loss_mask" else torch.int32)
        for name, values in rows.items()
    }


def list_rows(loss_mask: torch.Tensor, groups: int, capacity: int) -> dict[str, torch.Tensor]:
    """`rows` [groups, capacity] and `slots` [groups, B / groups * T] int32 of a batch, as loss/rows.py takes them.

    loss_mask [B, T] bool. What the drafted positions leave free is filled with other rows, each at most once.
    """
    drafted = drafted_positions(loss_mask.numpy()).reshape(groups, -1)
    assert drafted.sum(1).max() <= capacity <= drafted.shape[1]
    rows = np.argsort(~drafted, axis=1, kind="stable")[:, :capacity]
    slots = np.full(drafted.shape, capacity, np.int32)
    np.put_along_axis(slots, rows, np.arange(capacity, dtype=np.int32)[None], axis=1)
    return {"rows": torch.from_numpy(rows.astype(np.int32)), "slots": torch.from_numpy(slots)}
