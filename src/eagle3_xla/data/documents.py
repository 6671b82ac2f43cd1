"""Conversations of the mix -> token ids and masks, in parallel; each chunk is kept until the run is done."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from tqdm import tqdm

from eagle3_xla.config import DataConfig
from eagle3_xla.data.chat import ChatEncoder
from eagle3_xla.data.clean import Unusable
from eagle3_xla.data.filters import read_chat
from eagle3_xla.data.parallel import batched, ordered_map
from eagle3_xla.data.tokenizer import load_tokenizer

CHUNK = 250  # conversations a worker gets at a time


@dataclass
class Documents:
    """Tokenised conversations of a split, in order.

    ids [sum of lengths] int32 and mask, bool, one after the other; lengths [n]; source [n]: index into `sources`;
    spool [n]: index into `spools`, the files they come from; cut [n]: longer than a row; dropped: for each
    spool the reasons, with their count and first case.
    """

    ids: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    source: np.ndarray
    sources: list[str]
    spool: np.ndarray
    spools: list[str]
    cut: np.ndarray
    dropped: dict[str, dict]

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def starts(self) -> np.ndarray:
        return np.cumsum(self.lengths) - self.lengths

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        start, length = int(self.starts[index]), int(self.lengths[index])
        return self.ids[start : start + length], self.mask[start : start + length]

    def tokens_of(self, spool: str) -> dict[str, int]:
        """Conversations, tokens and answer tokens that come from one spool."""
        mine = self.spool == (self.spools.index(spool) if spool in self.spools else -1)
        tokens = np.repeat(mine, self.lengths)
        return {
            "chats": int(mine.sum()),
            "tokens": int(tokens.sum()),
            "answer_tokens": int((self.mask & tokens).sum()),
        }

    def first(self, count: int) -> "Documents":
        end = int(self.lengths[:count].sum())
        columns = {name: getattr(self, name)[:count] for name in ("lengths", "source", "spool", "cut")}
        return replace(self, ids=self.ids[:end], mask=self.mask[:end], **columns)


def tokenize(chats: list[tuple[str, int]], target: str, stop_ids: set[int], data: DataConfig, work: Path) -> Documents:
    """Tokenise the conversations (spool file, offset). Chunks that lie in `work` already are not done again."""
    work.mkdir(parents=True, exist_ok=True)
    files = [work / f"chunk-{number:05d}.npz" for number in range(-(-len(chats) // CHUNK))]
    missing = [
        (str(file), chunk) for file, chunk in zip(files, batched(chats, CHUNK), strict=True) if not file.exists()
    ]
    arguments = (target, stop_ids, data)
    with tqdm(total=len(files) * CHUNK, desc=f"tokenise {work.name}", unit="chat", delay=2) as bar:
        bar.update((len(files) - len(missing)) * CHUNK)
        for _ in ordered_map(_Tokenizer, arguments, missing, data.workers):
            bar.update(CHUNK)
    return _gather(files)


def _gather(files: list[Path]) -> Documents:
    types = {"ids": np.int32, "mask": bool, "lengths": np.int64, "source": np.int64, "spool": np.int64, "cut": bool}
    columns: dict[str, list[np.ndarray]] = {name: [np.empty(0, kind)] for name, kind in types.items()}
    names: dict[str, dict[str, int]] = {"source": {}, "spool": {}}
    dropped: dict[str, dict] = {}
    for file in files:
        with np.load(file) as chunk:
            for name, kind in types.items():
                column = chunk[name]
                if name in names:
                    column = [names[name].setdefault(str(value), len(names[name])) for value in column]
                columns[name].append(np.asarray(column, kind))
            for spool, reason, message in chunk["dropped"]:
                entry = dropped.setdefault(str(spool), {}).setdefault(str(reason), {"rows": 0, "first": str(message)})
                entry["rows"] += 1
    arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
    return Documents(**arrays, sources=list(names["source"]), spools=list(names["spool"]), dropped=dropped)


class _Tokenizer:
    """In a worker: (file to write, conversations) -> the chunk's file."""

    def __init__(self, target: str, stop_ids: set[int], data: DataConfig):
        self.encoder = ChatEncoder(load_tokenizer(target), stop_ids, data)

    def __call__(self, chunk: tuple[str, list[tuple[str, int]]]) -> None:
        file, chats = Path(chunk[0]), [read_chat(path, offset) for path, offset in chunk[1]]
        kept, dropped = [], []
        for chat, (spool, _), item in zip(chats, chunk[1], self.encoder.encode(chats)):
            if isinstance(item, Unusable):
                dropped.append((spool, item.reason, f"{chat.where}: {item}"))
            else:
                kept.append((chat.source, spool, item))
        partial = file.with_name(f"partial-{file.name}")
        np.savez(
            partial,
            ids=np.concatenate([np.empty(0, np.int32), *(item.ids for _, _, item in kept)]),
            mask=np.concatenate([np.empty(0, bool), *(item.mask for _, _, item in kept)]),
            lengths=np.array([len(item.ids) for _, _, item in kept], np.int64),
            source=np.array([source for source, _, _ in kept], str),
            spool=np.array([spool for _, spool, _ in kept], str),
            cut=np.array([item.cut for _, _, item in kept], bool),
            dropped=np.array(dropped, str).reshape(-1, 3),
        )
        partial.replace(file)
