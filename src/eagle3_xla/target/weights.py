"""A target's weights on disk, read one tensor at a time, so that no host ever needs to hold the whole model."""

import contextlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from eagle3_xla.config import UserError
from eagle3_xla.data.tokenizer import first_line
from eagle3_xla.target import quantised

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class StoredWeights:
    """The safetensors files of a target: a folder, or a hub id whose files are fetched. dtype: what `read` gives;
    quantization: the config's quantization_config.

    Raises UserError when there are none.
    """

    def __init__(self, path: str, dtype: torch.dtype, quantization: dict | None = None):
        self.path, self.dtype = path, dtype
        self._block = quantised.block_of(quantization or {})
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
        """The tensor `name`, dequantised. Raises UserError when the files don't hold it."""
        if f"{name}_blocks" in self._files:
            return quantised.from_mxfp4(self._stored(f"{name}_blocks"), self._stored(f"{name}_scales"), self.dtype)
        tensor = self._stored(name)
        if tensor.dtype in quantised.FP8:
            scales = [f"{name}{suffix}" for suffix in ("_scale_inv", "_scale") if f"{name}{suffix}" in self._files]
            if not scales:
                raise self._broken(f"{name} is FP8 without {name}_scale or {name}_scale_inv")
            tensor = quantised.scaled_fp8(tensor, self._stored(scales[0]), self._block)
        elif not tensor.is_floating_point():
            raise self._broken(f"{name} is {str(tensor.dtype).removeprefix('torch.')}, of an unknown quantisation")
        return tensor.to(self.dtype, copy=True)

    def _stored(self, name: str) -> torch.Tensor:
        if name not in self._files:
            raise self._broken(f"{name} is missing in its safetensors")
        # Opened for each tensor: the pages of a file that stays mapped would count as this process's memory.
        with self._open(self._files[name]) as file:
            return file.get_tensor(name)

    def _broken(self, why: str) -> UserError:
        return UserError(f"the weights of target {self.path!r} don't load: {why}")

    @contextlib.contextmanager
    def _open(self, file: Path | None):
        try:
            with safe_open(file or "", "pt") as opened:
                yield opened
        except (OSError, SafetensorError) as error:
            raise self._broken(first_line(error)) from None


def _file(path: str, name: str) -> Path | None:
    from transformers.utils import cached_file

    found = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    return Path(found) if found else None
