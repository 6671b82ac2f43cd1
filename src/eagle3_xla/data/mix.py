"""Sources -> the recipe's mix: cleaned, without duplicates and evaluation prompts, in their shares.

Cleaned conversations lie in a spool, one JSONL file per source, so that a source may be larger than memory. A spool
that is complete is read again when an interrupted run goes on.
"""

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from eagle3_xla.config import DataConfig, Source, UserError
from eagle3_xla.data import sources
from eagle3_xla.data.clean import Repairs, Unusable, clean, clean_questions
from eagle3_xla.data.filters import Filters
from eagle3_xla.data.parallel import batched, ordered_map

CHUNK = 500  # rows a worker gets at a time


@dataclass
class Spooled:
    """One source's cleaned conversations: offsets [n] of their lines in `path`; report: its part of the manifest."""

    path: Path
    offsets: np.ndarray
    report: dict


@dataclass
class Mix:
    """Conversations in the order in which they are used, as (spool file, offset); sources: reports by spool file."""

    train: list[tuple[str, int]]
    heldout: list[tuple[str, int]]
    sources: dict[str, dict]
    warnings: list[str]


def mix(data: DataConfig, work: Path, questions: bool = False) -> Mix:
    """The training and held-out conversations of the recipe; `work` holds the spools.

    questions: the answers will be replaced, so they may be missing or unusable (clean.py).
    """
    if not data.train:
        raise UserError("setting data.train is empty; name at least one source of chats")
    filters = Filters(data)
    result = Mix([], [], {}, [])

    def choose(
        source: Source, folder: str, order_seed: list[int], want: int | None, heldout: bool = False
    ) -> list[tuple[str, int]]:
        spool = _spool(source, data, work / folder, questions)
        offsets = spool.offsets
        if want is not None and want < len(offsets):
            offsets = np.random.default_rng(order_seed).permutation(offsets)
        report = spool.report
        chosen = list(filters.pick(str(spool.path), report["dropped"], offsets, want, heldout))
        result.sources[str(spool.path)] = report | {"kept": len(chosen)}
        return [(str(spool.path), offset) for offset in chosen]

    for number, source in enumerate(map(sources.resolve, data.heldout)):
        result.heldout += choose(source, f"heldout-{number}", [data.seed, 0, number], source.cap or None, heldout=True)
    for number, (source, want) in enumerate(zip(map(sources.resolve, data.train), _wanted(data))):
        chosen = choose(source, f"train-{number}", [data.seed, 1, number], want)
        if source.share and len(chosen) < (want or 0):
            name = sources.label(source)
            result.warnings.append(f"{name} has {len(chosen)} usable conversations of the {want} of its share")
        held = set()
        if not data.heldout and data.heldout_share:
            count = min(max(1, round(data.heldout_share * len(chosen))), len(chosen) - 1)
            held = set(random.Random(f"{data.seed} {number}").sample(range(len(chosen)), max(count, 0)))
        result.heldout += [chat for i, chat in enumerate(chosen) if i in held]
        result.train += [chat for i, chat in enumerate(chosen) if i not in held]
    random.Random(data.seed).shuffle(result.train)
    return result


def _wanted(data: DataConfig) -> list[int | None]:
    """How many conversations of each training source; None: all of them."""
    total = sum(source.share for source in data.train)
    wanted = []
    for source in data.train:
        limits = [round(data.conversations * source.share / total)] if source.share else []
        limits += [source.cap] if source.cap else []
        wanted.append(min(limits) if limits else None)
    return wanted


def _spool(source: Source, data: DataConfig, folder: Path, questions: bool) -> Spooled:
    """The source read, cleaned and written to `folder`, or what an earlier run wrote there whole."""
    path, index = folder / "chats.jsonl", folder / "index.npz"
    if index.exists():
        stored = np.load(index)
        return Spooled(path, stored["offsets"], json.loads(str(stored["report"])))
    folder.mkdir(parents=True, exist_ok=True)
    name = sources.label(source)
    read, dropped, repaired, offsets = 0, {}, {}, []
    chunks = batched(sources.rows(source, data.seed), CHUNK)
    with path.open("wb") as file, tqdm(desc=f"read {name}", unit="chat", delay=2) as bar:
        for chats, reasons, repairs in ordered_map(_Cleaner, (source, name, data, questions), chunks, data.workers):
            for line in chats:
                offsets.append(file.tell())
                file.write(line)
            for reason, where, message in reasons:
                entry = dropped.setdefault(reason, {"rows": 0, "first": f"{where}: {message}"})
                entry["rows"] += 1
            for kind, count in repairs.items():
                repaired[kind] = repaired.get(kind, 0) + count
            read += len(chats) + len(reasons)
            bar.update(len(chats) + len(reasons))
    if not offsets:
        why = "; ".join(f"{reason} {entry['rows']} (first: {entry['first']})" for reason, entry in dropped.items())
        raise UserError(f"{source.path}: none of its {read} conversations can be used: {why}")
    report = {"name": name, "path": source.path, "read": read, "dropped": dropped, "repaired": repaired}
    partial = folder / "partial.npz"
    np.savez(partial, offsets=np.asarray(offsets, np.int64), report=json.dumps(report))
    partial.replace(index)  # last: without it the spool is written anew
    return Spooled(path, np.asarray(offsets, np.int64), report)


class _Cleaner:
    """In a worker: rows -> lines of the spool, dropped rows, repairs."""

    def __init__(self, source: Source, name: str, data: DataConfig, questions: bool):
        self.source, self.name, self.data = source, name, data
        self.clean = clean_questions if questions else clean

    def __call__(self, rows: list[tuple[str, dict]]) -> tuple[list[bytes], list[tuple], dict]:
        lines, reasons, repairs = [], [], Repairs()
        for where, row in rows:
            own = row.get("source")
            source = self.source.name or (own if isinstance(own, str) and own else self.name)
            try:
                chat = self.clean(row, where, source, self.data, repairs)
            except Unusable as reason:
                reasons.append((reason.reason, where, str(reason)))
                continue
            lines.append(json.dumps(asdict(chat), ensure_ascii=False).encode() + b"\n")
        return lines, reasons, repairs.counts
