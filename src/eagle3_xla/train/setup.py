"""What a run is before its first step: the data, the frozen target, the head with its optimizer, the compiled step."""

import contextlib
import dataclasses
import hashlib
import sys
from pathlib import Path
from typing import Any

import torch

from eagle3_xla import checkpoint as checkpoints
from eagle3_xla import local_copies, storage
from eagle3_xla.config import Recipe
from eagle3_xla.data.batches import Batches
from eagle3_xla.data.prepare import load_prepared, row_settings
from eagle3_xla.data.vocab import d2t_t2d
from eagle3_xla.draft.initialise import SampledRows, aux_rms, initialise_head, unscaled
from eagle3_xla.draft.model import Eagle3Head, draft_config
from eagle3_xla.errors import UserError
from eagle3_xla.outputs import claim_output, only_writer, write_run_file
from eagle3_xla.storage import Location
from eagle3_xla.target.families import linear_rows, load_target_config, norm_offset, refuse_longer_rows
from eagle3_xla.target.model import Target, TargetStates, open_target
from eagle3_xla.target.states import StatesOf, StatesStore
from eagle3_xla.train.heldout import HeldOut
from eagle3_xla.train.loader import Loader, buckets_of, training_batches
from eagle3_xla.train.optimizer import Optimizer
from eagle3_xla.train.step import TrainStep
from eagle3_xla.train.warm_start import read_warm_head
from eagle3_xla.xla.backend import Backend, make_backend
from eagle3_xla.xla.hosts import Hosts

SCALE_ROWS = 32  # of a warm start, for the scale of its aux channels alone


class Stopped(Exception):
    """SIGTERM or Ctrl-C before the first step. saved: the checkpoint that the run was to go on from."""

    def __init__(self, saved: checkpoints.Checkpoint | None, total_steps: int):
        self.saved, self.total_steps = saved, total_steps


@dataclasses.dataclass
class Data:
    """Rows of fixed shapes; batch i is a pure function of (seed, i).

    draft_ids [D]: target ids of the draft vocabulary; rows_per_step: of a micro-step over all replicas.
    """

    manifest: dict
    draft_ids: torch.Tensor
    batches: Batches
    loader: Loader
    heldout: HeldOut
    heldout_loader: Loader
    rows_per_step: int
    total_steps: int


@dataclasses.dataclass
class Run:
    """A run that is ready to step. saved: the checkpoint that it goes on from, or None."""

    recipe: Recipe
    backend: Backend
    data: Data
    target_config: Any
    head: Eagle3Head
    optimizer: Optimizer
    step: TrainStep
    d2t: torch.Tensor
    t2d: torch.Tensor
    data_key: str
    saved: checkpoints.Checkpoint | None

    @property
    def out(self) -> Location:
        return storage.join(self.recipe.train.out)

    @property
    def first_step(self) -> int:
        return self.saved.micro_step if self.saved else 0

    def checkpoint(self, done: int, tau: float | None, heldout_taus: list[float]) -> checkpoints.Checkpoint:
        """The state after micro-step `done`, copied to the host; tau, heldout_taus: as the checkpoint has them."""
        to_host = self.backend.to_host
        return checkpoints.Checkpoint(
            micro_step=done,
            head={name: to_host(value) for name, value in self.head.state_dict().items()},
            optimizer={name: to_host(value) for name, value in self.optimizer.state().items()},
            d2t=self.d2t,
            t2d=self.t2d,
            recipe=dataclasses.asdict(self.recipe),
            data_key=self.data_key,
            draft_config=self.head.config.to_dict(),
            tau=tau,
            heldout_taus=list(heldout_taus),
        )


