"""A target's weights on disk, read one tensor at a time, so that no host ever needs to hold the whole model."""

import contextlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from eagle3_xla.config import UserError
from eagle3_xla.data.tokenizer import first_line

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class StoredWeights:
    """The safetensors files of a target: a folder, or a hub id whose files are fetched. dtype: what `read` gives.

    Raises UserError when there are none.
    """

    def __init__(self, path: str, dtype: torch.dtype):
        self.path, self.dtype = path, dtype
        index, single = _file(path, INDEX), _file(path, SINGLE)
        if index:
            names = json.loads(index.read_text())["weight_map"]
            files = {name: _file(path, name) for name in set(names.values())}
            self._files = {name: files[file] for name, file in names.items()}
        elif single:
            with self._open(single) as file:
                self._files = dict.fromkeys(file.keys(), single)
        else:
            raise UserError(f"target {path!r} has neither {SINGLE} nor {INDEX}; write it with save_pretrained")

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`. Raises UserError when the files don't hold it."""
        if name not in self._files:
            raise UserError(f"the weights of target {self.path!r} don't load: {name} is missing in its safetensors")
        # Opened for each tensor: the pages of a file that stays mapped would count as this process's memory.
        with self._open(self._files[name]) as file:
            return file.get_tensor(name).to(self.dtype, copy=True)

    @contextlib.contextmanager
    def _open(self, file: Path | None):
        try:
            with safe_open(file or "", "pt") as opened:
                yield opened
        except (OSError, SafetensorError) as error:
            raise UserError(f"the weights of target {self.path!r} don't load: {first_line(error)}") from None


def _file(path: str, name: str) -> Path | None:
    from transformers.utils import cached_file

    found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    return Path(found) if found else None
