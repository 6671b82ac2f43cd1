"""Evaluation prompts: files of several forms, and the published sets by name."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from eagle3_xla.data import sources
from eagle3_xla.data.clean import ROLES
from eagle3_xla.data.config import Source
from eagle3_xla.data.files import data_file, read_rows
from eagle3_xla.errors import UserError

# Hub ids; what their columns mean is found by `_turns`, in a local copy of them too.
SETS = {
    "mt-bench": Source(path="HuggingFaceH4/mt_bench_prompts"),
    "humaneval": Source(path="openai/openai_humaneval", split="test"),
    "gsm8k": Source(path="openai/gsm8k", file="main/test-00000-of-00001.parquet"),  # a file by name is split "train"
    "math500": Source(path="HuggingFaceH4/MATH-500", split="test"),
    "alpaca": Source(path="tatsu-lab/alpaca"),
}
FORMS = "`conversations`, `messages`, `turns`, `prompt`, `question`, `problem`, `instruction`"


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
    return {"name": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def _set(name: str) -> Source | None:
    return None if Path(name).exists() else SETS.get(name)


def _rows(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    source = _set(name)
    return read_rows(data_file(name)) if source is None else sources.rows(source, 0)


def _prompt(where: str, row: dict[str, Any]) -> Prompt:
    turns, role_key, text_key = _turns(where, row), "role", "content"
    if not isinstance(turns, list):
        raise UserError(f"{where}: the conversation is not a list of turns")
    if "conversations" in row:
        role_key, text_key = "from", "value"
    messages: list[dict[str, str]] = []
    for turn in turns:
        messages.append(_message(turn, role_key, text_key, where))
        if messages[-1]["role"] == "user":
            break
    if not messages or messages[-1]["role"] != "user":
        raise UserError(f"{where}: no user turn to ask")
    users = [role for role, ours in ROLES.items() if ours == "user"]
    rest = [turn for turn in turns[len(messages) :] if isinstance(turn, dict) and turn.get(role_key) in users]
    later = [_message(turn, role_key, text_key, where)["content"] for turn in rest]
    asked = [message for message in messages if message["role"] in ("system", "user")]
    return Prompt(asked, later, str(row.get("category") or ""), str(row.get("source") or ""))


def _turns(where: str, row: dict[str, Any]) -> Any:
    """The row's conversation: MT-Bench (`turns`, or a list of texts as `prompt`), HumanEval (`prompt`), GSM8K
    (`question`), MATH500 (`problem`), Alpaca (`instruction`, `input`), chats."""

    def of_user(texts: list[Any]) -> list[Any]:
        return [text if isinstance(text, dict) else {"role": "user", "content": text} for text in texts]

    if "prompt" in row:
        return of_user(row["prompt"] if isinstance(row["prompt"], list) else [row["prompt"]])
    if isinstance(row.get("turns"), list):
        return of_user(row["turns"])
    for key in ("messages", "conversations"):
        if key in row:
            return row[key]
    for key in ("question", "problem"):
        if key in row:
            return of_user([row[key]])
    if "instruction" in row:
        given = row.get("input") or ""
        return of_user([f"{row['instruction']}\n\n{given}" if given else row["instruction"]])
    raise UserError(f"{where}: none of {FORMS} in this row")


def _message(turn: Any, role_key: str, text_key: str, where: str) -> dict[str, str]:
    if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
        raise UserError(f"{where}: a turn needs `{role_key}` and `{text_key}`")
    role, text = turn[role_key], turn[text_key]
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"{where}: unknown role {role!r}; known: {', '.join(ROLES)}")
    if not isinstance(text, str):
        raise UserError(f"{where}: the text of a {role} turn is {type(text).__name__}, not a string")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"{where}: the text of a {role} turn holds half a character (a lone surrogate)")
    return {"role": ROLES[role], "content": text}