def set_up(recipe: Recipe, stopping: list[str], hosts: Hosts, until_end: contextlib.ExitStack) -> Run:
    """Raises UserError for a recipe, data or output folder that doesn't fit, Stopped once `stopping` has an entry.

    until_end: no other process may write to `train.out` until it is left.
    """
    settings = recipe.train
    hosts.agree("settings", _shared_settings(recipe))
    config = load_target_config(recipe.target.path)  # a target that is not supported, before anything else
    backend = make_backend(recipe.xla, hosts)  # first: XLA devices must exist before autograd runs anywhere
    data = _read_data(recipe, backend, config.vocab_size)
    refuse_longer_rows(config, data.manifest["row_length"], recipe.data.prepared)

    # The frozen target, and the run that is already there, which goes on if it is the same.
    warm_head = None
    if settings.warm_start:
        warm_head, data.draft_ids = read_warm_head(recipe, config)
    target = open_target(recipe.target.path, getattr(torch, recipe.target.dtype), data.draft_ids)
    target_config = target.model.config
    rows_key, target_key = data.manifest["key"], target.fingerprint()
    vocabulary_key = hashlib.sha256(data.draft_ids.numpy().tobytes()).hexdigest()
    keys = {"data.prepared": rows_key, "target.path": target_key, "train.warm_start": vocabulary_key}
    hosts.agree("data or target", keys)
    data_key = " ".join(keys.values())
    saved = hosts.from_first(_saved_run(recipe, data_key, until_end) if hosts.index == 0 else None)

    lm_head_rows = linear_rows(target_config, target.draft_rows.float())
    head = Eagle3Head(draft_config(target_config, len(data.draft_ids), recipe.draft))
    d2t, t2d = d2t_t2d(data.draft_ids, target_config.vocab_size)
    target = backend.place_target(target)
    backend.settle()

    states_of = _states_function(backend, target, stopping, Stopped(saved, data.total_steps))
    if settings.reuse_states:
        _keep_states(recipe, backend, data, f"{rows_key} {target_key} {recipe.target.dtype}", states_of)

    # Float32 master weights, from the checkpoint or from what the target says about a sample of rows.
    lr_scale = {}
    if saved:
        head.load_state_dict(saved.head)
    else:
        lr_scale = _initialise(recipe, backend, data, target, head, warm_head, lm_head_rows, states_of)
        # Host 0's on all, so that not a bit differs, whatever processors and files they have.
        weights, lr_scale = hosts.from_first((head.state_dict(), lr_scale))
        head.load_state_dict(weights)
    head = backend.place_head(head)
    updates = data.total_steps // settings.gradient_accumulation
    state = saved.optimizer if saved else None
    optimizer = Optimizer(head, settings, updates, backend, lr_scale, state)
    step = TrainStep(recipe, backend, target, head, d2t, t2d, optimizer)
    backend.settle()
    return Run(recipe, backend, data, target_config, head, optimizer, step, d2t, t2d, data_key, saved)


def _shared_settings(recipe: Recipe) -> dict[str, object]:
    """What must be the same on every host: all but where things lie."""
    every = {f"{s}.{key}": value for s, values in dataclasses.asdict(recipe).items() for key, value in values.items()}
    own = ("target.path", "data.train", "data.heldout", "data.prepared", "train.out", "train.warm_start")
    return {name: value for name, value in every.items() if name not in own}


def _saved_run(recipe: Recipe, data_key: str, until_end: contextlib.ExitStack) -> checkpoints.Checkpoint | None:
    """The newest checkpoint in `train.out`, which becomes this run's. Raises UserError when it is another run's."""
    out = claim_output(recipe.train.out, "train")
    until_end.enter_context(only_writer(out, "train"))
    saved = checkpoints.load_latest(storage.join(out, "checkpoints"), warn=print)
    if saved:
        checkpoints.refuse_changed_run(saved, recipe, data_key)
    write_run_file(recipe, out, "train")
    return saved


def _read_data(recipe: Recipe, backend: Backend, vocab_size: int) -> Data:
    settings = recipe.train
    train_rows, heldout_rows, draft_ids, manifest = load_prepared(recipe.data.prepared, vocab_size, recipe.target.path)
    batches, loader = training_batches(recipe, train_rows, manifest, backend)
    rows_per_step = settings.batch_size * backend.data_parallel
    total_steps = settings.epochs * batches.steps_per_epoch
    total_steps -= total_steps % settings.gradient_accumulation
    if total_steps == 0:
        raise UserError(
            f"{len(train_rows)} rows don't fill one optimizer step of {rows_per_step} rows x "
            f"{settings.gradient_accumulation}; lower train.batch_size or train.gradient_accumulation"
        )
    if backend.hosts.index == 0:
        _say_what_was_prepared(manifest["settings"], row_settings(recipe.data))
        _say_what_is_left_out(batches, rows_per_step, manifest["row_length"])
    buckets = buckets_of(manifest, "heldout", len(heldout_rows))
    heldout = HeldOut(heldout_rows, manifest["heldout_sources"], buckets, settings.heldout_rows, rows_per_step)
    if settings.patience and not heldout.batches:
        raise UserError("train.patience counts evaluations, and there are no held-out rows; set it to 0")
    heldout_loader = Loader(heldout.rows, heldout.capacities(batches.group), batches.group, backend)
    return Data(manifest, draft_ids, batches, loader, heldout, heldout_loader, rows_per_step, total_steps)


