"""The output of `regenerate`: one line for each finished conversation, whole after a kill, each once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from eagle3_xla.errors import UserError


class Journal:
    """chats.jsonl (rows with an `id`) and dropped.jsonl (`id`, `where`, `reason`, `message`) of a folder.

    done: ids in either; finishes, dropped: how many by kind; tokens: that the target wrote. A process that was killed
    may leave half a line: it is cut off, and its conversation is done again. Raises UserError on a line that is not
    ours.
    """

    def __init__(self, out: Path):
        self.done: set[int] = set()
        self.finishes: dict[str, int] = {}
        self.dropped: dict[str, int] = {}
        self.tokens = 0
        self.chats = self._open(out / "chats.jsonl", self._count_chat)
        self.drops = self._open(out / "dropped.jsonl", self._count_drop)

    def add(self, row: dict) -> None:
        self._append(self.chats, row)
        self._count_chat(row)

    def drop(self, number: int, where: str, reason: str, message: str) -> None:
        row = {"id": number, "where": where, "reason": reason, "message": message}
        self._append(self.drops, row)
        self._count_drop(row)

    def close(self) -> None:
        self.chats.close()
        self.drops.close()

    def _open(self, path: Path, count: Callable[[dict], None]) -> BinaryIO:
        file = path.open("a+b")
        file.seek(0)
        end = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                count(json.loads(line))
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(f"{path}:{number}: not a line of `regenerate`; choose another folder") from None
            end += len(line)
        file.truncate(end)
        return file

    def _append(self, file: BinaryIO, row: dict) -> None:
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        file.flush()  # with the kernel, it survives this process

    def _count_chat(self, row: dict) -> None:
        self.done.add(int(row["id"]))
        self.tokens += int(row["new_tokens"])
        self.finishes[row["finish"]] = self.finishes.get(row["finish"], 0) + 1

    def _count_drop(self, row: dict) -> None:
        self.done.add(int(row["id"]))
        self.dropped[row["reason"]] = self.dropped.get(row["reason"], 0) + 1
