"""Everything a run is, on disk: weights, moments, step, vocabulary maps, recipe. Nothing half-written is ever read.

    checkpoints/step-00000120/state.safetensors   head weights, AdamW moments and step, d2t, t2d
                             /meta.json           micro-step, recipe, sha256 of state.safetensors

Batches are a pure function of (seed, micro-step) and the step has no other randomness, so the micro-step is the data
cursor and the RNG state.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from eagle3_xla.config import Recipe, UserError

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


@dataclasses.dataclass
class Checkpoint:
    """micro_step: how many are done; head, optimizer: host tensors by name; d2t, t2d: the draft vocabulary's maps."""

    micro_step: int
    head: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    d2t: torch.Tensor
    t2d: torch.Tensor
    recipe: dict
    data_key: str
    draft_config: dict


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint atomically, then drop all but the last `keep`. Returns its folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{checkpoint.micro_step:08d}"
    partial = folder / f".partial-{checkpoint.micro_step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    tensors = {f"head.{name}": value for name, value in checkpoint.head.items()}
    tensors |= {f"optimizer.{name}": value for name, value in checkpoint.optimizer.items()}
    tensors |= {"d2t": checkpoint.d2t, "t2d": checkpoint.t2d}
    state = partial / "state.safetensors"
    save_file(tensors, state)
    meta = {
        "micro_step": checkpoint.micro_step,
        "recipe": checkpoint.recipe,
        "data_key": checkpoint.data_key,
        "draft_config": checkpoint.draft_config,
        "sha256": _sha256(state),
    }
    (partial / "meta.json").write_text(json.dumps(meta, indent=1))
    for file in (state, partial / "meta.json", partial):
        _fsync(file)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    _fsync(folder)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return final


def load_latest(folder: Path, warn) -> Checkpoint | None:
    """The newest checkpoint whose checksum holds; a damaged one is reported through `warn` and passed over."""
    for path in sorted(Path(folder).glob("step-*"), reverse=True):
        try:
            return load(path)
        except UserError as error:
            warn(f"{error}; using the one before it")
    return None


def load(path: Path) -> Checkpoint:
    """Read one checkpoint folder. Raises UserError when it is missing or damaged."""
    path = Path(path)
    state = path / "state.safetensors"
    if not (path / "meta.json").is_file() or not state.is_file():
        raise UserError(f"{path} is not a checkpoint (meta.json and state.safetensors are expected)")
    try:
        meta = json.loads((path / "meta.json").read_text())
        damaged = meta["sha256"] != _sha256(state)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError):
        damaged = True
    if damaged:
        raise UserError(f"checkpoint {path} is damaged (its checksum does not hold)")
    tensors = {name: value.clone() for name, value in load_file(state).items()}  # the file itself is memory-mapped

    def group(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    return Checkpoint(
        meta["micro_step"],
        group("head."),
        group("optimizer."),
        tensors["d2t"],
        tensors["t2d"],
        meta["recipe"],
        meta["data_key"],
        meta["draft_config"],
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
