"""A source's cleaned conversations on disk, one JSONL file (`chats.jsonl`) with an index, so that a source may be
larger than memory. A spool that is whole is read again when an interrupted run goes on."""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import overload

import numpy as np
from tqdm import tqdm

from eagle3_xla.data import sources
from eagle3_xla.data.clean import REASONING, Chat, Unusable, clean, clean_questions
from eagle3_xla.data.config import DataConfig, Source
from eagle3_xla.data.parallel import batched, ordered_map
from eagle3_xla.data.workfiles import file_is, read_work_file, write_work_file
from eagle3_xla.errors import UserError

CHUNK = 500  # rows a worker gets at a time


@dataclass
class Spool:
    """path: of the conversations; offsets [n] int64: of their lines; report: the source's part of the manifest."""

    path: Path
    offsets: np.ndarray
    report: dict


@dataclass
class Chats(Sequence):
    """Conversations in the order in which they are used: `paths` of spools, which of them [n], offset there [n].

    As a sequence: (path, offset) of each.
    """

    paths: list[str]
    spool: np.ndarray
    offset: np.ndarray

    def __len__(self) -> int:
        return len(self.spool)

    @overload
    def __getitem__(self, index: int) -> tuple[str, int]: ...
    @overload
    def __getitem__(self, index: slice) -> "Chats": ...
    def __getitem__(self, index: int | slice) -> "tuple[str, int] | Chats":
        if isinstance(index, slice):
            return self.at(np.arange(len(self))[index])
        return self.paths[self.spool[index]], int(self.offset[index])

    def at(self, indices: np.ndarray) -> "Chats":
        return Chats(self.paths, self.spool[indices], self.offset[indices])

    def in_order_of_sources(self) -> "Chats":
        return self.at(np.lexsort((self.offset, self.spool)))


def read_chat(path: str, offset: int) -> Chat:
    """One conversation of a spool."""
    with open(path, "rb") as file:
        file.seek(offset)
        return Chat(**json.loads(file.readline()))


def spool(source: Source, data: DataConfig, folder: Path, questions: bool) -> Spool:
    """The source read, cleaned and written to `folder`, or what an earlier run wrote there whole.

    questions: the answers will be replaced, so they may be missing or unusable (clean.py).
    """
    path, index = folder / "chats.jsonl", folder / "index"
    if stored := read_work_file(index):
        meta, content = stored
        if file_is(path, meta["bytes"], meta["sha256"]):
            return Spool(path, np.frombuffer(content, np.int64), meta["report"])
    folder.mkdir(parents=True, exist_ok=True)
    index.unlink(missing_ok=True)
    name = sources.label(source)
    dropped: dict[str, dict] = {}
    repaired: Counter[str] = Counter()
    read, offsets, digest = 0, array("q"), hashlib.sha256()
    chunks = batched(sources.rows(source, data.seed), CHUNK)
    with path.open("wb") as file, tqdm(desc=f"read {name}", unit="chat", delay=2) as bar:
        for chats, reasons, repairs in ordered_map(_Cleaner, (source, name, data, questions), chunks, data.workers):
            for line in chats:
                offsets.append(file.tell())
                digest.update(line)
                file.write(line)
            for reason, where, message in reasons:
                entry = dropped.setdefault(reason, {"rows": 0, "first": f"{where}: {message}"})
                entry["rows"] += 1
            repaired += repairs
            read += len(chats) + len(reasons)
            bar.update(len(chats) + len(reasons))
    if not offsets:
        why = "; ".join(f"{reason} {entry['rows']} (first: {entry['first']})" for reason, entry in dropped.items())
        raise UserError(f"{source.path}: none of its {read} conversations can be used: {why}")
    reasoning = repaired.pop(REASONING, 0)
    report = {"name": name, "path": source.path, "read": read, "dropped": dropped, "repaired": repaired}
    report |= {"with_reasoning": reasoning} if reasoning else {}
    meta = {"report": report, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}
    write_work_file(index, meta, offsets.tobytes())  # last: without it the spool is written anew
    return Spool(path, np.asarray(offsets, np.int64), report)


class _Cleaner:
    """In a worker: rows -> lines of the spool, dropped rows, repairs."""

    def __init__(self, source: Source, name: str, data: DataConfig, questions: bool):
        self.source, self.name, self.data = source, name, data
        self.clean = clean_questions if questions else clean

    def __call__(self, rows: list[tuple[str, dict]]) -> tuple[list[bytes], list[tuple], Counter[str]]:
        lines, reasons, repairs = [], [], Counter[str]()
        for where, row in rows:
            own = row.get("source")
            source = self.source.name or (own if isinstance(own, str) and own else self.name)
            made: Counter[str] = Counter()
            try:
                chat = self.clean(row, where, source, self.data, made)
                lines.append(json.dumps(asdict(chat), ensure_ascii=False).encode() + b"\n")
                repairs.update(made.keys())  # conversations, however often it was done to one
            except Unusable as reason:
                reasons.append((reason.reason, where, str(reason)))
            except UnicodeEncodeError:  # half characters in a name or a tool
                reasons.append(("bad_characters", where, "half characters beside its texts"))
        return lines, reasons, repairs
