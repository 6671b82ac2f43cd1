"""Malformed input: one line that names file and line, or a counted drop; the folder prepared before stays whole."""

import gzip
import hashlib
import json
import os
import re
import shutil
from collections import Counter

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from eagle3_xla.cli import main
from eagle3_xla.data import files
from eagle3_xla.errors import UserError


def row(question="Name a colour.", answer="Green is a colour.") -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


GOOD = [json.dumps(row(answer=f"Answer {i} it is.")) for i in range(3)]
DEEP = "[" * 100_000 + "]" * 100_000


def lines(*bad: str | bytes):
    """Three good rows, the bad ones from line 4 on, a good one."""
    encoded = [text.encode() if isinstance(text, str) else text for text in [*GOOD, *bad, GOOD[0]]]
    return b"\n".join(encoded) + b"\n"


def turns(*pairs) -> str:
    return json.dumps({"conversations": [{"from": role, "value": value} for role, value in pairs]})


def answer(value) -> str:
    return turns(("human", "Name a colour."), ("gpt", value))


def table(rows: list[dict]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def damaged(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(64) + data[middle + 64 :]


MANY = lines(*(json.dumps(row(answer=os.urandom(40).hex())) for _ in range(2000)))
CHECKED = zstandard.ZstdCompressor(write_checksum=True)  # as the zstd program does
# name -> (file name, content, what the error says after the file's name)
ERRORS = {
    "bad JSON": ("a.jsonl", lines("{not json"), r":4: not valid JSON"),
    "last line cut off": ("a.jsonl", lines()[:-20], r":4: not valid JSON"),
    "a text file": ("a.jsonl", b"Dear diary,\n", r":1: not valid JSON"),
    "NUL bytes": ("a.jsonl", lines(b"\0" * 100), r":4: not valid JSON"),
    "random bytes": ("a.jsonl", b"\x89PNG\r\n\x1a\n" + os.urandom(5000), r":1: not UTF-8"),
    "UTF-16": ("a.jsonl", "\n".join(GOOD).encode("utf-16"), r":1: not UTF-8"),
    "Latin-1": ("a.jsonl", lines(json.dumps(row("caf\xe9"), ensure_ascii=False).encode("latin-1")), r":4: not UTF-8"),
    "empty": ("a.jsonl", b"", r": the file is empty"),
    "blank lines only": ("a.jsonl", b"\n \n\n", r": the file is empty"),
    "empty gz": ("a.jsonl.gz", gzip.compress(b""), r": the file is empty"),
    "a number": ("a.jsonl", lines("17"), r":4: a JSON object was expected, not int"),
    "null": ("a.jsonl", lines("null"), r":4: a JSON object was expected, not NoneType"),
    "a list in a line": ("a.jsonl", lines("[1, 2]"), r":4: a JSON object was expected, not list"),
    "missing columns": ("a.jsonl", lines('{"text": "hello"}'), r":4: neither `conversations` nor `messages`"),
    "10 MB line of garbage": ("a.jsonl", lines("x" * 10_000_000), r":4: not valid JSON"),
    "nested too deep": ("a.jsonl", lines(DEEP), r":4: not readable JSON"),
    "number without end": ("a.jsonl", lines('{"conversations": ' + "9" * 5000 + "}"), r":4: not readable JSON"),
    "pretty-printed": ("a.json", json.dumps(row(), indent=1).encode(), r":1: not valid JSON"),
    "web page": ("a.json", b"<!DOCTYPE html>\n<html></html>\n", r":1: not valid JSON"),
    "array broken": ("a.json", f"[{GOOD[0]},\n{GOOD[1]},\n{{oops\n]".encode(), r":3: not valid JSON"),
    "array without commas": ("a.json", f"[{GOOD[0]}\n{GOOD[1]}]".encode(), r":2: not valid JSON"),
    "array without end": ("a.json", f"[{GOOD[0]},\n{GOOD[1]}".encode(), r":2: not valid JSON"),
    "two arrays": ("a.json", f"[{GOOD[0]}]\n\n[{GOOD[1]}]".encode(), r":3: text after the end of the array"),
    "text far behind an array": ("a.json", b"[]" + b"\n" * (1 << 20) + b"]", rf":{(1 << 20) + 1}: text after the end"),
    "array of strings": ("a.json", b'["a", "b"]', r":1: a JSON object was expected, not str"),
    "empty array": ("a.json", b"[]", r": the file is empty"),
    "gz cut off": ("a.jsonl.gz", gzip.compress(MANY)[:-3000], r":\d+: the compressed file is broken here"),
    "gz damaged": ("a.jsonl.gz", damaged(gzip.compress(MANY)), r":\d+: (the compressed file is broken|not )"),
    "gz bomb": (
        "a.jsonl.gz",
        gzip.compress(b" " * 150_000_000),
        r":1: (a line of more than 64 MB|the compressed file)",
    ),
    "gz bomb of lines": ("a.json.gz", gzip.compress((b" " * 4095 + b"\n") * 40_000), r"the compressed file expands to"),
    "gz bomb in an array": (
        "a.json.gz",
        gzip.compress(b"[" + b" " * 150_000_000),
        r":1: (the compressed file|not valid)",
    ),
    "zst cut off": (
        "a.jsonl.zst",
        zstandard.compress(MANY)[:-3000],
        r":\d+: (the compressed file is broken|not valid)",
    ),
    "zst damaged": ("a.jsonl.zst", damaged(CHECKED.compress(MANY)), r":\d+: (the compressed file is broken|not )"),
    "parquet cut off": ("a.parquet", table([row()] * 50)[:-30], r":1: not a readable Parquet file"),
    "parquet damaged": ("a.parquet", table([row()] * 50)[:40] + bytes(99), r":1: not a readable Parquet file"),
    "parquet without the columns": ("a.parquet", table([{"text": "a"}]), r":1: neither `conversations` nor"),
    "empty parquet": ("a.parquet", table([row()])[:0] + b"PAR1", r":1: not a readable Parquet file"),
}
THROUGH_PREPARE = ("array broken", "bad JSON", "gz cut off")
COLUMNS = ("missing columns", "parquet without the columns")  # which a reader of rows does not know
# (line, reason in the manifest)
DROPS = [
    (answer("a\0b"), "bad_characters"),
    ('{"conversations": [{"from": "human", "value": "\\ud83d"}]}', "bad_characters"),
    ('{"conversations": "hello"}', "no_turns"),
    ('{"messages": null}', "no_turns"),
    ('{"messages": NaN}', "no_turns"),
    ('{"messages": []}', "no_turns"),
    ('{"messages": ["a", "b"]}', "malformed_turn"),
    ('{"messages": [{"content": "a"}]}', "malformed_turn"),
    (turns(("human", "a"), ("oracle", "b")), "unknown_role"),
    (turns((7, "a"), ("gpt", "b")), "unknown_role"),
    (answer(7), "not_text"),
    (answer({"a": 1}), "not_text"),
    (answer([{"type": "image_url", "image_url": "x"}]), "not_text"),
    (turns(("human", None), ("gpt", None)), "no_answer"),
    (turns(("gpt", "Hello!")), "no_answer"),
    (answer("word " * 2_000_000), "huge_turn"),
    ('{"messages": [{"role": "assistant", "tool_calls": 5}]}', "tool_turn"),
    (answer("Sure.</div>Copy code`x`"), "html"),
]
assert len(ERRORS) + len(DROPS) >= 40


def content(folder) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file() and ".work" not in file.parts)
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def prepared(small_target, tmp_path_factory):
    """(folder, settings) of a prepared folder, before a second source is added."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "good.jsonl").write_bytes(lines())
    settings = [f"--target.path={small_target}", "--data.row_length=64", "--data.draft_vocab_size=64"]
    settings += ["--data.deduplicate=none", "--data.heldout_share=0", "--data.workers=1"]
    assert (
        main(["prepare", *settings, f"--data.train=[{folder / 'good.jsonl'}]", f"--data.prepared={folder / 'd'}"]) == 0
    )
    return folder, settings


def prepare_with(prepared, bad, copy=None):
    folder, settings = prepared
    out = shutil.copytree(folder / "d", copy) if copy else folder / "d"
    train = f"--data.train=[{folder / 'good.jsonl'},{bad}]"
    return out, main(["prepare", "--json", *settings, train, f"--data.prepared={out}"])


def refused(prepared, bad, message, capsys):
    before = content(prepared[0] / "d")
    out, code = prepare_with(prepared, bad)
    errors = capsys.readouterr().err
    said = [line for line in errors.splitlines() if line.startswith("eagle3-xla prepare: ")]
    assert code == 2 and len(said) == 1 and "Traceback" not in errors, errors
    assert re.search(message, said[0])
    assert len(said[0]) < 500
    assert content(out) == before


@pytest.mark.parametrize("name", sorted(ERRORS.keys() - COLUMNS))
def test_one_line_that_names_file_and_line(name, tmp_path):
    file_name, data, message = ERRORS[name]
    (tmp_path / file_name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{file_name}.*{message}") as refusal:
        list(files.read_rows(tmp_path / file_name))
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 450


@pytest.mark.parametrize("name", THROUGH_PREPARE + COLUMNS)
def test_prepare_says_it_and_leaves_its_folder_whole(name, prepared, tmp_path, capsys):
    file_name, data, message = ERRORS[name]
    (tmp_path / file_name).write_bytes(data)
    refused(prepared, tmp_path / file_name, rf"{file_name}.*{message}", capsys)


def test_counted_drops(prepared, tmp_path, capsys):
    path, expected, first = tmp_path / "a.jsonl", Counter(reason for _, reason in DROPS), {}
    path.write_bytes(lines(*(line for line, _ in DROPS)))
    for number, (_, reason) in enumerate(DROPS, 4):
        first.setdefault(reason, f"{path}:{number}")
    _, code = prepare_with(prepared, path, tmp_path / "d")
    output = capsys.readouterr()
    assert code == 0, output.err
    manifest = json.loads(output.out)
    source = manifest["sources"][1]
    assert source["read"] == 4 + len(DROPS) and source["kept"] == 4 and manifest["train"]["chats"] == 8
    assert {reason: entry["rows"] for reason, entry in source["dropped"].items()} == expected
    assert {reason: entry["first"].partition(": ")[0] for reason, entry in source["dropped"].items()} == first


def test_what_is_no_file(prepared, tmp_path, capsys):
    refused(prepared, tmp_path / "none.jsonl", r"none.jsonl: no such file", capsys)
    (tmp_path / "empty").mkdir()
    refused(prepared, tmp_path / "empty", r"empty\[train\]:1: can't be read as a dataset", capsys)
    os.mkfifo(tmp_path / "pipe.jsonl")
    refused(prepared, tmp_path / "pipe.jsonl", r"pipe.jsonl: no such file|not a file", capsys)
    refused(prepared, "some-body/some-set", r"'some-body/some-set' is neither a file nor a folder", capsys)


def test_a_line_without_end(prepared, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_ROW", 1 << 20)
    (tmp_path / "a.jsonl").write_bytes(lines("x" * (2 << 20)))
    refused(prepared, tmp_path / "a.jsonl", r"a.jsonl:4: a line of more than 1 MB", capsys)


def test_every_conversation_unusable(prepared, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"messages": []}\n{"messages": [1]}\n')
    said = r"a.jsonl: none of its 2 conversations can be used: no_turns 1 \(first: .*a.jsonl:1: .*malformed_turn 1"
    refused(prepared, tmp_path / "a.jsonl", said, capsys)


def test_bytes_that_are_only_unusual(prepared, tmp_path, capsys):
    """A byte-order mark, Windows line ends, blank lines, a gzip file by another name: read as they are meant."""
    text = b"\xef\xbb\xbf" + lines("", " ").replace(b"\n", b"\r\n")
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(text))
    out, code = prepare_with(prepared, tmp_path / "a.jsonl", tmp_path / "d")
    assert code == 0 and json.loads((out / "manifest.json").read_text())["sources"][1]["kept"] == 4
