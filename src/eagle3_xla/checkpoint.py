"""Everything a run is, on disk: weights, moments, step, vocabulary maps, recipe. Nothing half-written is ever read.

    checkpoints/step-00000120/state.safetensors   head weights, the optimizer's moments and step, d2t, t2d
                             /meta.json           micro-step, held-out taus, recipe
                             /SHA256SUMS          of the two above; `sha256sum -c` reads it
               /.partial-*                        being written or deleted; one that a kill left goes with the next save

The folder may be a URL of an object store: there SHA256SUMS is written last and removed first, and a checkpoint without
it is none.

Batches are a pure function of (seed, micro-step) and the step has no other randomness, so the micro-step is the data
cursor and the RNG state.
"""

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from eagle3_xla import local_copies, storage
from eagle3_xla.checks import listing, mapping, number, text
from eagle3_xla.config import Recipe
from eagle3_xla.errors import UserError
from eagle3_xla.settings import binding
from eagle3_xla.storage import Location

STATE, META, SUMS = "state.safetensors", "meta.json", "SHA256SUMS"
STEP = "step-"


class SaveFailed(OSError):
    """A checkpoint could not be written; the message says why and which one remains."""


@dataclasses.dataclass
class Checkpoint:
    """micro_step: how many are done; head, optimizer: host tensors by name; d2t, t2d: the draft vocabulary's maps.

    tau: acceptance length of these weights on the held-out rows, None where it was not measured; heldout_taus: of every
    evaluation of the run so far, which `train.patience` counts.
    """

    micro_step: int
    head: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    d2t: torch.Tensor
    t2d: torch.Tensor
    recipe: dict
    data_key: str
    draft_config: dict
    tau: float | None = None
    heldout_taus: list[float] = dataclasses.field(default_factory=list)


def folder_of(folder: Location, micro_step: int) -> Location:
    """Of the checkpoint in `folder` after so many micro-steps."""
    return storage.join(folder, f"{STEP}{micro_step:08d}")


def save(folder: Location, checkpoint: Checkpoint, keep: int, warn: Callable[[str], object] = print) -> Location:
    """Write a checkpoint whole or not at all; once it is durable, drop all but the last `keep` and the best by tau.

    Returns its folder. Raises SaveFailed when the disk is full or refuses; the earlier ones are untouched then. That a
    bucket does not remove one is reported through `warn`.
    """
    final = folder_of(folder, checkpoint.micro_step)
    tensors = {f"head.{name}": value for name, value in checkpoint.head.items()}
    tensors |= {f"optimizer.{name}": value for name, value in checkpoint.optimizer.items()}
    tensors |= {"d2t": checkpoint.d2t, "t2d": checkpoint.t2d}
    named = ("micro_step", "tau", "heldout_taus", "recipe", "data_key", "draft_config")
    meta = json.dumps({name: getattr(checkpoint, name) for name in named}, indent=1)
    try:
        storage.remove_unfinished(folder, last=SUMS, prefix=STEP)
        with storage.whole_folder(final, last=SUMS) as partial:
            save_file(tensors, partial / STATE)
            (partial / META).write_text(meta)
            sums = [f"{storage.sha256(partial / name)}  {name}\n" for name in (STATE, META)]
            (partial / SUMS).write_text("".join(sums))
    except (OSError, SafetensorError) as error:
        needed = sum(tensor.nbytes for tensor in tensors.values()) + len(meta)
        raise SaveFailed(_what_remains(folder, final, needed, error)) from error
    try:
        _prune(folder, storage.base_name(final), keep)
    except OSError as error:
        if not storage.is_url(folder):
            raise
        warn(f"an old checkpoint stays until the next save ({error})")
    return final


def load_latest(folder: Location, warn: Callable[[str], object]) -> Checkpoint | None:
    """The newest checkpoint whose checksums hold; a damaged one is reported through `warn` and passed over."""
    return _first_whole(folder, reversed(_steps(folder)), warn)


def load_best(folder: Location, warn: Callable[[str], object]) -> Checkpoint | None:
    """The whole checkpoint with the highest tau; the newest one where no tau is known."""
    return _first_whole(folder, sorted(_steps(folder), key=lambda name: _rank(folder, name), reverse=True), warn)


