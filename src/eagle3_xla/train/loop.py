"""`train`: the loop, top to bottom.

    prepared rows + frozen target -> micro-steps (train/step.py) -> metrics.jsonl, tracker, checkpoints

It continues by itself from the newest whole checkpoint in `train.out`, and ends with the weights an unbroken run has.
"""

import contextlib
import dataclasses
import signal
import sys

from eagle3_xla import checkpoint as checkpoints
from eagle3_xla import storage
from eagle3_xla.config import Recipe
from eagle3_xla.errors import RunError, UserError
from eagle3_xla.storage import Location
from eagle3_xla.train.budget import CompileBudget, planned_graphs
from eagle3_xla.train.flops import flops_per_token
from eagle3_xla.train.reporting import Reporter
from eagle3_xla.train.saving import Saver
from eagle3_xla.train.setup import Run, Stopped, set_up
from eagle3_xla.xla.hosts import join_hosts

PROFILED = range(3, 6)  # micro-steps of this process that --profile traces: the first ones compile


def train(recipe: Recipe, max_steps: int = 0, allow_recompile: bool = False, profile: bool = False) -> dict:
    """Train to the end of the recipe, or save and stop after `max_steps` further micro-steps, rounded up to whole
    updates (0: no such limit).

    Returns a summary: `micro_steps` done, `of` how many, held-out expected `tau`, the last `checkpoint`, `ended`:
    done | max_steps | SIGTERM | SIGINT | patience (after a signal it saves first). Raises UserError for a recipe, data
    or output folder that doesn't fit, RunError when the step compiles beyond its budget (train/budget.py) and when
    weights are not finite any more.
    """
    stopping: list[str] = []
    with join_hosts() as hosts, contextlib.ExitStack() as until_end:
        if not recipe.train.out:
            raise UserError("setting train.out is empty; name the folder for checkpoints and metrics")
        handlers = _stop_by_signals(stopping)
        try:
            run = set_up(recipe, stopping, hosts, until_end)
            settings = dataclasses.asdict(recipe)
            reporter = Reporter(recipe.train, run.data.total_steps, run.first_step, settings, run.backend)
            saver = Saver(recipe.train.keep, reporter.say, reporter.upload, stopping)
            hosts.last_words = saver.finish
            with reporter, saver:
                loop = Loop(run, reporter, saver, allow_recompile, stopping)
                loop.steps(max_steps, profile)
                return loop.summary()
        except Stopped as stopped:
            return _summary(recipe, stopped.saved, stopped.total_steps) | {"ended": _why(stopping)}
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _stop_by_signals(stopping: list[str]) -> dict:
    """SIGTERM and Ctrl-C are noted in `stopping`; a second Ctrl-C interrupts at once. Returns the handlers before."""

    def note(number: int, frame: object) -> None:
        stopping.append(signal.Signals(number).name)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            print("Ctrl-C: saves after this step; once more to stop at once", file=sys.stderr)

    return {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}


def _why(stopping: list[str]) -> str:
    return stopping[0] if stopping else "SIGTERM"  # the latter: another host was told to


def _summary(recipe: Recipe, saved: checkpoints.Checkpoint | None, total_steps: int) -> dict:
    """Of a run that goes on from `saved`, before its first step."""
    step = saved.micro_step if saved else 0
    return {
        "micro_steps": step,
        "of": total_steps,
        "tau": saved and saved.tau,
        "best_tau": max(saved.heldout_taus, default=None) if saved else None,
        "checkpoint": saved and str(checkpoints.folder_of(storage.join(recipe.train.out, "checkpoints"), step)),
    }


