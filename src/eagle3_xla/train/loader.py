"""Rows of a split as batches on the devices: what this host reads of them, their stored states, their listed rows."""

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from eagle3_xla.config import Recipe
from eagle3_xla.data.batches import (
    Batches,
    anchor_count,
    drafted_positions,
    draw_anchors,
    list_rows,
    share_of_process,
    to_tensors,
)
from eagle3_xla.target.model import TargetStates
from eagle3_xla.target.states import StatesOf, StatesStore
from eagle3_xla.xla.backend import Backend

# Listing rows moves data; it must spare at least this share of the positions to be worth it.
WORTH_LISTING = 0.05
AHEAD = 2  # batches that lie ready on the devices


class Loader:
    """Batches of one split.

    rows: the prepared dataset; capacities: row length -> positions that a group lists (Batches.capacities), or None
    when every row of a batch is computed; group: rows of a group; anchors: share of the computed rows at which later
    TTT steps are unrolled, drawn by `seed`; store: its target states, when they are kept (target/states.py).
    """

    def __init__(
        self,
        rows: Any,
        capacities: dict[int, int] | None,
        group: int,
        backend: Backend,
        anchors: float = 1.0,
        seed: int = 0,
    ):
        self.rows, self.backend, self.anchors, self.seed = rows, backend, anchors, seed
        self.store: StatesStore | None = None
        self.listed = {
            length: capacity
            for length, capacity in (capacities or {}).items()
            if capacity <= (1 - WORTH_LISTING) * group * length
        }

    def host_batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """This host's part of the rows `indices`, host tensors [B, T]."""
        mine = share_of_process(indices, self.backend.part, self.backend.hosts.count)
        batch = to_tensors(self.rows[mine])
        if self.store:
            batch |= self.store.read(mine)._asdict()
        return batch

    def load(
        self, indices: np.ndarray, counts: np.ndarray | None = None, step: int = 0
    ) -> tuple[dict[str, torch.Tensor], int]:
        """(batch on the devices, its tokens on all hosts). counts [len(indices)] bool: rows that carry a loss; step:
        what the anchors depend on."""
        batch = self.host_batch(indices)
        if counts is not None:
            mine = share_of_process(counts, self.backend.part, self.backend.hosts.count)
            batch["loss_mask"] &= torch.from_numpy(mine)[:, None]
        tokens = int((batch["document_ids"] > 0).sum()) * self.backend.hosts.count
        groups = self.backend.draft_groups // self.backend.hosts.count
        capacity = self.listed.get(batch["input_ids"].shape[1])
        if capacity:
            batch |= list_rows(batch["loss_mask"], groups, capacity)
        if self.anchors < 1:
            drafted = drafted_positions(batch["loss_mask"].numpy()).reshape(groups, -1)
            if capacity:
                drafted = np.take_along_axis(drafted, batch["rows"].numpy(), axis=1)
            first, count = self.backend.part * groups, anchor_count(self.anchors, drafted.shape[1])
            batch |= draw_anchors(drafted, count, self.seed, step, first)
        return self.backend.put(batch), tokens

    def ahead(
        self, batches: Iterable[tuple[int, np.ndarray]]
    ) -> Generator[tuple[dict[str, torch.Tensor], int], None, None]:
        """`load` of each (step, indices); a thread reads, lists and transfers the next ones while the caller works with
        one."""
        loading: deque[Future[tuple[dict[str, torch.Tensor], int]]] = deque()
        with ThreadPoolExecutor(1, "load") as thread:
            for step, indices in batches:
                loading.append(thread.submit(self.load, indices, step=step))
                if len(loading) > AHEAD:
                    yield loading.popleft().result()
            while loading:
                yield loading.popleft().result()

    def states(self, indices: np.ndarray, states_of: StatesOf) -> tuple[dict[str, torch.Tensor], TargetStates]:
        """(all rows of `indices` as host tensors, their target states), on every host: from the store, or by
        `states_of(this host's part)`, which gives all hosts the states of all."""
        batch = to_tensors(self.rows[indices])
        return batch, self.store.read(indices) if self.store else states_of(self.host_batch(indices))


def training_batches(recipe: Recipe, rows: Any, manifest: dict, backend: Backend) -> tuple[Batches, Loader]:
    """The batches of a run and what loads them; rows, manifest: `load_prepared`'s."""
    buckets = buckets_of(manifest, "train", len(rows))
    drafted = np.concatenate([drafted_positions(rows["loss_mask"][f : f + n]).sum(1) for _, f, n in buckets])
    group = recipe.train.batch_size * backend.data_parallel // backend.draft_groups
    batches = Batches(drafted, buckets, group, backend.draft_groups, recipe.train.seed)
    # An answer's positions are all that is computed, where the loss counts these (loss/rows.py).
    capacities = batches.capacities(recipe.train.epochs) if recipe.loss.rows == "serving" else None
    return batches, Loader(rows, capacities, group, backend, recipe.loss.anchors, recipe.train.seed)


def buckets_of(manifest: dict, split: str, rows: int) -> list:
    """(row length, first row, rows) of a split's rows of one length each."""
    return manifest[split].get("buckets") or [[manifest["row_length"], 0, rows]]
