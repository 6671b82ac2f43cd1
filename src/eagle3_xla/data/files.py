"""Rows of local files: JSONL, a JSON array, Parquet; plain, gzip or zstd. What is broken is named by file and line.

Everything streams, so a file may be larger than memory, and neither an endless line nor a compressed file that expands
without end can fill it.
"""

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from eagle3_xla import local_copies, storage
from eagle3_xla.checks import first_line
from eagle3_xla.errors import UserError

PACKAGED = "package:"  # package:train.jsonl is a file shipped in eagle3_xla/data/chats
LONGEST_ROW = 64 << 20  # bytes of a line, characters of an array element
# Text compresses by 3 to 30; a compressed file that expands further than this is no text.
EXPANSION, EXPANSION_FROM = 200, 64 << 20
SPACE = re.compile(r"\s*")


def data_file(name: str) -> Path:
    """A path, or a file shipped with the package when it starts with `package:`; of a URL, its copy in the cache.

    Raises UserError when nothing is at the URL.
    """
    if storage.is_url(name):
        try:
            return local_copies.local_folder(name) if storage.is_folder(name) else local_copies.local_file(name)
        except FileNotFoundError as error:
            raise UserError(str(error)) from None
    if name.startswith(PACKAGED):
        return Path(str(resources.files("eagle3_xla.data") / "chats" / name.removeprefix(PACKAGED)))
    return Path(name)


def read_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """The rows of a file as (FILE:LINE, object); blank lines are no rows.

    Raises UserError on a missing, empty or broken file or row, naming the line (Parquet: the row).
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if not path.is_file():
        raise UserError(f"{path}: not a file")
    with path.open("rb") as file:
        magic = file.read(4)
    rows = _parquet(path) if magic == b"PAR1" else _json(path, magic)
    count = 0
    for count, (where, row) in enumerate(rows, 1):  # noqa: B007
        if not isinstance(row, dict):
            raise UserError(f"{where}: a JSON object was expected, not {type(row).__name__}")
        yield where, row
    if not count:
        raise UserError(f"{path}: the file is empty")


def _parquet(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=500):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", without_nulls(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}:{number + 1}: not a readable Parquet file ({first_line(error)})") from None


def without_nulls(row: dict) -> dict:
    """A table's row without the null fields of what it holds: a table gives every object the fields of all others."""
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _json(path: Path, magic: bytes) -> Iterator[tuple[str, object]]:
    import zstandard

    compressed = True
    file: gzip.GzipFile | io.BufferedReader
    if magic[:2] == b"\x1f\x8b":
        file = gzip.open(path)
    elif magic == b"\x28\xb5\x2f\xfd":
        stream = zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True, closefd=True)
        file = io.BufferedReader(stream, 1 << 20)
    else:
        file, compressed = path.open("rb"), False
    limit = max(EXPANSION * path.stat().st_size, EXPANSION_FROM) if compressed else None
    lines_only = ".jsonl" in path.name
    number = 0
    try:
        with file:
            start = b"" if lines_only else file.peek(4096)
            array = start.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
            for number, where, row in _array(file, path, limit) if array else _lines(file, path, limit):  # noqa: B007
                yield where, row
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"{path}:{number + 1}: the compressed file is broken here ({first_line(error)})") from None


def _lines(file: gzip.GzipFile | io.BufferedReader, path: Path, limit: int | None) -> Iterator[tuple[int, str, object]]:
    number = position = 0
    while line := file.readline(LONGEST_ROW + 1):
        number, position = number + 1, position + len(line)
        where = f"{path}:{number}"
        if len(line) > LONGEST_ROW:
            raise UserError(f"{where}: a line of more than {LONGEST_ROW >> 20} MB; this is not a file of chats")
        _check_expansion(position, limit, where)
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        try:
            yield number, where, json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start} of the line)") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not valid JSON ({error})") from None
        except (RecursionError, ValueError) as error:  # nested thousands deep; a number of thousands of digits
            raise UserError(f"{where}: not readable JSON ({first_line(error)})") from None


def _array(file: gzip.GzipFile | io.BufferedReader, path: Path, limit: int | None) -> Iterator[tuple[int, str, object]]:
    """Elements of one JSON array, decoded one by one from a window of text."""
    decode, utf8 = json.JSONDecoder().raw_decode, codecs.getincrementaldecoder("utf-8-sig")()
    text, at, line, position, more = "", 0, 1, 0, True
    size = 1 << 20
    first = True
    while True:
        try:
            # One element, or the end of the array; an error near the end of the window may only want more text.
            start = _after_space(text, at)
            token = text[start : start + 1]
            if token == "" or (first and token != "["):
                raise json.JSONDecodeError("Expecting '['" if first else "The array has no end", text, start)
            if token == "]" and not first:
                break
            if token not in "[,":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, start)
            start = _after_space(text, start + 1)
            if first and text[start : start + 1] == "]":
                break
            row, end = decode(text, start)
            if end == len(text) and more:
                raise json.JSONDecodeError("Unfinished", text, end)
        except json.JSONDecodeError as error:
            if more and len(text) - at <= LONGEST_ROW:
                try:
                    data = file.read(size)
                    more = bool(data)
                    text, at = text[at:] + utf8.decode(data, final=not more), 0
                except UnicodeDecodeError as problem:
                    where = f"{path}:{line + text.count(chr(10), at)}"
                    raise UserError(f"{where}: not UTF-8 text after here ({problem.reason})") from None
                position += len(data)
                size = min(2 * size, LONGEST_ROW)
                _check_expansion(position, limit, f"{path}:{line}")
                continue
            where = f"{path}:{line + text.count(chr(10), at, error.pos)}"
            raise UserError(f"{where}: not valid JSON ({error.msg})") from None
        except (RecursionError, ValueError) as error:
            raise UserError(f"{path}:{line}: not readable JSON ({first_line(error)})") from None
        line += text.count("\n", at, start)
        yield line, f"{path}:{line}", row
        line += text.count("\n", start, end)
        at, first, size = end, False, 1 << 20
    line, rest = line + text.count("\n", at, start), text[start + 1 :]
    while not rest.strip():
        line += rest.count("\n")
        data = file.read(1 << 20)
        if not data:
            return
        position += len(data)
        _check_expansion(position, limit, f"{path}:{line}")
        rest = data.decode(errors="replace")
    line += rest.count("\n", 0, _after_space(rest, 0))
    raise UserError(f"{path}:{line}: text after the end of the array; one file holds one array, or a row in each line")


def _after_space(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    return found.end() if found else at


def _check_expansion(position: int, limit: int | None, where: str) -> None:
    if limit and position > limit:
        raise UserError(
            f"{where}: the compressed file expands to more than {EXPANSION} times its size; this is not a file of chats"
        )