class Loop:
    """The steps of a run, and what happens between them. stopping: has an entry once the run is told to stop."""

    def __init__(self, run: Run, reporter: Reporter, saver: Saver, allow_recompile: bool, stopping: list[str]):
        self.run, self.reporter, self.saver, self.stopping = run, reporter, saver, stopping
        self.settings = run.recipe.train
        self.done, self.ended = run.first_step, ""
        self.tau = run.saved.tau if run.saved else None  # held-out, after the last update
        self.taus = list(run.saved.heldout_taus) if run.saved else []  # of every evaluation so far
        # Steps done, what the steps since the last log returned, and their tokens and FLOPs (Reporter.counted).
        self.unlogged: tuple[int, list, tuple[int, float]] | None = None
        self.path = run.saved and checkpoints.folder_of(storage.join(run.out, "checkpoints"), self.done)  # the last one
        self.budget = self._compile_budget(allow_recompile)
        self.flops = self._flops_per_token()

    def _flops_per_token(self) -> dict[int, float]:
        """By TTT length. Rows and draft vocabulary are as they were prepared, whatever the settings are now."""
        run, data = self.run, self.run.data
        prepared = dataclasses.replace(
            run.recipe.data, row_length=data.manifest["row_length"], draft_vocab_size=len(data.draft_ids)
        )
        recipe = dataclasses.replace(run.recipe, data=prepared)
        return {length: flops_per_token(run.target_config, recipe, length) for length in run.step.names}

    def _compile_budget(self, allow_recompile: bool) -> CompileBudget:
        run, say = self.run, self.reporter.say
        say(
            f"{run.backend.description}: {run.data.total_steps} steps of {run.data.rows_per_step} x "
            f"{run.data.manifest['row_length']} tokens"
        )
        lengths, heldout_lengths = len(run.data.batches.buckets), len(run.data.heldout.lengths)
        planned = planned_graphs(run.recipe, run.step.updates, lengths, heldout_lengths)
        say(f"compile budget: {sum(planned.values())} graphs ({', '.join(f'{n} {c}' for n, c in planned.items())})")
        return CompileBudget(run.backend, planned, say, allow_recompile)

    def steps(self, max_steps: int, profile: bool) -> None:
        """Train up to the last step, or until the run is told to stop or gains no more."""
        run, reporter, settings = self.run, self.reporter, self.settings
        if self._gains_no_more():  # so it ended already
            self.ended = "patience"
            return
        last_step = self._last_step(max_steps)
        self._begin(last_step)
        window = []  # what the steps since the last log returned
        steps = range(run.first_step, last_step)
        batches = run.data.loader.ahead((step, run.data.batches.indices(step)) for step in steps)
        with contextlib.ExitStack() as tracing, contextlib.closing(batches):
            for micro_step in steps:
                with reporter.waiting("input"):
                    batch, tokens = next(batches)
                if profile and reporter.speaks and micro_step - run.first_step == PROFILED.start:
                    tracing.enter_context(run.backend.profiler(str(reporter.local.path / "profile")))
                with reporter.dispatching():
                    window.append(run.step.run(micro_step, batch, self.budget.run))
                if micro_step + 1 - run.first_step == PROFILED.stop:
                    tracing.close()
                reporter.count(tokens, self.flops[run.step.length(micro_step)])
                self.done = micro_step + 1

                # Read metrics one step late: the device already has the next step, so the host never makes it wait.
                self._log()
                if self.done % settings.log_every == 0 or self.done == last_step:
                    self.unlogged, window = (self.done, window, reporter.counted()), []
                    if not run.backend.runs_behind:
                        self._log()

                self.saver.check()
                if self.done % settings.gradient_accumulation == 0:
                    self._after_update(last_step)
                if self.ended:
                    break
            self._log()
        if self.done == run.data.total_steps or self.ended == "patience":
            self._say_whether_it_gained()

    def _last_step(self, max_steps: int) -> int:
        total, first, accumulation = self.run.data.total_steps, self.run.first_step, self.settings.gradient_accumulation
        whole_updates = -(-max_steps // accumulation) * accumulation
        return min(total, first + whole_updates) if max_steps else total

    def _begin(self, last_step: int) -> None:
        run = self.run
        if not run.data.heldout.batches:
            self.reporter.say(
                "no held-out rows, so no tau is measured: `export` takes the newest checkpoint, not the best"
            )
        if run.saved:
            self.reporter.say(f"continued after step {run.first_step}")
        elif run.first_step < last_step:  # the untrained head, to compare with
            self._save(self._evaluate() if run.data.heldout.batches else None, "initial")

    def _after_update(self, last_step: int) -> None:
        """Evaluate, save and stop where it is due."""
        reporter, settings = self.reporter, self.settings
        updates = self.done // settings.gradient_accumulation
        measured = self._evaluation_is_due(updates)
        self.tau = self._evaluate() if measured else None
        stop = self.run.backend.hosts.any(bool(self.stopping))
        if stop:
            self.saver.hurry()
        if measured or stop or updates % settings.save_every == 0 or self.done == last_step:
            self.path = self._save(self.tau)
        if stop:
            self.ended = _why(self.stopping)
            self.saver.wait()
            reporter.say(f"{self.ended}: saved {self.path}; start again to continue")
        elif measured and self._gains_no_more():
            self.ended = "patience"
            reporter.say(f"no better tau in {settings.patience} evaluations: stopped")

    def _log(self) -> None:
        if self.unlogged:
            self.reporter.log(*self.unlogged, self.run.optimizer, self.budget.made)
            self.unlogged = None

    def _evaluation_is_due(self, updates: int) -> bool:
        data, settings = self.run.data, self.settings
        if not data.heldout.batches:
            return False
        if self.done == data.total_steps:
            return True
        if settings.eval_every:
            return updates % settings.eval_every == 0
        epoch = data.batches.steps_per_epoch  # one ended within the last update
        return self.done // epoch > (self.done - settings.gradient_accumulation) // epoch

    def _gains_no_more(self) -> bool:
        patience, taus = self.settings.patience, self.taus
        return bool(patience and taus) and len(taus) - 1 - taus.index(max(taus)) >= patience

    def _say_whether_it_gained(self) -> None:
        """`export` takes the best checkpoint that the run made, never the head that it started from."""
        taus = self.taus
        if len(taus) > 1 and max(taus) <= taus[0]:
            start = checkpoints.folder_of(storage.join(self.run.out, "initial"), 0)
            self.reporter.say(
                f"held-out tau never came above the {taus[0]:.3f} before the first step: train.lr may be too high; "
                f"that head is at {start}"
            )

    def _evaluate(self) -> float:
        data, evaluate = self.run.data, self.run.step.evaluate
        self._log()  # the steps' speed, before evaluation takes its time
        with self.reporter.waiting("evaluation"):
            figures = data.heldout.measure(
                data.heldout_loader, lambda batch: self.budget.run("evaluation", evaluate, batch)
            )
        self.reporter.log_heldout(self.done, figures)
        self.taus.append(figures["tau"])
        return figures["tau"]

    def _save(self, tau: float | None, folder: str = "checkpoints") -> Location:
        """Copy the state to the host and begin to write it; returns where."""
        place = storage.join(self.run.out, folder)
        self._log()  # a run that goes on from here will not write it again
        with self.reporter.waiting("save"):
            state = self.run.checkpoint(self.done, tau, self.taus)
            self._refuse_what_is_not_finite(state)
            if self.run.backend.hosts.index == 0:  # every host holds the whole state, one writes it
                self.saver.save(place, state)
        return checkpoints.folder_of(place, self.done)

    def _refuse_what_is_not_finite(self, state: checkpoints.Checkpoint) -> None:
        """Raises RunError, on every host, before the checkpoints of a head that was one are replaced."""
        if not all(weight.isfinite().all() for weight in state.head.values()):
            self.saver.hurry()
            self.saver.wait()
            self.run.backend.hosts.barrier()  # a checkpoint that host 0 could not write is told first
            remains = f"{self.path} is whole" if self.path else "no checkpoint is there"
            raise RunError(
                f"the weights are not finite after step {self.done}: start anew with a lower train.lr. {remains}"
            )

    def summary(self) -> dict:
        total = self.run.data.total_steps
        return {
            "micro_steps": self.done,
            "of": total,
            "tau": self.tau,
            "best_tau": max(self.taus, default=None),
            "checkpoint": self.path and str(self.path),
            "ended": self.ended or ("max_steps" if self.done < total else "done"),
        }
