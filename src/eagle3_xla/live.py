"""The quickstart's screen while it works: stages with their time left, tau as it grows, the answer that is written.

On a terminal one screen that changes, with everything else in a log file; elsewhere a line a stage, and the log on
stderr as always.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eagle3_xla.checks import printable
from eagle3_xla.evaluate.curves import read_metrics

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

REFRESH_SECONDS = 0.5
ACCEPTED, OWN, WAITING = "bold green", "default", "dim"


@dataclass
class Stage:
    """expected: seconds; started, ended: of time.perf_counter(), None before; share: done, where it can be known;
    at_start: the share that an earlier start had done."""

    name: str
    expected: float
    started: float | None = None
    ended: float | None = None
    share: float = 0.0
    at_start: float = 0.0

    def left(self, now: float) -> float:
        """Seconds until its end; by what this start has done, once that is enough."""
        if self.ended is not None:
            return 0.0
        spent = now - self.started if self.started is not None else 0.0
        done, to_do = self.share - self.at_start, 1 - self.at_start
        if done > 0.1 * to_do:
            return spent * (1 - self.share) / done
        return max(self.expected * to_do - spent, 0.0)


class Screen:
    """metrics: metrics.jsonl of the run; steps: how many micro-steps it will have, 0 while that is not known."""

    def __init__(self, stages: list[tuple[str, float]], metrics: Path, heading: str, log: Path):
        self.stages = [Stage(name, expected) for name, expected in stages]
        self.metrics, self.heading, self.log, self.steps = metrics, heading, log, 0
        self.spoken: list[tuple[str, bool]] = []  # the answer that is written: its parts, and whether they were drafted
        self.live = sys.stderr.isatty()

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """While the work goes on."""
        if not self.live:
            print(self.heading)
            yield
            return
        from rich.console import Console
        from rich.live import Live

        terminal = sys.__stderr__
        self.log.parent.mkdir(parents=True, exist_ok=True)
        stop = threading.Event()
        with (
            self.log.open("a", buffering=1) as log,
            contextlib.redirect_stderr(log),
            contextlib.redirect_stdout(log),
            Live(self._picture(), console=Console(file=terminal), auto_refresh=False, redirect_stdout=False) as live,
        ):

            def keep_drawing() -> None:
                while not stop.wait(REFRESH_SECONDS):
                    live.update(self._picture(), refresh=True)

            drawer = threading.Thread(target=keep_drawing, daemon=True)
            drawer.start()
            try:
                yield
            finally:
                stop.set()
                drawer.join()
                live.update(self._picture(), refresh=True)

    @contextlib.contextmanager
    def stage(self, number: int) -> Iterator[None]:
        stage = self.stages[number]
        self._note_share(self._rows())
        stage.started, stage.at_start = time.perf_counter(), stage.share
        if not self.live:
            expected, *later = (other.left(stage.started) for other in self.stages[number:])
            about, left = f", about {minutes(expected)}" if expected >= 30 else "", expected + sum(later)
            print(f"{number + 1}/{len(self.stages)} {stage.name}{about} (all that is left: {minutes(left)})")
        yield
        stage.ended = time.perf_counter()

    def taus(self) -> list[float]:
        """Held-out expected tau, from the start on."""
        return [row["heldout_tau"] for row in self._rows() if "heldout_tau" in row]

    def _rows(self) -> list[dict]:
        return read_metrics(self.metrics) if self.metrics.is_file() else []

    def _note_share(self, rows: list[dict]) -> None:
        """How much of the training is done; a checkpoint that it goes on from may be older than the last row."""
        steps = [0, *(row["step"] for row in rows if "loss" in row)]
        for stage in self.stages:
            if stage.name.startswith("train") and self.steps:
                stage.share = min(steps[-1] / self.steps, 1.0)
                stage.at_start = min(stage.at_start, stage.share)

    def _picture(self) -> "Group":
        from rich.console import Group, RenderableType
        from rich.table import Table
        from rich.text import Text

        now, rows = time.perf_counter(), self._rows()
        self._note_share(rows)
        table = Table.grid(padding=(0, 2))
        for stage in self.stages:
            state = "  " if stage.started is None else "ok" if stage.ended is not None else ">>"
            spent = (stage.ended or now) - stage.started if stage.started is not None else 0.0
            if stage.started is None:
                clock = f"about {minutes(stage.expected)}"
            else:
                clock = minutes(spent) + (f", {minutes(stage.left(now))} left" if stage.ended is None else "")
            share = f"{stage.share:.0%}" if stage.share and stage.ended is None else ""
            table.add_row(state, stage.name, clock, share, style=WAITING if stage.started is None else OWN)
        parts: list[RenderableType] = [Text(self.heading), table]
        if taus := [row["heldout_tau"] for row in rows if "heldout_tau" in row]:
            parts.append(Text(f"held-out expected tau  {' -> '.join(f'{tau:.2f}' for tau in taus[-8:])}"))
        if last := [row for row in rows if "loss" in row]:
            row = last[-1]
            parts.append(Text(f"step {row['step']}  loss {row['loss']:.3f}  {row['tokens_per_second']:.0f} tokens/s"))
        if self.spoken:
            parts += [Text("written now, accepted drafts in green:"), coloured(self.spoken)]
        left = sum(stage.left(now) for stage in self.stages)
        parts.append(Text(f"{minutes(left)} left; the log is {self.log}; Ctrl-C stops, the same command continues"))
        return Group(*parts)


def coloured(pieces: list[tuple[str, bool]]) -> "Text":
    """The answer as rich's Text; control characters are spelt out."""
    from rich.text import Text

    text = Text()
    for piece, drafted in pieces:
        text.append(printable(piece), ACCEPTED if drafted else OWN)
    return text


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
