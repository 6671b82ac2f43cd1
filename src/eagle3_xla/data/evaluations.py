"""Evaluation prompts and their answers, found again in conversations: none of them may be trained on.

Texts are compared as runs of units: words, and single characters of scripts that write no spaces, after NFKC and
case-folding. A text is found where a turn shares a run of it that is long enough; a prompt shorter than such a run
where it stands as a whole within a turn; one of a few words only where it is the whole turn. Answers count by long runs
alone.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from eagle3_xla.data.files import data_file, read_rows
from eagle3_xla.errors import UserError

# (units of a run that is enough, units of a short prompt that is looked for within turns): words, characters.
RUN, INSIDE = (13, 25), (5, 8)
# Han, kana, Thai, Lao, Tibetan, Burmese, Khmer.
SPACELESS = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
UNIT = re.compile(f"[{SPACELESS}]|[^\\W{SPACELESS}]+")
GSM8K_NOTES = re.compile(r"<<[^<>]*>>|####.*")


def units(text: str) -> list[str]:
    return UNIT.findall(unicodedata.normalize("NFKC", text).casefold())


class Evaluations:
    """The texts of evaluation files. files: of each its name and how many rows it has; `find` numbers rows over all
    files, from 0.

    Raises UserError on a row without a prompt. Forms: MT-Bench (turns), HumanEval (prompt), GSM8K (question, answer),
    MATH500 (problem, solution), Alpaca (instruction, input, output), chats.
    """

    def __init__(self, files: list[str]):
        self.files: list[tuple[str, int]] = []
        self.runs: tuple[dict[str, int], ...] = ({}, {})  # a run of words, of characters -> its row
        self.inside: tuple[dict[str, list], ...] = ({}, {})  # the first units of a short prompt -> (its units, row)
        self.whole: dict[str, int] = {}  # a whole turn -> its row
        self.same: dict[int, set[int]] = {}  # a row -> later ones with a prompt of its own, in another file say
        row_number = 0
        for name in files:
            first = row_number
            for where, row in read_rows(data_file(name)):
                prompts = list(_prompts(row))
                if not prompts:
                    raise UserError(
                        f"{where}: no evaluation prompt in this row (`turns`, `prompt`, `question`, `problem`, ...)"
                    )
                for text in prompts:
                    self._add_prompt(units(text), row_number)
                for text in _answers(row):
                    self._add_runs(units(text), row_number)
                row_number += 1
            self.files.append((Path(name).name, row_number - first))

    def find(self, turns: Iterable[str]) -> set[int]:
        """Numbers of the rows that one of the turns holds."""
        found: set[int] = set()
        for turn in map(units, turns):
            if (row := self.whole.get(" ".join(turn))) is not None:
                found.add(row)
            for runs, inside, run, start in zip(self.runs, self.inside, RUN, INSIDE):
                if runs:
                    found.update(runs[gram] for gram in grams(turn, run) if gram in runs)
                if inside:
                    for at, gram in enumerate(grams(turn, start)):
                        found.update(row for short, row in inside.get(gram, ()) if turn[at : at + len(short)] == short)
        return found.union(*(self.same[row] for row in found if row in self.same))

    def counts(self, found: Counter[tuple[int, ...]]) -> list[dict]:
        """Of each file: how many of its `rows` were found, in how many `conversations`. found: rows of a conversation
        -> how many such conversations there were."""
        first, counts = 0, []
        for name, rows in self.files:
            mine = {rows_of: {row for row in rows_of if first <= row < first + rows} for rows_of in found}
            chats = sum(found[rows_of] for rows_of, of_file in mine.items() if of_file)
            counts.append(
                {"name": name, "rows": rows, "found": len(set().union(*mine.values())), "conversations": chats}
            )
            first += rows
        return counts

    def _add_prompt(self, text: list[str], row: int) -> None:
        kind = _kind(text)
        if text:
            first = self.whole.setdefault(" ".join(text), row)
            if first != row:
                self.same.setdefault(first, set()).add(row)
        if INSIDE[kind] <= len(text) < RUN[kind]:
            self.inside[kind].setdefault(" ".join(text[: INSIDE[kind]]), []).append((text, row))
        self._add_runs(text, row)

    def _add_runs(self, text: list[str], row: int) -> None:
        kind = _kind(text)
        for gram in grams(text, RUN[kind]):
            self.runs[kind].setdefault(gram, row)


def grams(text: list[str], size: int) -> Iterator[str]:
    return (" ".join(text[i : i + size]) for i in range(len(text) - size + 1))


def _kind(text: list[str]) -> int:
    """0: mostly words, 1: mostly characters of a script without spaces."""
    return int(2 * sum(len(unit) == 1 and not unit.isascii() for unit in text) > len(text))


def _prompts(row: dict) -> Iterator[str]:
    texts = [row.get(key) for key in ("prompt", "question", "problem")]
    if isinstance(row.get("instruction"), str):
        texts.append(f"{row['instruction']} {row.get('input') or ''}".strip())
    for key in ("turns", "prompt"):  # the hub's MT-Bench has its turns' texts as `prompt`
        if isinstance(row.get(key), list):
            texts += row[key]
    yield from _texts([*texts, *_spoken(row, ("user", "human"))])


def _answers(row: dict) -> Iterator[str]:
    texts = [row.get(key) for key in ("answer", "solution", "canonical_solution", "output", "completion", "response")]
    if isinstance(row.get("reference"), list):
        texts += row["reference"]
    for text in _texts([*texts, *_spoken(row, ("assistant", "gpt"))]):
        yield text
        if "<<" in text or "####" in text:
            yield GSM8K_NOTES.sub("", text)


def _spoken(row: dict, roles: tuple[str, ...]) -> list:
    turns = [
        turn for key in ("messages", "conversations", "prompt") if isinstance(row.get(key), list) for turn in row[key]
    ]
    return [
        turn.get("content", turn.get("value"))
        for turn in turns
        if isinstance(turn, dict) and turn.get("role", turn.get("from")) in roles
    ]


def _texts(values: list) -> Iterator[str]:
    return (text for text in values if isinstance(text, str) and text.strip())
