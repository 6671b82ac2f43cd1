"""What a run says while it goes: the progress line, metrics.jsonl, the tracker."""

import json
import sys
import time
from pathlib import Path

from tqdm import tqdm

from eagle3_xla.config import TrainConfig, UserError
from eagle3_xla.loss.metrics import add_up, rates
from eagle3_xla.train.step import unpack_metrics


def make_tracker(config: TrainConfig, settings: dict):
    """accelerate's tracker of that name, or None. Logs lie under `train.out`/tensorboard."""
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
        tracker = TensorBoardTracker("tensorboard", logging_dir=config.out)
    tracker.start()
    tracker.store_init_configuration(settings)
    return tracker


class Reporter:
    """Progress bar on stderr, one JSON object a logged step in metrics.jsonl, the tracker's scalars."""

    def __init__(self, config: TrainConfig, total: int, start: int, settings: dict):
        self.file = Path(config.out) / "metrics.jsonl"
        _drop_after(self.file, start)
        self.tracker = make_tracker(config, settings)
        self.bar = tqdm(total=total, initial=start, desc="train", unit="step", mininterval=1.0)
        self._since, self._tokens, self._speed = time.perf_counter(), 0, 0.0

    def count(self, tokens: int) -> None:
        """A micro-step over `tokens` tokens was dispatched."""
        self._tokens += tokens
        self.bar.update()

    def log(self, step: int, window: list, optimizer, compilations: int) -> None:
        """window: the metric vectors (train/step.py) of the steps since the last log; reading them waits for these."""
        losses, norms, _, sums = zip(*map(unpack_metrics, window))
        loss, gradient_norm = sum(losses) / len(losses), max(norms)
        now = time.perf_counter()
        if self._tokens:
            self._speed = self._tokens / (now - self._since)
        self._since, self._tokens = now, 0
        acc = rates(add_up(sums))["acc"]
        lr = optimizer.lr_at(step)
        row = {"step": step, "loss": loss, "acc": acc, "tokens_per_second": self._speed, "compilations": compilations}
        row |= {"lr": lr, "gradient_norm": gradient_norm}
        self._write(row)
        shown = {f"acc_{k}": f"{value:.3f}" for k, value in enumerate(acc[:3])}
        self.bar.set_postfix({"loss": f"{loss:.3f}", **shown, "tokens/s": f"{self._speed:.0f}"})
        if self.tracker:
            scalars = {f"train/acc_{k}": value for k, value in enumerate(acc)}
            scalars |= {"train/loss": loss, "train/lr": lr, "train/tokens_per_second": self._speed}
            self.tracker.log(scalars, step=step)

    def log_heldout(self, step: int, tau: float, acceptance: list[float]) -> None:
        self._write({"step": step, "heldout_tau": tau, "heldout_acceptance": acceptance})
        self.say(
            f"step {step}: held-out expected tau {tau:.3f}, acceptance " + " ".join(f"{a:.3f}" for a in acceptance)
        )
        if self.tracker:
            self.tracker.log({"heldout/tau": tau}, step=step)
        self._since, self._tokens = time.perf_counter(), 0  # evaluation is not training time

    def say(self, message: str) -> None:
        self.bar.write(message, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()
        if self.tracker:
            self.tracker.finish()

    def _write(self, row: dict) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")


def _drop_after(file: Path, step: int) -> None:
    """Rows past the checkpoint that a run resumes from will be written again."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):  # a line cut by a kill
            continue
    file.write_text("".join(kept))
