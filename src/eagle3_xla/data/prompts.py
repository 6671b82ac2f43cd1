"""Evaluation prompts: files of several forms, and the published sets by name."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from eagle3_xla import storage
from eagle3_xla.data import sources
from eagle3_xla.data.clean import ROLES, Unusable, question_turns, questions_of
from eagle3_xla.data.config import DataConfig, Source
from eagle3_xla.data.files import data_file, read_rows
from eagle3_xla.errors import UserError

# Hub ids; what their columns mean is found by `question_turns`, in a local copy of them too.
SETS = {
    "mt-bench": Source(path="HuggingFaceH4/mt_bench_prompts"),
    "humaneval": Source(path="openai/openai_humaneval", split="test"),
    "gsm8k": Source(path="openai/gsm8k", file="main/test-00000-of-00001.parquet"),
    "math500": Source(path="HuggingFaceH4/MATH-500", split="test"),
    "alpaca": Source(path="tatsu-lab/alpaca"),
}


@dataclass
class Prompt:
    """messages: up to and including the first user turn, a system turn before it too; later: the user's later turns;
    category, source: what kind of prompt it is and where it comes from, "" where its row doesn't say."""

    messages: list[dict[str, str]]
    later: list[str]
    category: str
    source: str


def read_prompts(name: str, limit: int = 0) -> list[Prompt]:
    """The first `limit` prompts (0: all) of a file, or of a set of SETS. Raises UserError on a row without one."""
    return [_prompt(where, row) for where, row in islice(_rows(name), limit or None)]


def fingerprint(name: str) -> dict[str, str]:
    """Which prompts these are: `name`, and `sha256` of the file, or of a set's hub id and commit."""
    if (source := _set(name)) is not None:
        of = f"{source.path} {source.file} {source.split} {sources.fingerprint(source)}"
        return {"name": name, "sha256": hashlib.sha256(of.encode()).hexdigest()}
    file = data_file(name)
    if not file.is_file():
        raise UserError(f"{file}: no such file; sets that are known by name: {', '.join(SETS)}")
    return {"name": file.name, "sha256": storage.sha256(file)}


def _set(name: str) -> Source | None:
    return None if Path(name).exists() else SETS.get(name)


def _rows(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    source = _set(name)
    return read_rows(data_file(name)) if source is None else sources.rows(source, 0)


def _prompt(where: str, row: dict[str, Any]) -> Prompt:
    """Read as `regenerate` reads it (clean.py)."""
    try:
        asked = questions_of(_of_people(question_turns(row, where)), DataConfig(tool_turns="keep"), Counter())
    except Unusable as reason:
        raise UserError(f"{where}: {reason}") from None
    system = takewhile(lambda message: message["role"] == "system", asked)
    first, *later = (message["content"] for message in asked if message["role"] == "user")
    messages = [*system, {"role": "user", "content": first}]
    return Prompt(messages, later, str(row.get("category") or ""), str(row.get("source") or ""))


def _of_people(turns: Any) -> Any:
    """Without the turns that are never asked: of tools, and of unknown roles once there is a question."""
    kept, asked = [], False
    for turn in turns if isinstance(turns, list) else ():
        role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        ours = ROLES.get(role.lower(), "" if asked else "unknown") if isinstance(role, str) else "unknown"
        asked |= ours == "user"
        kept += [turn] if ours not in ("tool", "") else []
    return kept if isinstance(turns, list) else turns
