"""What a figure belongs to: fingerprints of the head, the target and the prompts that it was measured with."""

import hashlib
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from eagle3_xla import __version__, hub, local_copies, storage
from eagle3_xla.checks import read_json
from eagle3_xla.data.prompts import fingerprint as prompts_fingerprint
from eagle3_xla.data.tokenizer import config_content
from eagle3_xla.draft.saved import read_head
from eagle3_xla.errors import UserError
from eagle3_xla.target.weights import SINGLE, weight_map


def measured(verb: str, head: str | None, target: str, prompts: str) -> dict:
    """What `eval` and `bench` write beside their figures, and `push` compares."""
    return {
        "verb": verb,
        "version": __version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "head": head_fingerprint(head) if head else None,
        "target": target_fingerprint(target),
        "prompts": prompts_fingerprint(prompts),
    }


def head_fingerprint(path: str) -> str | None:
    """Of config.json and all weights; None where there is no head that can be read. path: a folder or a hub id."""
    folder = _folder(path)
    try:
        head = folder and read_head(folder)
    except UserError:
        return None
    if not head or head.problem:
        return None
    digest = hashlib.sha256(config_content(head.config, without=()))
    for name, value in sorted(head.tensors.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def target_fingerprint(path: str) -> str | None:
    """Of config.json and of each tensor's first and last row, however the weights are split into files.

    path: a folder, a URL or a hub id. None where the weights, in safetensors, are not here or it is not clear which.
    """
    folder = _folder(path, only=(*hub.SMALL, "*.safetensors"))
    if not folder:
        return None
    rows = {}
    try:
        digest = hashlib.sha256(config_content(read_json(folder / "config.json")))
        names = weight_map(str(folder))
        for file in {SINGLE} if names is None else {*names.values()}:
            with safe_open(folder / file, framework="pt") as opened:
                for name in opened.keys():
                    rows[name] = _rows(opened.get_slice(name))
    except (UserError, OSError, SafetensorError):
        return None
    if not rows:
        return None
    for name, parts in sorted(rows.items()):
        digest.update(name.encode())
        for part in parts:
            digest.update(part)
    return digest.hexdigest()


def _rows(tensor: Any) -> list[bytes]:
    shape = tensor.get_shape()
    ends = [tensor[:1], tensor[shape[0] - 1 :]] if len(shape) > 1 else [tensor[:]] if shape else []
    described = f"{tensor.get_dtype()} {shape}".encode()
    return [described, *(end.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for end in ends)]


def _folder(path: str, only: Collection[str] = ()) -> Path | None:
    if Path(path).is_dir() or storage.is_url(path) and storage.is_folder(path):
        return local_copies.local_folder(path, only)
    return hub.cached_snapshot(path)
