"""A target's weights on disk, read one tensor at a time, so that no host ever needs to hold the whole model."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load

from eagle3_xla import hub, storage
from eagle3_xla.checks import first_line, mapping, parse_json, shown, text
from eagle3_xla.data.tokenizer import small_files
from eagle3_xla.errors import UserError
from eagle3_xla.storage import Location
from eagle3_xla.target import quantised

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LARGEST_HEADER = 100 << 20  # bytes; the format's own limit
SAMPLED = 8 << 10  # bytes of a stored tensor's start, and of its end: some thousand weights of the first and last rows


class StoredWeights:
    """The safetensors files of a target: a folder; a URL, read tensor by tensor without a copy on this machine; or a
    hub id, whose files are fetched. dtype: what `read` gives; quantization: the config's quantization_config.

    Raises UserError when there are none.
    """

    def __init__(self, path: str, dtype: torch.dtype, quantization: dict | None = None):
        self.path, self.dtype = path, dtype
        self._ranged: dict[str, RangedFile] = {}
        self._block = quantised.block_of(quantization or {})
        if (names := weight_map(path)) is not None:
            files = {name: self._present(name) for name in sorted(set(names.values()))}
            self._files = {name: files[file] for name, file in names.items()}
        elif single := _file(path, SINGLE):
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

    def sample(self, name: str) -> bytes:
        """A little of the tensor `name` and of its scales, as they are stored: tells weights apart cheaply.

        Raises UserError when the files don't hold it.
        """
        names = [name + suffix for suffix in ("", "_blocks", "_scales", "_scale_inv", "_scale")]
        stored = [each for each in names if each in self._files]
        if not stored:
            raise self._broken(f"{name} is missing in its safetensors")
        try:
            return b"".join(self._ranges_of(self._files[each]).sample(each) for each in stored)
        except ValueError as error:
            raise self._broken(first_line(error)) from None

    def _ranges_of(self, file: Location) -> "RangedFile":
        self._ranged[str(file)] = self._ranged.get(str(file)) or RangedFile(file)
        return self._ranged[str(file)]

    def _stored(self, name: str) -> torch.Tensor:
        if name not in self._files:
            raise self._broken(f"{name} is missing in its safetensors")
        # Opened for each tensor: the pages of a file that stays mapped would count as this process's memory.
        with self._open(self._files[name]) as file:
            return file.get_tensor(name)

    def _present(self, name: str) -> Location:
        if file := _file(self.path, name):
            return file
        raise self._broken(f"{name} is missing")

    def _broken(self, why: str) -> UserError:
        return UserError(f"the weights of target {self.path!r} don't load: {why}")

    @contextlib.contextmanager
    def _open(self, file: Location) -> Iterator[Any]:
        if storage.is_url(file):
            yield self._ranges_of(file)
            return
        try:
            with safe_open(file, "pt") as opened:
                yield opened
        except (OSError, SafetensorError) as error:
            raise self._broken(first_line(error)) from None


class RangedFile:
    """A safetensors file of which ranges are read; at a URL, a tensor is one request for its bytes."""

    def __init__(self, location: Location):
        self.location = location
        length = int.from_bytes(storage.read_range(location, 0, 8), "little")
        if length > LARGEST_HEADER:
            raise UserError(f"{location} is no safetensors file")
        self._start, self._header = 8 + length, json.loads(storage.read_range(location, 8, length))
        self._header.pop("__metadata__", None)

    def keys(self) -> list[str]:
        return list(self._header)

    def get_tensor(self, name: str) -> torch.Tensor:
        entry = self._entry(name)
        first, end = entry["data_offsets"]
        content = storage.read_range(self.location, self._start + first, end - first)
        header = json.dumps({name: entry | {"data_offsets": [0, end - first]}}).encode()
        return load(len(header).to_bytes(8, "little") + header + content)[name]

    def _entry(self, name: str) -> dict:
        if name not in self._header:
            raise UserError(f"{self.location} doesn't hold {name}")
        return self._header[name]

    def sample(self, name: str) -> bytes:
        """The first and the last SAMPLED bytes of a tensor."""
        first, end = self._entry(name)["data_offsets"]
        size = min(SAMPLED, end - first)
        starts = dict.fromkeys((first, end - size))  # one, where that is all of it
        return b"".join(storage.read_range(self.location, self._start + start, size) for start in starts)


def weight_map(path: str) -> dict[str, str] | None:
    """Which file holds each tensor of a target, by its index; None where there is none. path: as StoredWeights'.

    Raises UserError for an index that can't be read, and for one beside a SINGLE that it doesn't name: transformers
    loads the one, the engines the others.
    """
    index = _here(path, INDEX)
    if not index:
        return None
    content = mapping(parse_json(storage.read(index).decode(errors="replace"), str(index)), str(index))
    names = mapping(content.get("weight_map"), f"{index}: weight_map")
    for file in names.values():
        if storage.base_name(text(file, f"{index}: weight_map")) != file:
            raise UserError(f"{index}: weight_map names {shown(file)}, which is no file beside it")
    if {*names.values()} != {SINGLE} and _here(path, SINGLE):
        raise UserError(
            f"target {path!r} has both {SINGLE} and an {INDEX} of other files, which may be other weights: remove what "
            "is not meant"
        )
    return names


def _here(path: str, name: str) -> Location | None:
    """A target's file where it is; of a hub id one that has been fetched, as its index has been if it has one."""
    if storage.is_url(path):
        return storage.join(path, name) if storage.exists(storage.join(path, name)) else None
    file = Path(small_files(path), name)
    return file if file.is_file() else None


def _file(path: str, name: str) -> Location | None:
    found = _here(path, name)
    return found if found or storage.is_url(path) or Path(path).exists() else hub.file(path, name)
