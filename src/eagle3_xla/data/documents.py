"""Conversations of the mix -> token ids and masks, in parallel; each chunk is a file until the run is done.

A chunk's file holds id * 2 + mask of each token, int32, one conversation after the other. Memory holds a few numbers of
a conversation; its tokens are read when its row is written.
"""

import os
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from eagle3_xla.data.chat import ChatEncoder
from eagle3_xla.data.clean import Unusable
from eagle3_xla.data.config import DataConfig
from eagle3_xla.data.parallel import ordered_map
from eagle3_xla.data.spool import Chats, read_chat
from eagle3_xla.data.tokenizer import load_tokenizer, small_files
from eagle3_xla.data.workfiles import read_work_file, write_work_file
from eagle3_xla.errors import UserError

CHUNK = 250  # conversations a worker gets at a time
OPEN_FILES = 128
COLUMNS: dict[str, type] = {
    "file": np.int32,
    "start": np.int64,
    "lengths": np.int64,
    "answers": np.int64,
    "source": np.int32,
}
COLUMNS |= {"spool": np.int32, "cut": bool}


@dataclass
class Documents:
    """Tokenised conversations of a split, in order; [n] each:

    file, start: where its tokens are, an index into `files` and a token's number there; lengths: tokens; answers: those
    that count; source, spool: indices into `sources` and `spools`, the folders they come from; cut: longer than a row.
    dropped: for each spool the reasons, with their count and first case; counts [vocab_size]: how often the assistant
    wrote each token.
    """

    files: list[Path]
    file: np.ndarray
    start: np.ndarray
    lengths: np.ndarray
    answers: np.ndarray
    source: np.ndarray
    sources: list[str]
    spool: np.ndarray
    spools: list[str]
    cut: np.ndarray
    dropped: dict[str, dict]
    counts: np.ndarray
    _open: OrderedDict = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Its ids, int32, and mask, bool."""
        length, start = int(self.lengths[index]), int(self.start[index])
        packed = np.frombuffer(os.pread(self._descriptor(int(self.file[index])), 4 * length, 4 * start), np.int32)
        return packed >> 1, (packed & 1).astype(bool)

    def tokens_of(self, spool: str) -> dict[str, int]:
        """Conversations, tokens and answer tokens that come from one spool."""
        mine = self.spool == (self.spools.index(spool) if spool in self.spools else -1)
        tokens, answers = int(self.lengths[mine].sum()), int(self.answers[mine].sum())
        return {"chats": int(mine.sum()), "tokens": tokens, "answer_tokens": answers}

    def first_tokens(self, count: int) -> "Documents":
        """As many of the first documents as hold `count` tokens; 0: all."""
        if not count:
            return self
        number = int((np.cumsum(self.lengths) - self.lengths < count).sum())
        return replace(self, **{name: getattr(self, name)[:number] for name in COLUMNS})

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _descriptor(self, file: int) -> int:
        """Of the files that were read last, some stay open."""
        if file not in self._open:
            self._open[file] = os.open(self.files[file], os.O_RDONLY)
            if len(self._open) > OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(file)
        return self._open[file]


def tokenize(chats: Chats, target: str, stop_ids: set[int], vocab_size: int, data: DataConfig, work: Path) -> Documents:
    """Tokenise the conversations. Chunks that lie whole in `work` already are not done again.

    Raises UserError when the tokenizer gives an id that the target, by its vocab_size, does not have.
    """
    work.mkdir(parents=True, exist_ok=True)
    files = [work / f"chunk-{number:05d}" for number in range(-(-len(chats) // CHUNK))]
    gathered = _Gathered(files, vocab_size, target)
    arguments = (small_files(target), stop_ids, data)  # the workers ask neither the hub nor the bucket
    with tqdm(total=len(chats), desc=f"tokenise {work.name}", unit="chat", delay=2) as bar:
        missing = []
        for number, file in enumerate(files):
            if gathered.take(number, file):
                bar.update(min(CHUNK, len(chats) - number * CHUNK))
            else:
                missing.append(number)
        chunks = ((str(files[number]), list(chats[number * CHUNK : (number + 1) * CHUNK])) for number in missing)
        for number, _ in zip(missing, ordered_map(_Tokenizer, arguments, chunks, data.workers), strict=True):
            if not gathered.take(number, files[number]):
                raise OSError(f"{files[number]} was written, but does not read back; is the disk sound?")
            bar.update(min(CHUNK, len(chats) - number * CHUNK))
    return gathered.documents()


class _Gathered:
    """What is known of each chunk, whatever the order in which they come."""

    def __init__(self, files: list[Path], vocab_size: int, target: str):
        self.files, self.vocab_size, self.target = files, vocab_size, target
        self.counts: np.ndarray = np.zeros(vocab_size, np.int64)
        self.columns: dict[int, dict[str, np.ndarray]] = {}
        self.names: dict[str, dict[str, int]] = {"source": {}, "spool": {}}
        self.dropped: dict[int, list] = {}

    def take(self, number: int, file: Path) -> bool:
        """Whether the chunk's file is whole."""
        stored = read_work_file(file)
        if stored is None:
            return False
        meta, tokens = stored
        packed = np.frombuffer(tokens, np.int32)
        if len(packed) and packed.max() >> 1 >= self.vocab_size:
            raise UserError(
                f"the tokenizer of {self.target!r} gives token id {packed.max() >> 1}, but config.json there says "
                f"vocab_size {self.vocab_size}: they don't belong together"
            )
        self.counts += np.bincount(packed[packed & 1 == 1] >> 1, minlength=self.vocab_size)
        lengths = np.asarray(meta["lengths"], np.int64)
        columns = {"lengths": lengths, "answers": meta["answers"], "cut": meta["cut"]}
        columns |= {"file": np.full(len(lengths), number), "start": np.cumsum(lengths) - lengths}
        for name, known in self.names.items():
            columns[name] = [known.setdefault(value, len(known)) for value in meta[name]]
        self.columns[number] = {name: np.asarray(columns[name], kind) for name, kind in COLUMNS.items()}
        self.dropped[number] = meta["dropped"]
        return True

    def documents(self) -> Documents:
        chunks = [self.columns[number] for number in range(len(self.files))]
        columns = {
            name: np.concatenate([np.empty(0, kind), *(chunk[name] for chunk in chunks)])
            for name, kind in COLUMNS.items()
        }
        dropped: dict[str, dict] = {}
        for number in range(len(self.files)):
            for spool, reason, message in self.dropped[number]:
                entry = dropped.setdefault(spool, {}).setdefault(reason, {"rows": 0, "first": message})
                entry["rows"] += 1
        names: dict[str, list[str]] = {}
        for name, known in self.names.items():  # in the order of the documents, whichever chunk came first
            used, first = np.unique(columns[name], return_index=True)
            used = used[np.argsort(first)]
            position: np.ndarray = np.zeros(len(known), np.int32)
            position[used] = np.arange(len(used))
            columns[name] = position[columns[name]]
            names[f"{name}s"] = [list(known)[index] for index in used]
        return Documents(
            self.files,
            **columns,
            sources=names["sources"],
            spools=names["spools"],
            dropped=dropped,
            counts=self.counts,
        )