def load(path: Location) -> Checkpoint:
    """Read one checkpoint folder. Raises UserError when it is missing or damaged."""
    sums, meta = _verified_meta(path)
    with local_copies.as_local_file(storage.join(path, STATE)) as state:
        if not _listed(sums, STATE, storage.sha256(state)):
            raise UserError(f"checkpoint {path} is damaged (the checksum of {STATE} does not hold)")
        tensors = {name: value.clone() for name, value in load_file(state).items()}  # the file is memory-mapped

    if not {"d2t", "t2d"} <= tensors.keys():
        raise UserError(f"{path}/{STATE} holds no d2t or no t2d: it is no checkpoint of ours")

    def group(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    return Checkpoint(
        head=group("head."), optimizer=group("optimizer."), d2t=tensors["d2t"], t2d=tensors["t2d"], **meta
    )


def refuse_changed_run(saved: Checkpoint, recipe: Recipe, data_key: str) -> None:
    """Raises UserError listing every setting that differs and would change the weights of the continued run."""
    sections = [section.name for section in dataclasses.fields(recipe)]
    now, defaults = ({name: binding(getattr(of, name)) for name in sections} for of in (recipe, Recipe()))
    # A setting that is newer than the run is as if it had its default.
    before = {name: defaults[name] | saved.recipe.get(name, {}) for name in sections}
    changes = [
        f"{section}.{key}: {before[section][key]!r} -> {value!r}"
        for section, settings in now.items()
        for key, value in settings.items()
        if before[section][key] != value
    ]
    if not changes and saved.data_key != data_key:
        changes = [f"the content of data.prepared ({recipe.data.prepared}) or of the target"]
    if changes:
        raise UserError(
            f"{recipe.train.out} holds a run of another recipe, so it can't be continued; "
            f"changed: {'; '.join(changes)}. Give the old settings back, or name another train.out"
        )


def _steps(folder: Location) -> list[str]:
    """Names of the checkpoints in it, the newest last."""
    return storage.whole_folders(folder, last=SUMS, prefix=STEP)


def _first_whole(folder: Location, names: Iterable[str], warn: Callable[[str], object]) -> Checkpoint | None:
    for name in names:
        try:
            return load(storage.join(folder, name))
        except UserError as error:
            warn(f"{error}; it is passed over")
    return None


def _rank(folder: Location, name: str) -> tuple[float, str]:
    """Order by tau, then by step; a checkpoint without one, or whose meta.json is damaged, comes before all others."""
    try:
        tau = _verified_meta(storage.join(folder, name))[1]["tau"]
    except UserError:
        tau = None
    return (-math.inf if tau is None or math.isnan(tau) else tau, name)


def _prune(folder: Location, newest: str, keep: int) -> None:
    """Steps after `newest` are damaged ones that the run passed over when it resumed: they must not fill `keep`."""
    steps = _steps(folder)
    own = [name for name in steps if name <= newest]
    kept = [*own[-keep:], max(own, key=lambda name: _rank(folder, name))]
    for name in steps:
        if name not in kept:
            storage.remove(storage.join(folder, name), first=SUMS)


def _what_remains(folder: Location, final: Location, needed: int, error: Exception) -> str:
    # safetensors says "Error while serializing: I/O error: No space left on device (os error 28)".
    reason = getattr(error, "strerror", None) or str(error)
    if isinstance(error, SafetensorError):
        reason = reason.rpartition(": ")[2].partition(" (os error")[0]
    try:
        free = "" if storage.is_url(folder) else f", {shutil.disk_usage(folder).free:,} bytes are free there"
        newest = _newest_whole(folder)
    except OSError:
        free, newest = ", the folder can't be read", None
    remaining = f"{storage.join(folder, newest)} is whole" if newest else "no earlier checkpoint is there"
    remedy = "mend that" if storage.is_url(folder) else "make room"
    return (
        f"checkpoint {final} could not be written ({reason}): it takes {needed:,} bytes{free}. "
        f"{remaining}; {remedy} and start again to continue"
    )


def _newest_whole(folder: Location) -> str | None:
    """Name of the newest checkpoint; in a bucket those that have their checksums are whole, and none is read for it."""
    if storage.is_url(folder):
        return max(_steps(folder), default=None)
    saved = _first_whole(folder, reversed(_steps(folder)), warn=lambda _: None)
    return storage.base_name(folder_of(folder, saved.micro_step)) if saved else None


def _verified_meta(path: Location) -> tuple[bytes, dict]:
    """(SHA256SUMS, meta.json) of a checkpoint."""
    if not {STATE, META, SUMS} <= set(storage.entries(path)):
        raise UserError(f"{path} is not a checkpoint ({STATE}, {META} and {SUMS} are expected)")
    sums, meta = (storage.read(storage.join(path, name)) for name in (SUMS, META))
    if not _listed(sums, META, hashlib.sha256(meta).hexdigest()):
        raise UserError(f"checkpoint {path} is damaged (the checksum of {META} does not hold)")
    return sums, _checked_meta(json.loads(meta), f"{path}/{META}:")


def _checked_meta(meta: Any, where: str) -> dict:
    """Raises UserError for a field that `save` did not write so."""
    number(mapping(meta, where).get("micro_step"), f"{where} micro_step", 0, whole=True)
    text(meta.get("data_key"), f"{where} data_key")
    for name in ("recipe", "draft_config"):
        mapping(meta.get(name), f"{where} {name}")
    measured = [] if meta.get("tau") is None else [meta["tau"]]
    for tau in [*measured, *listing(meta.get("heldout_taus", []), f"{where} heldout_taus")]:
        if not (isinstance(tau, float) and math.isnan(tau)):
            number(tau, f"{where} tau")
    for name in meta.keys() - {field.name for field in dataclasses.fields(Checkpoint)}:
        raise UserError(f"{where} {name} is no field of a checkpoint")
    return meta


def _listed(sums: bytes, name: str, sha256: str) -> bool:
    return f"{sha256}  {name}".encode() in sums.splitlines()
