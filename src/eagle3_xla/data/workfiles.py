"""Files of a run that is not done: numbers and JSON with a checksum. One that a power loss cut or emptied counts as
absent, so that it is made again."""

import hashlib
import json
from pathlib import Path

from eagle3_xla import storage

DIGEST = hashlib.sha256().digest_size


def write_work_file(path: Path, meta: dict, data: bytes = b"") -> None:
    """`data`, then `meta` as JSON, its length in 8 bytes, and the sha256 of all of it: whole or not at all."""
    record = json.dumps(meta).encode()
    content = b"".join((data, record, len(record).to_bytes(8, "little")))
    partial = path.with_name(f"{storage.PARTIAL}{path.name}")
    partial.write_bytes(content + hashlib.sha256(content).digest())
    partial.replace(path)


def read_work_file(path: Path) -> tuple[dict, memoryview] | None:
    """(meta, data) of a file that `write_work_file` wrote; None: there is none, or it is damaged."""
    try:
        content = memoryview(path.read_bytes())
    except FileNotFoundError:
        return None
    end = len(content) - DIGEST
    if end < 8 or hashlib.sha256(content[:end]).digest() != content[end:]:
        return None
    start = end - 8 - int.from_bytes(content[end - 8 : end], "little")
    return json.loads(bytes(content[start : end - 8])), content[:start]


def file_is(path: Path, size: int, sha256: str) -> bool:
    """Whether the file has this length and checksum."""
    return path.is_file() and path.stat().st_size == size and storage.sha256(path) == sha256
