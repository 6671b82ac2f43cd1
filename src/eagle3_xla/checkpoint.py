"""Everything a run is, on disk: weights, moments, step, vocabulary maps, recipe. Nothing half-written is ever read.

    checkpoints/step-00000120/state.safetensors   head weights, AdamW moments and step, d2t, t2d
                             /meta.json           micro-step, held-out tau, recipe
                             /SHA256SUMS          of the two above; `sha256sum -c` reads it
               /.partial-*                        being written or deleted; one that a kill left goes with the next save

Batches are a pure function of (seed, micro-step) and the step has no other randomness, so the micro-step is the data
cursor and the RNG state.
"""

import dataclasses
import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from eagle3_xla.config import Recipe, UserError

STATE, META, SUMS = "state.safetensors", "meta.json", "SHA256SUMS"
PARTIAL = ".partial-"

# Settings that may differ between a run and its continuation: they change no weight.
FREE = (
    "target.path",
    "train.out",
    "train.log_every",
    "train.save_every",
    "train.keep",
    "train.tracker",
    "data.prepared",
    "plan.topology",
    "plan.tokens",
    "plan.price_per_chip_hour",
)


class SaveFailed(OSError):
    """A checkpoint could not be written; the message says why and which one remains."""


@dataclasses.dataclass
class Checkpoint:
    """micro_step: how many are done; head, optimizer: host tensors by name; d2t, t2d: the draft vocabulary's maps.

    tau: acceptance length of these weights on the held-out rows, None where it was not measured.
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


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint atomically; once it is durable, drop all but the last `keep` and the best by tau.

    Returns its folder. Raises SaveFailed when the disk is full or refuses; the earlier ones are untouched then.
    """
    folder = Path(folder)
    final = folder / f"step-{checkpoint.micro_step:08d}"
    partial = folder / f"{PARTIAL}{final.name}"
    tensors = {f"head.{name}": value for name, value in checkpoint.head.items()}
    tensors |= {f"optimizer.{name}": value for name, value in checkpoint.optimizer.items()}
    tensors |= {"d2t": checkpoint.d2t, "t2d": checkpoint.t2d}
    named = ("micro_step", "tau", "recipe", "data_key", "draft_config")
    meta = json.dumps({name: getattr(checkpoint, name) for name in named}, indent=1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(f"{PARTIAL}*"):
            shutil.rmtree(stale)
        partial.mkdir()
        save_file(tensors, partial / STATE)
        (partial / META).write_text(meta)
        (partial / SUMS).write_text("".join(f"{_sha256(partial / name)}  {name}\n" for name in (STATE, META)))
        for name in (STATE, META, SUMS, "."):
            _fsync(partial / name)
        if final.exists():  # damaged, or the run would have gone on from it
            _remove(final)
        os.replace(partial, final)
        _fsync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        needed = sum(tensor.nbytes for tensor in tensors.values()) + len(meta)
        raise SaveFailed(_what_remains(folder, final, needed, error)) from error
    _prune(folder, final, keep)
    return final


def load_latest(folder: Path, warn) -> Checkpoint | None:
    """The newest checkpoint whose checksums hold; a damaged one is reported through `warn` and passed over."""
    return _first_whole(reversed(_steps(folder)), warn)


def load_best(folder: Path, warn) -> Checkpoint | None:
    """The whole checkpoint with the highest tau; the newest one where no tau is known."""
    return _first_whole(sorted(_steps(folder), key=_rank, reverse=True), warn)


def load(path: Path) -> Checkpoint:
    """Read one checkpoint folder. Raises UserError when it is missing or damaged."""
    path = Path(path)
    meta = _verified_meta(path)
    if not _matches(path, STATE):
        raise UserError(f"checkpoint {path} is damaged (the checksum of {STATE} does not hold)")
    tensors = {name: value.clone() for name, value in load_file(path / STATE).items()}  # the file is memory-mapped

    def group(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    return Checkpoint(
        head=group("head."), optimizer=group("optimizer."), d2t=tensors["d2t"], t2d=tensors["t2d"], **meta
    )


def refuse_changed_run(saved: Checkpoint, recipe: Recipe, data_key: str) -> None:
    """Raises UserError listing every setting that differs and would change the weights of the continued run."""
    now = dataclasses.asdict(recipe)
    changes = [
        f"{section}.{key}: {saved.recipe.get(section, {}).get(key)!r} -> {value!r}"
        for section, settings in now.items()
        for key, value in settings.items()
        if f"{section}.{key}" not in FREE and saved.recipe.get(section, {}).get(key) != value
    ]
    if not changes and saved.data_key != data_key:
        changes = [f"the content of data.prepared ({recipe.data.prepared}) or of the target"]
    if changes:
        raise UserError(
            f"{recipe.train.out} holds a run of another recipe, so it can't be continued; "
            f"changed: {'; '.join(changes)}. Give the old settings back, or name another train.out"
        )


def _steps(folder: Path) -> list[Path]:
    return sorted(Path(folder).glob("step-*"))


def _first_whole(paths, warn) -> Checkpoint | None:
    for path in paths:
        try:
            return load(path)
        except UserError as error:
            warn(f"{error}; it is passed over")
    return None


def _rank(path: Path) -> tuple[float, str]:
    """Order by tau, then by step; a checkpoint without one, or whose meta.json is damaged, comes before all others."""
    try:
        tau = _verified_meta(path)["tau"]
    except UserError:
        tau = None
    return (-math.inf if tau is None or math.isnan(tau) else tau, path.name)


def _prune(folder: Path, newest: Path, keep: int) -> None:
    """Steps after `newest` are damaged ones that the run passed over when it resumed: they must not fill `keep`."""
    own = [path for path in _steps(folder) if path.name <= newest.name]
    kept = [*own[-keep:], max(own, key=_rank)]
    for path in _steps(folder):
        if path not in kept:
            _remove(path)


def _remove(path: Path) -> None:
    """Rename first: a kill in between leaves a .partial folder, not half a checkpoint."""
    gone = path.with_name(f"{PARTIAL}old-{path.name}")
    os.replace(path, gone)
    shutil.rmtree(gone)


def _what_remains(folder: Path, final: Path, needed: int, error: Exception) -> str:
    # safetensors says "Error while serializing: I/O error: No space left on device (os error 28)".
    reason = getattr(error, "strerror", None) or str(error).rpartition(": ")[2].partition(" (os error")[0]
    try:
        free = f"{shutil.disk_usage(folder).free:,} bytes are free there"
        saved = _first_whole(reversed(_steps(folder)), warn=lambda _: None)
    except OSError:
        free, saved = "the folder can't be read", None
    remaining = f"{folder}/step-{saved.micro_step:08d} is whole" if saved else "no earlier checkpoint is there"
    return (
        f"checkpoint {final} could not be written ({reason}): it takes {needed:,} bytes, {free}. "
        f"{remaining}; make room and start again to continue"
    )


def _verified_meta(path: Path) -> dict:
    if not all((path / name).is_file() for name in (STATE, META, SUMS)):
        raise UserError(f"{path} is not a checkpoint ({STATE}, {META} and {SUMS} are expected)")
    if not _matches(path, META):
        raise UserError(f"checkpoint {path} is damaged (the checksum of {META} does not hold)")
    return json.loads((path / META).read_text())


def _matches(path: Path, name: str) -> bool:
    return f"{_sha256(path / name)}  {name}".encode() in (path / SUMS).read_bytes().splitlines()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
