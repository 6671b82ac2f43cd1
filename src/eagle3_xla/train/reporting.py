"""What a run says while it goes: the progress line, metrics.jsonl, the tracker."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from eagle3_xla import local_copies, storage
from eagle3_xla.errors import UserError
from eagle3_xla.loss.metrics import add_up, rates
from eagle3_xla.train.config import TrainConfig
from eagle3_xla.train.optimizer import Optimizer
from eagle3_xla.train.step import unpack_metrics
from eagle3_xla.xla.backend import Backend

WAITS = ("input", "save", "evaluation")


def make_tracker(config: TrainConfig, folder: Path, settings: dict) -> Any:
    """accelerate's tracker of that name, or None. Logs lie under `folder`/tensorboard."""
    if config.tracker == "none":
        return None
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker, WandBTracker
    from accelerate.utils import is_wandb_available

    if config.tracker == "wandb" and not is_wandb_available():
        raise UserError("train.tracker is wandb, but wandb is not installed: pip install 'eagle3-xla[wandb]'")
    PartialState(cpu=True)  # the trackers log through it; cpu: it must not start XLA devices of its own
    if config.tracker == "wandb":
        tracker = WandBTracker("eagle3-xla")
    else:
        tracker = TensorBoardTracker("tensorboard", logging_dir=str(folder))
    tracker.start()
    tracker.store_init_configuration(settings)
    return tracker


