"""What must not be in the training data: duplicates, near-duplicates (MinHash) and evaluation prompts."""

import hashlib
import json
import re

from tqdm import tqdm

from eagle3_xla.config import DataConfig, UserError
from eagle3_xla.data.clean import Chat
from eagle3_xla.data.files import data_file, read_rows
from eagle3_xla.data.parallel import batched, ordered_map

CHUNK = 500  # conversations a worker gets at a time
SIMILAR, PERMUTATIONS, BANDS = 0.8, 128, 16  # near-duplicates: estimated Jaccard similarity of the word 5-grams
SHINGLE, SHINGLED_WORDS = 5, 2000
CONTAMINATED = 13  # words in a row shared with an evaluation prompt
WORD = re.compile(r"\w+")


def read_chat(path: str, offset: int) -> Chat:
    """One conversation of a spool (mix.py)."""
    with open(path, "rb") as file:
        file.seek(offset)
        return Chat(**json.loads(file.readline()))


class Filters:
    """Duplicates and evaluation prompts, over all sources in their order: the first of several equals stays."""

    def __init__(self, data: DataConfig):
        self.data = data
        self.grams, self.prompts = _evaluation_text(data.decontaminate)
        self.seen: set[bytes] = set()
        self.hashes: list = []
        if data.deduplicate == "near":
            from rensa import RMinHashLSH

            self.index = RMinHashLSH(SIMILAR, PERMUTATIONS, BANDS)

    def pick(self, path: str, dropped: dict, offsets, want: int | None, heldout: bool = False):
        """Offsets of the conversations to use, at most `want`; what is left out is counted in `dropped`.

        Held-out conversations are only remembered, so that none of them is trained on.
        """
        left = len(offsets) if want is None else want
        if self.data.deduplicate == "none" and not (self.data.decontaminate and not heldout):
            yield from (int(offset) for offset in offsets[:left])
            return
        chunks = ((path, chunk) for chunk in batched(map(int, offsets), CHUNK))
        arguments = (self.data.deduplicate, self.grams, self.prompts)
        with tqdm(total=len(offsets), desc="duplicates", unit="chat", delay=2) as bar:
            if not left:
                return
            for features in ordered_map(_Features, arguments, chunks, self.data.workers):
                for where, offset, exact, near, contaminated in features:
                    bar.update()
                    reason = None if heldout else self._reason(exact, near, contaminated)
                    if reason:
                        entry = dropped.setdefault(reason, {"rows": 0, "first": where})
                        entry["rows"] += 1
                        continue
                    self._remember(exact, near)
                    yield offset
                    left -= 1
                    if not left:
                        return

    def _reason(self, exact: bytes, near, contaminated: bool) -> str | None:
        if contaminated:
            return "evaluation_prompt"
        if self.data.deduplicate == "none":
            return None
        if exact in self.seen:
            return "duplicate"
        if near is not None and any(near.jaccard(self.hashes[key]) >= SIMILAR for key in self.index.query(near)):
            return "near_duplicate"
        return None

    def _remember(self, exact: bytes, near) -> None:
        self.seen.add(exact)
        if near is not None:
            self.index.insert(len(self.hashes), near)
            self.hashes.append(near)


class _Features:
    """In a worker: (spool, offsets) -> where, offset, hash, MinHash and contamination of each conversation."""

    def __init__(self, deduplicate: str, grams: frozenset, prompts: frozenset):
        self.deduplicate, self.grams, self.prompts = deduplicate, grams, prompts

    def __call__(self, chunk: tuple[str, list[int]]) -> list[tuple]:
        path, offsets = chunk
        return [self._features(read_chat(path, offset), offset) for offset in offsets]

    def _features(self, chat: Chat, offset: int) -> tuple:
        turns = [WORD.findall(message["content"].lower()) for message in chat.messages if message["role"] != "system"]
        words = [word for turn in turns for word in turn]
        exact = hashlib.sha256(
            "\n".join(m["content"] for m in chat.messages if m["role"] != "system").encode()
        ).digest()
        near = None
        if self.deduplicate == "near" and len(words) >= SHINGLE:
            from rensa import RMinHash

            near = RMinHash(PERMUTATIONS, 0)
            near.update(_grams(words[:SHINGLED_WORDS], SHINGLE))
        contaminated = bool(self.grams) and not self.grams.isdisjoint(_grams(words, CONTAMINATED))
        contaminated = contaminated or (bool(self.prompts) and any(" ".join(turn) in self.prompts for turn in turns))
        return chat.where, offset, exact, near, contaminated


def _grams(words: list[str], size: int) -> list[str]:
    return [" ".join(words[i : i + size]) for i in range(len(words) - size + 1)]


def _evaluation_text(files: list[str]) -> tuple[frozenset, frozenset]:
    """Word n-grams of the evaluation prompts, and the prompts that are too short for one, in the forms of MT-Bench
    (turns), HumanEval (prompt), GSM8K (question), MATH500 (problem), Alpaca (instruction, input) and chats."""
    grams, prompts = set(), set()
    for name in files:
        for where, row in read_rows(data_file(name)):
            texts = _prompt_texts(row)
            if not texts:
                raise UserError(
                    f"{where}: no evaluation prompt in this row (`turns`, `prompt`, `question`, `problem`, ...)"
                )
            for text in texts:
                words = WORD.findall(text.lower())
                if 0 < len(words) < CONTAMINATED:
                    prompts.add(" ".join(words))
                grams.update(_grams(words, CONTAMINATED))
    return frozenset(grams), frozenset(prompts)


def _prompt_texts(row: dict) -> list[str]:
    texts = [row.get(key) for key in ("prompt", "question", "problem")]
    if isinstance(row.get("instruction"), str):
        texts.append(f"{row['instruction']} {row.get('input') or ''}".strip())
    if isinstance(row.get("turns"), list):
        texts += row["turns"]
    for key in ("messages", "conversations"):
        for turn in row.get(key) or []:
            if isinstance(turn, dict) and turn.get("role", turn.get("from")) in ("user", "human"):
                texts.append(turn.get("content", turn.get("value")))
    return [text for text in texts if isinstance(text, str) and text.strip()]
