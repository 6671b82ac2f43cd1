"""The target's states over the prepared rows, computed once and kept on disk, for runs whose epochs reuse them.

Shards of SHARD_ROWS rows in safetensors, bfloat16 aux and hidden; every host has all of them. A shard is written whole
or not at all, so an interrupted computation continues at the first missing one. They lie beside the rows, in a folder
for each target and preparation: states/1a60b44bd3f2a1c7/train-4096/rows-000016.safetensors
"""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from eagle3_xla import storage
from eagle3_xla.data.batches import share_of_process, to_tensors
from eagle3_xla.target.model import TargetStates

SHARD_ROWS = 16
ABANDONED = 3600  # seconds after which a half-written shard is a killed process's: the folder may be another machine's
# This host's part of a batch -> the states of all its rows, on the host.
StatesOf = Callable[[dict[str, torch.Tensor]], TargetStates]


class StatesStore:
    """States of all rows of `dataset` in folder `path`, which is these rows' and this target's alone.

    Runs may share it: each writes under names of its own first.
    """

    def __init__(self, path: Path, dataset: Any):
        self.path, self.dataset = Path(path), dataset
        self.path.mkdir(parents=True, exist_ok=True)
        self._shards: dict[int, dict[str, torch.Tensor]] = {}

    def fill(self, states_of: StatesOf, batch_rows: int, backend: Any) -> None:
        """Compute the shards that are missing, on any host, from batches of `batch_rows` rows; backend: the run's."""
        self._remove_abandoned()
        rows, hosts = len(self.dataset), backend.hosts
        mine = [start for start in range(0, rows, SHARD_ROWS) if not self._is_whole(start)]
        missing = sorted(set().union(*hosts.gather(mine)))
        wanted = [row for start in missing for row in range(start, self._stop(start))]
        if not wanted:
            return
        computed: list[torch.Tensor] = []  # of a shard that isn't complete yet
        bar = tqdm(total=rows, initial=rows - len(wanted), desc=f"target states, {self.path.name}", unit="row")
        for first in range(0, len(wanted), batch_rows):
            kept = wanted[first : first + batch_rows]
            # A batch that the end cuts is filled with the last row: one shape, one graph.
            indices = np.pad(kept, (0, batch_rows - len(kept)), "edge")
            part = share_of_process(indices, backend.part, hosts.count)
            states = [column[: len(kept)] for column in states_of(to_tensors(self.dataset[part]))]
            computed = [torch.cat(columns) for columns in zip(computed, states)] if computed else states
            while missing and len(computed[0]) >= (size := self._stop(missing[0]) - missing[0]):
                self._write(missing.pop(0), TargetStates(*(column[:size] for column in computed)))
                computed = [column[size:] for column in computed]
            bar.update(len(kept))
        bar.close()

    def _write(self, start: int, states: TargetStates) -> None:
        shard = {
            "aux": states.aux.to(torch.bfloat16),
            "hidden": states.hidden.to(torch.bfloat16),
            "argmax": states.argmax.to(torch.int32),
            "logsumexp": states.logsumexp.float(),
        }
        partial = self._file(start).with_suffix(f".partial-{uuid4().hex}")
        try:
            save_file(shard, partial)
            storage.fsync(partial)
            os.replace(partial, self._file(start))
        finally:
            partial.unlink(missing_ok=True)

    def _remove_abandoned(self) -> None:
        for partial in self.path.glob("*.partial-*"):
            with contextlib.suppress(FileNotFoundError):  # another run has finished or removed it
                if time.time() - partial.stat().st_mtime > ABANDONED:
                    partial.unlink()

    def read(self, indices: np.ndarray) -> TargetStates:
        """States of these rows as host tensors [len(indices), T, ...]."""
        picked = []
        for index in map(int, indices):
            start = index // SHARD_ROWS * SHARD_ROWS
            if start not in self._shards:
                self._shards[start] = load_file(self._file(start))  # memory-mapped
            picked.append([self._shards[start][name][index - start] for name in TargetStates._fields])
        return TargetStates(*(torch.stack(column) for column in zip(*picked)))

    def _is_whole(self, start: int) -> bool:
        """Whether the shard is there, as long as its header says and with all its rows."""
        try:
            with safe_open(self._file(start), "pt") as shard:
                rows = self._stop(start) - start
                return all(shard.get_slice(name).get_shape()[0] == rows for name in TargetStates._fields)
        except (OSError, SafetensorError):
            return False

    def _stop(self, start: int) -> int:
        return min(start + SHARD_ROWS, len(self.dataset))

    def _file(self, start: int) -> Path:
        return self.path / f"rows-{start:06d}.safetensors"