class Reporter:
    """Progress bar on stderr, one JSON object a logged step in metrics.jsonl, the tracker's scalars; on host 0 only.

    recipe: the resolved one, for the tracker. MFU = FLOPs (train/flops.py) per second / (devices * their peak). A full
    disk costs the log, not the run.
    local: the folder of this machine where the files grow; `train.out` itself, or uploaded to its URL at each save.
    As a context it ends with what is left to write and to upload.
    """

    def __init__(self, config: TrainConfig, total: int, start: int, recipe: dict, backend: Backend):
        self.config, self.backend = config, backend
        self.speaks = backend.hosts.index == 0
        self._complained = False
        self.tracker = None
        if self.speaks:
            self.local = local_copies.LocalFolder(config.out)
            self.local.restore("metrics.jsonl")
            self.file = self.local.path / "metrics.jsonl"
            _drop_after(self.file, start or -1)  # no checkpoint: step 0 is evaluated again too
            sections = {name: values for name, values in recipe.items() if name in ("train", "loss", "xla")}
            flat = {f"{s}.{k}": v for s, values in sections.items() for k, v in values.items()}
            self.tracker = make_tracker(config, self.local.path, flat | {"target": recipe["target"]["path"]})
        self.bar = tqdm(total=total, initial=start, desc="train", unit="step", mininterval=1.0, disable=not self.speaks)
        self._since, self._tokens, self._work = time.perf_counter(), 0, 0.0
        self._host_seconds, self._steps = 0.0, 0
        self._waited = dict.fromkeys(WAITS, 0.0)

    @contextlib.contextmanager
    def dispatching(self) -> Iterator[None]:
        """Around the dispatch of a micro-step: the host's time for it."""
        started = time.perf_counter()
        yield
        self._host_seconds += time.perf_counter() - started
        self._steps += 1

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Around what keeps the next step from being dispatched; what: one of WAITS."""
        started = time.perf_counter()
        yield
        self._waited[what] += time.perf_counter() - started

    def count(self, tokens: int, flops_per_token: float) -> None:
        """A micro-step over `tokens` tokens was dispatched."""
        self._tokens += tokens
        self._work += tokens * flops_per_token
        self.bar.update()

    def counted(self) -> tuple[int, float]:
        """(tokens, FLOPs) of the micro-steps since the last call, or since an evaluation in between."""
        counted, self._tokens, self._work = (self._tokens, self._work), 0, 0.0
        return counted

    def log(
        self,
        step: int,
        window: list[tuple[torch.Tensor, torch.Tensor | None]],
        counted: tuple[int, float],
        optimizer: Optimizer,
        compilations: int,
    ) -> None:
        """window: what train/step.py returned for the steps since the last log; reading it waits for these.
        counted: what `counted` said after them; the next step has been dispatched since."""
        losses, sums = zip(*(unpack_metrics(vector) for vector, _ in window))
        norms = [float(norm) for _, norm in window if norm is not None]
        now = time.perf_counter()
        tokens, work = counted
        seconds = now - self._since
        speed = tokens / seconds
        acc = rates(add_up(sums))["acc"]
        row = {
            "step": step,
            "loss": sum(losses) / len(losses),
            "acc": acc,
            "tokens_per_second": speed,
            "compilations": compilations,
            "device": self.backend.description,
            "seconds": seconds,
            "lr": optimizer.lr_at(step),
            "gradient_norm": max(norms, default=None),
            "host_seconds_per_step": self._host_seconds / max(1, self._steps),
        }
        row |= {f"{what}_wait_seconds": waited for what, waited in self._waited.items()}  # since the last row
        self._waited = dict.fromkeys(WAITS, 0.0)
        self._since, self._host_seconds, self._steps = now, 0.0, 0
        if self.backend.peak_flops:
            row["mfu"] = work / seconds / self.backend.peak_flops
        if memory := self.backend.memory_bytes():
            row["memory_gib"] = memory / 2**30
        self._write(row)
        shown = {f"acc_{k}": f"{value:.3f}" for k, value in enumerate(acc[:3])}
        shown |= {"mfu": f"{row['mfu']:.1%}"} if "mfu" in row else {}
        self.bar.set_postfix({"loss": f"{row['loss']:.3f}", **shown, "tokens/s": f"{speed:.0f}"})
        scalars = {f"train/acc_{k}": value for k, value in enumerate(acc)}
        self._track(scalars | {f"train/{k}": v for k, v in row.items() if isinstance(v, int | float)}, step)

    def log_heldout(self, step: int, figures: dict) -> None:
        """figures: train/heldout.py's. Starts the clock of tokens/s anew: evaluation is not training time."""
        tau, acceptance, sources = figures["tau"], figures["acceptance"], figures["sources"]
        self._write({"step": step, "heldout_tau": tau, "heldout_acceptance": acceptance, "heldout_sources": sources})
        by_source = ", ".join(f"{name} {value:.3f}" for name, value in sources.items()) if len(sources) > 1 else ""
        self.say(
            f"step {step}: held-out expected tau {tau:.3f}, acceptance {' '.join(f'{a:.3f}' for a in acceptance)}"
            + (f" ({by_source})" if by_source else "")
        )
        self._track({"heldout/tau": tau} | {f"heldout/tau/{name}": value for name, value in sources.items()}, step)
        self._since, self._tokens, self._work = time.perf_counter(), 0, 0.0

    def say(self, message: str) -> None:
        if self.speaks:
            self.bar.write(message, file=sys.stderr)

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        try:
            if self.tracker:
                self.tracker.finish()
        except OSError as failed:  # it writes now what it had kept
            self._complain(failed)
        if error is not None:  # which is the one to tell
            self.upload()
        elif self.speaks:
            self.local.upload()

    def upload(self) -> None:
        """Copy what has been written so far to where `train.out` is a URL; what fails is said, and tried again next
        time."""
        try:
            if self.speaks:
                self.local.upload()
        except OSError as failed:
            self.say(f"the log was not uploaded ({failed})")

    def _write(self, row: dict) -> None:
        if not self.speaks:
            return
        try:
            with self.file.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            self._complain(error)

    def _track(self, scalars: dict, step: int) -> None:
        try:
            if self.tracker:
                self.tracker.log(scalars, step=step)
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        if not self._complained:
            self.say(f"this step is not logged ({error}); training goes on, later complaints are left out")
        self._complained = True


def _drop_after(file: Path, step: int) -> None:
    """Rows past the checkpoint that a run resumes from will be written again."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError, RecursionError):  # a line cut by a kill, or no line of ours
            continue
    storage.write(file, "".join(kept))
