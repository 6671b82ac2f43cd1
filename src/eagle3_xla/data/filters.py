"""What must not be in the training data: duplicates, near-duplicates (MinHash) and evaluation prompts."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from eagle3_xla.data.clean import Chat
from eagle3_xla.data.config import DataConfig
from eagle3_xla.data.evaluations import Evaluations, grams
from eagle3_xla.data.parallel import batched, ordered_map
from eagle3_xla.data.seen import PERMUTATIONS, Seen
from eagle3_xla.data.spool import read_chat

CHUNK = 500  # conversations a worker gets at a time
SHINGLE, SHINGLED_WORDS = 5, 2000  # of a conversation the words that a row may hold, and no fewer than so many
WORD = re.compile(r"\w+")


def shingled_words(data: DataConfig) -> int:
    """How many words of a conversation near-duplicates are found by."""
    return max(SHINGLED_WORDS, data.row_length)


class Filters:
    """Duplicates and evaluation prompts, over all sources in their order: the first of several equals stays.

    work: where the database of what was seen lies; found: evaluation rows of a conversation -> how many such.
    """

    def __init__(self, data: DataConfig, work: Path):
        self.data = data
        self.evaluations = Evaluations(data.decontaminate)
        self.found: Counter[tuple[int, ...]] = Counter()
        self.seen = Seen(work / "seen.sqlite") if data.deduplicate != "none" else None

    def pick(
        self, path: str, dropped: dict[str, dict], offsets: np.ndarray, want: int | None, heldout: bool = False
    ) -> Iterator[int]:
        """Offsets of the conversations to use, at most `want`; what is left out is counted in `dropped`.

        Held-out conversations are only remembered, so that none of them is trained on.
        """
        left = len(offsets) if want is None else want
        if not self.seen and not (self.data.decontaminate and not heldout):
            yield from (int(offset) for offset in offsets[:left])
            return
        chunks = ((path, chunk) for chunk in batched(map(int, offsets), CHUNK))
        arguments = (self.data.deduplicate, self.evaluations, shingled_words(self.data))
        with tqdm(total=len(offsets), desc="duplicates", unit="chat", delay=2) as bar:
            if not left:
                return
            for features in ordered_map(_Features, arguments, chunks, self.data.workers):
                for where, offset, exact, signature, rows in features:
                    bar.update()
                    reason = None if heldout else self._reason(exact, signature, rows)
                    if reason:
                        entry = dropped.setdefault(reason, {"rows": 0, "first": where})
                        entry["rows"] += 1
                        continue
                    if self.seen:
                        self.seen.add(exact, signature)
                    yield offset
                    left -= 1
                    if not left:
                        return

    def _reason(self, exact: bytes, signature: bytes | None, rows: set[int]) -> str | None:
        if rows:
            self.found[tuple(sorted(rows))] += 1
            return "evaluation_prompt"
        if not self.seen:
            return None
        if self.seen.has(exact):
            return "duplicate"
        if signature is not None and self.seen.has_similar(signature):
            return "near_duplicate"
        return None

    def close(self) -> None:
        if self.seen:
            self.seen.close()


class _Features:
    """In a worker: (spool, offsets) -> where, offset, hash, MinHash and evaluation rows of each conversation."""

    def __init__(self, deduplicate: str, evaluations: Evaluations, words: int):
        self.deduplicate, self.evaluations, self.words = deduplicate, evaluations, words

    def __call__(self, chunk: tuple[str, list[int]]) -> list[tuple]:
        path, offsets = chunk
        return [self._features(read_chat(path, offset), offset) for offset in offsets]

    def _features(self, chat: Chat, offset: int) -> tuple:
        texts = [message["content"] for message in chat.messages if message["role"] != "system"]
        texts += [json.dumps(message["tool_calls"]) for message in chat.messages if "tool_calls" in message]
        thoughts = [message.get("reasoning_content", "") for message in chat.messages]
        rows = self.evaluations.find([*texts, *filter(None, thoughts)]) if self.evaluations.files else set()
        exact = hashlib.sha256("\n".join(texts).encode()).digest()
        signature = None
        words = [word for text in texts for word in WORD.findall(text.lower())] if self.deduplicate == "near" else []
        if len(words) >= SHINGLE:
            from rensa import RMinHash

            near = RMinHash(PERMUTATIONS, 0)
            near.update(list(grams(words[: self.words], SHINGLE)))
            signature = np.array(near.digest(), np.uint32).tobytes()
        return chat.where, offset, exact, signature, rows