class _Tokenizer:
    """In a worker: (file to write, conversations) -> the chunk's file."""

    def __init__(self, target: str, stop_ids: set[int], data: DataConfig):
        self.encoder = ChatEncoder(load_tokenizer(target), stop_ids, data)

    def __call__(self, chunk: tuple[str, list[tuple[str, int]]]) -> None:
        file, chats = Path(chunk[0]), [read_chat(path, offset) for path, offset in chunk[1]]
        kept, dropped = [], []
        # By name: the run may go on where its folder is named otherwise.
        spools = [Path(path).parent.name for path, _ in chunk[1]]
        for chat, spool, item in zip(chats, spools, self.encoder.encode(chats)):
            if isinstance(item, Unusable):
                dropped.append((spool, item.reason, f"{chat.where}: {item}"))
            else:
                kept.append((chat.source, spool, item))
        items = [item for _, _, item in kept]
        meta = {
            "lengths": [len(item.ids) for item in items],
            "answers": [int(item.mask.sum()) for item in items],
            "cut": [bool(item.cut) for item in items],
            "source": [source for source, _, _ in kept],
            "spool": [spool for _, spool, _ in kept],
            "dropped": dropped,
        }
        packed = [(item.ids << 1 | item.mask).astype(np.int32) for item in items]
        write_work_file(file, meta, np.concatenate([np.empty(0, np.int32), *packed]).tobytes())