def _say_what_was_prepared(prepared: dict, given: dict) -> None:
    other = [f"data.{name} {prepared.get(name)}, not {now}" for name, now in given.items() if prepared.get(name) != now]
    if other:
        print(f"the rows are as prepared: {'; '.join(other)}", file=sys.stderr)


def _say_what_is_left_out(batches: Batches, batch: int, row_length: int) -> None:
    for length, _, rows in batches.unfilled:
        other = "" if length == row_length else f" or leave {length} out of data.buckets"
        print(
            f"{rows} rows of {length} tokens fill no batch of {batch} and are not trained on; lower "
            f"train.batch_size{other}",
            file=sys.stderr,
        )


def _states_function(backend: Backend, target: Target, stopping: list[str], stopped: Stopped) -> StatesOf:
    """host batch -> the target's states on the host; raises `stopped` once `stopping` has an entry."""

    @backend.compile
    def target_states(batch: dict[str, torch.Tensor]) -> TargetStates:
        return target.states(batch["input_ids"], batch["position_ids"], batch["document_ids"])

    def states_of(host_batch: dict[str, torch.Tensor]) -> TargetStates:
        if backend.hosts.any(bool(stopping)):
            raise stopped
        return TargetStates(*map(backend.to_host, target_states(backend.put(host_batch))))

    return states_of


def _keep_states(recipe: Recipe, backend: Backend, data: Data, key: str, states_of: StatesOf) -> None:
    """Run the target once over all rows; the step starts from what it said. key: which rows, which target."""
    lengths = data.batches.buckets + data.batches.unfilled
    if len(lengths) > 1 or len(buckets_of(data.manifest, "heldout", 0)) > 1:
        raise UserError("train.reuse_states needs rows of one length; set it to false")
    every = local_copies.work_folder(storage.join(recipe.data.prepared, "states"))
    own = every / hashlib.sha256(key.encode()).hexdigest()[:16]
    if backend.hosts.index == 0:
        _say_what_else_lies_there(every, own)
    for split, loader in (("train", data.loader), ("heldout", data.heldout_loader)):
        loader.store = StatesStore(own / f"{split}-{len(loader.rows)}", loader.rows)
        loader.store.fill(states_of, data.rows_per_step, backend)


def _say_what_else_lies_there(every: Path, own: Path) -> None:
    """Another run may read them, so they stay; they are large, so nobody is to forget them."""
    others = [folder for folder in every.iterdir() if folder != own]
    if others:
        size = sum(file.stat().st_size for folder in others for file in folder.rglob("*.safetensors"))
        print(
            f"{every} holds {size:,} bytes of states of other rows or targets too: "
            f"{', '.join(sorted(folder.name for folder in others))}; remove those that no run needs",
            file=sys.stderr,
        )


def _initialise(
    recipe: Recipe,
    backend: Backend,
    data: Data,
    target: Target,
    head: Eagle3Head,
    warm_head: Eagle3Head | None,
    lm_head_rows: torch.Tensor,
    states_of: StatesOf,
) -> dict[str, torch.Tensor]:
    """Give `head` its first weights, those of `warm_head` or draft/initialise.py's; returns the learning rates' scales
    (Optimizer).
    """
    settings, sample = recipe.train, []
    if warm_head is not None:
        head.load_state_dict(warm_head.state_dict())  # before the sample: its norms make what fc reads
    sample_rows = settings.init_rows if warm_head is None else min(settings.init_rows, SCALE_ROWS)
    norm_weight = backend.to_host(target.final_norm_weight).float() + norm_offset(target.model.config)
    for step in range(min(max(1, sample_rows // data.rows_per_step), data.batches.steps_per_epoch)):
        batch, states = data.loader.states(data.batches.indices(step), states_of)
        embeds = backend.to_host(target.embed_tokens(batch["input_ids"].to(target.device)))
        with torch.no_grad():
            aux, hidden = head.normed_aux(states.aux.float()), unscaled(states.hidden.float(), norm_weight)
        # In bfloat16, as states lie on disk.
        rows = (aux.bfloat16(), embeds.bfloat16(), hidden.bfloat16())
        sample.append(SampledRows(*rows, *(batch[name] for name in ("loss_mask", "document_ids", "position_ids"))))
    if warm_head is None:
        initialise_head(head, settings.init, settings.seed, lm_head_rows, norm_weight, sample)
    return {"fc.weight": 1 / aux_rms(sample).clamp_min(1e-3)}
