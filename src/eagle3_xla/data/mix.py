"""Sources -> the recipe's mix: cleaned, without duplicates and evaluation prompts, in their shares.

Everything of a conversation but its place in a spool stays on disk, so that a million of them fit.
"""

import random
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eagle3_xla.data import sources
from eagle3_xla.data.config import DataConfig, Source
from eagle3_xla.data.filters import Filters
from eagle3_xla.data.spool import Chats, Spool, spool
from eagle3_xla.data.workfiles import read_work_file, write_work_file
from eagle3_xla.errors import UserError


@dataclass
class Mix:
    """The conversations of each split; sources: reports by spool file; evaluations: what was found of each file."""

    train: Chats
    heldout: Chats
    sources: dict[str, dict]
    evaluations: list[dict]
    warnings: list[str]


def mix(data: DataConfig, work: Path, questions: bool = False) -> Mix:
    """The training and held-out conversations of the recipe; `work` holds the spools and what was chosen.

    questions: the answers will be replaced, so they may be missing or unusable (clean.py).
    """
    if not data.train:
        raise UserError("setting data.train is empty; name at least one source of chats")
    given = [(f"heldout-{n}", source) for n, source in enumerate(map(sources.resolve, data.heldout))]
    given += [(f"train-{n}", source) for n, source in enumerate(map(sources.resolve, data.train))]
    if stored := read_work_file(work / "mix"):  # of spools that were whole; those that no longer are, are written again
        spools = [spool(source, data, work / name, questions) for name, source in given]
        return _restored(spools, *stored)
    chosen = _choose(data, given, work, questions)
    meta = {"reports": list(chosen.sources.values()), "evaluations": chosen.evaluations, "warnings": chosen.warnings}
    meta |= {"train": len(chosen.train)}
    columns = [
        getattr(chats, name).tobytes() for name in ("spool", "offset") for chats in (chosen.train, chosen.heldout)
    ]
    write_work_file(work / "mix", meta, b"".join(columns))
    return chosen


def _restored(spools: list[Spool], meta: dict, data: memoryview) -> Mix:
    paths = [str(each.path) for each in spools]
    spool_column, offsets = np.frombuffer(data, np.int64).reshape(2, -1)
    split = meta["train"]
    train, heldout = (Chats(paths, spool_column[part], offsets[part]) for part in (slice(split), slice(split, None)))
    return Mix(train, heldout, dict(zip(paths, meta["reports"])), meta["evaluations"], meta["warnings"])


def _choose(data: DataConfig, given: list[tuple[str, Source]], work: Path, questions: bool) -> Mix:
    filters = Filters(data, work)
    reports, warnings, paths = {}, [], [str(work / name / "chats.jsonl") for name, _ in given]
    columns = {split: (array("q"), array("q")) for split in ("train", "heldout")}
    wanted = [source.cap or None for source in data.heldout] + _wanted(data)
    for number, ((name, source), want) in enumerate(zip(given, wanted, strict=True)):
        split, place = name.split("-")
        spooled = spool(source, data, work / name, questions)
        offsets = spooled.offsets
        if want is not None and want < len(offsets):
            offsets = np.random.default_rng([data.seed, int(split == "train"), int(place)]).permutation(offsets)
        picked = filters.pick(paths[number], spooled.report["dropped"], offsets, want, split == "heldout")
        chosen = array("q", picked)
        reports[paths[number]] = spooled.report | {"kept": len(chosen)}
        held = set()
        if split == "train" and not data.heldout and data.heldout_share:
            count = min(max(1, round(data.heldout_share * len(chosen))), len(chosen) - 1)
            held = set(random.Random(f"{data.seed} {place}").sample(range(len(chosen)), max(count, 0)))
        for i, offset in enumerate(chosen):
            spool_column, offset_column = columns["heldout" if i in held else split]
            spool_column.append(number)
            offset_column.append(offset)
        if split == "train" and source.share and len(chosen) < (want or 0):
            label = sources.label(source)
            warnings.append(f"{label} has {len(chosen)} usable conversations of the {want} of its share")
    filters.close()
    train, heldout = (
        Chats(paths, *(np.asarray(column, np.int64) for column in columns[split])) for split in ("train", "heldout")
    )
    train = train.at(np.random.default_rng([data.seed, 2]).permutation(len(train)))
    return Mix(train, heldout, reports, filters.evaluations.counts(filters.found), warnings)


def _wanted(data: DataConfig) -> list[int | None]:
    """How many conversations of each training source; None: all of them."""
    total = sum(source.share for source in data.train)
    wanted = []
    for source in data.train:
        limits = [round(data.conversations * source.share / total)] if source.share else []
        limits += [source.cap] if source.cap else []
        wanted.append(min(limits) if limits else None)
    return wanted
