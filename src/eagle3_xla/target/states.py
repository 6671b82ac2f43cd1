"""The target's states over the prepared rows, computed once and kept on disk, for runs whose epochs reuse them.

Shards of SHARD_ROWS rows in safetensors, bfloat16 aux and hidden; every host has all of them. A shard is written whole
or not at all, so an interrupted computation continues at the first missing one.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from eagle3_xla.data.batches import share_of_process, to_tensors
from eagle3_xla.target.model import TargetStates

SHARD_ROWS = 16
INDEX = "states.json"
# This host's part of a batch -> the states of all its rows, on the host.
StatesOf = Callable[[dict[str, torch.Tensor]], TargetStates]


class StatesStore:
    """States of all rows of `dataset` in folder `path`; `key` fingerprints the rows and the target."""

    def __init__(self, path: Path, dataset: Any, key: str):
        self.path, self.dataset = Path(path), dataset
        self.path.mkdir(parents=True, exist_ok=True)
        index = self.path / INDEX
        content = {"key": key, "rows": len(dataset)}
        if not index.exists() or index.read_text(errors="replace") != json.dumps(content):
            for stale in self.path.glob("*.safetensors"):
                stale.unlink()
            index.write_text(json.dumps(content))
        self._shards: dict[int, dict[str, torch.Tensor]] = {}

    def fill(self, states_of: StatesOf, batch_rows: int, backend: Any) -> None:
        """Compute the shards that are missing, on any host, from batches of `batch_rows` rows; backend: the run's."""
        rows, hosts = len(self.dataset), backend.hosts
        mine = [start for start in range(0, rows, SHARD_ROWS) if not self._is_whole(start)]
        missing = sorted(set().union(*hosts.gather(mine)))
        if not missing:
            return
        done = rows - sum(min(SHARD_ROWS, rows - start) for start in missing)
        bar = tqdm(total=rows, initial=done, desc=f"target states, {self.path.name}", unit="row")
        for start in missing:
            stop = min(start + SHARD_ROWS, rows)
            parts = []
            for first in range(start, stop, batch_rows):
                # A batch that the end cuts is filled with the last row: one shape, one graph.
                indices = np.minimum(np.arange(first, first + batch_rows), stop - 1)
                kept = min(batch_rows, stop - first)
                part = share_of_process(indices, backend.part, hosts.count)
                parts.append([x[:kept] for x in states_of(to_tensors(self.dataset[part]))])
                bar.update(kept)
            states = TargetStates(*(torch.cat(column) for column in zip(*parts)))
            shard = {
                "aux": states.aux.to(torch.bfloat16),
                "hidden": states.hidden.to(torch.bfloat16),
                "argmax": states.argmax.to(torch.int32),
                "logsumexp": states.logsumexp.float(),
            }
            partial = self._file(start).with_suffix(f".partial-{hosts.index}")
            save_file(shard, partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())  # before the name: a power loss leaves no file of zeros
            os.replace(partial, self._file(start))
        bar.close()

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
        """Whether the shard is there, as long as its header says and with the shapes of its rows."""
        rows = min(SHARD_ROWS, len(self.dataset) - start)
        try:
            with safe_open(self._file(start), "pt") as shard:
                return all(shard.get_slice(name).get_shape()[0] == rows for name in TargetStates._fields)
        except (OSError, SafetensorError):
            return False

    def _file(self, start: int) -> Path:
        return self.path / f"rows-{start:06d}.safetensors"
