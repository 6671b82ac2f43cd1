"""`train`: the loop, top to bottom.

    prepared rows + frozen target -> micro-steps (train/step.py) -> metrics.jsonl, tracker, checkpoints

It continues by itself from the newest whole checkpoint in `train.out`, and ends with the weights an unbroken run has.
"""

import contextlib
import dataclasses
import signal
from pathlib import Path

import torch

from eagle3_xla import checkpoint as checkpoints
from eagle3_xla.config import Recipe, UserError, claim_output, write_run_file
from eagle3_xla.data.prepare import load_prepared
from eagle3_xla.data.vocab import d2t_t2d, draft_ids_of
from eagle3_xla.draft.initialise import InputMoments, initialise_head
from eagle3_xla.draft.model import Eagle3Head, draft_config
from eagle3_xla.draft.saved import load_head
from eagle3_xla.target.families import linear_rows, load_target_config, norm_offset
from eagle3_xla.target.model import TargetStates, open_target
from eagle3_xla.target.states import StatesStore
from eagle3_xla.train.budget import CompileBudget
from eagle3_xla.train.flops import flops_per_token
from eagle3_xla.train.heldout import HeldOut
from eagle3_xla.train.loader import Loader, buckets_of, training_batches
from eagle3_xla.train.optimizer import AdamW
from eagle3_xla.train.reporting import Reporter
from eagle3_xla.train.step import TrainStep
from eagle3_xla.xla import make_backend

PROFILED = range(3, 6)  # micro-steps of this process that --profile traces: the first ones compile


class Stopped(Exception):
    """SIGTERM before there was anything to save."""


def train(recipe: Recipe, max_steps: int = 0, allow_recompile: bool = False, profile: bool = False) -> dict:
    """Train to the end of the recipe, or save and stop after `max_steps` further micro-steps (0: no such limit).

    Returns a summary: `micro_steps` done, `of` how many, held-out expected `tau`, the last `checkpoint`, `ended`:
    done | max_steps | SIGTERM | patience. Raises UserError for a recipe, data or output folder that doesn't fit,
    RunError when the step compiles beyond its budget (train/budget.py).
    """
    if not recipe.train.out:
        raise UserError("setting train.out is empty; name the folder for checkpoints and metrics")
    stopping: list[str] = []
    previous_handler = signal.signal(signal.SIGTERM, lambda *_: stopping.append("SIGTERM"))
    try:
        return _train(recipe, max_steps, allow_recompile, profile, stopping)
    except Stopped:
        return {"micro_steps": 0, "ended": "SIGTERM", "checkpoint": None}
    finally:
        signal.signal(signal.SIGTERM, previous_handler)


def _train(recipe: Recipe, max_steps: int, allow_recompile: bool, profile: bool, stopping: list[str]) -> dict:
    settings, out = recipe.train, Path(recipe.train.out)
    load_target_config(recipe.target.path)  # a target that is not supported, before anything else
    backend = make_backend(recipe.xla)  # first: XLA devices must exist before autograd runs anywhere

    # The data: rows of fixed shapes; batch i is a pure function of (seed, i).
    train_rows, heldout_rows, draft_ids, manifest = load_prepared(recipe.data.prepared)
    batches, loader = training_batches(recipe, train_rows, manifest, backend)
    rows_per_step = settings.batch_size * backend.data_parallel
    epoch_steps = batches.steps_per_epoch
    total_steps = settings.epochs * epoch_steps // settings.gradient_accumulation * settings.gradient_accumulation
    if total_steps == 0:
        raise UserError(
            f"{len(train_rows)} rows don't fill one optimizer step of {rows_per_step} rows x "
            f"{settings.gradient_accumulation}; lower train.batch_size or train.gradient_accumulation"
        )
    heldout_buckets = buckets_of(manifest, "heldout", len(heldout_rows))
    heldout = HeldOut(heldout_rows, manifest["heldout_sources"], heldout_buckets, settings.heldout_rows, rows_per_step)
    heldout_capacities = heldout.capacities(batches.group) if recipe.loss.rows == "serving" else None
    heldout_loader = Loader(heldout.rows, heldout_capacities, batches.group, backend)

    # The frozen target, and the run that is already there, which goes on if it is the same.
    claim_output(out)
    warm_head = None
    if settings.warm_start:  # keeps the head's own vocabulary: its lm_head rows mean nothing under another
        warm_head, d2t = load_head(Path(settings.warm_start))
        draft_ids = draft_ids_of(d2t)
    target = open_target(recipe.target.path, getattr(torch, recipe.target.dtype), draft_ids)
    target_config = target.model.config
    data_key = f"{manifest['key']} {target.fingerprint()}"
    saved = checkpoints.load_latest(out / "checkpoints", warn=print)
    if saved:
        checkpoints.refuse_changed_run(saved, recipe, data_key)
    if backend.process_index == 0:
        write_run_file(recipe, out)
    first_step = backend.agreed(saved.micro_step if saved else 0, "the newest checkpoint; train.out must be shared")

    # With reuse_states the target runs once over all rows, and the step starts from what it said.
    lm_head_rows = linear_rows(target_config, target.draft_rows.float())
    head = Eagle3Head(draft_config(target_config, len(draft_ids)))
    if warm_head is not None:
        refuse_other_head(warm_head.config, head.config, settings.warm_start)
    d2t, t2d = d2t_t2d(draft_ids, target_config.vocab_size)
    target = backend.place_target(target)
    backend.settle()
    norm_weight = backend.to_host(target.final_norm_weight).float() + norm_offset(target_config)

    @backend.compile
    def target_states(batch):
        return target.states(batch["input_ids"], batch["position_ids"], batch["document_ids"])

    def states_of(host_batch):
        if stopping:
            raise Stopped
        return TargetStates(*map(backend.to_host, target_states(backend.put(host_batch))))

    if settings.reuse_states:
        if backend.process_count > 1 or len(batches.buckets) > 1:
            raise UserError("train.reuse_states needs one host and rows of one length; set it to false")
        for split, of in (("train", loader), ("heldout", heldout_loader)):
            of.store = StatesStore(Path(recipe.data.prepared) / "states" / split, of.rows, data_key)
            of.store.fill(states_of, rows_per_step)

    # The head: float32 master weights, from the checkpoint or from what the target says about a sample of rows.
    lr_scale = {}
    if saved:
        head.load_state_dict(saved.head)
    else:
        moments = InputMoments(head.config.hidden_size)
        for step in range(min(max(1, settings.init_rows // rows_per_step), epoch_steps)):
            batch, states = loader.states(batches.indices(step), states_of)
            embeds = backend.to_host(target.embed_tokens(batch["input_ids"].to(target.device)))
            moments.add(states.aux, embeds, states.hidden, norm_weight, batch["loss_mask"])
        initialise_head(head, settings.init, settings.seed, lm_head_rows, norm_weight, moments)
        lr_scale["fc.weight"] = 1 / moments.aux_rms().clamp_min(1e-3)
        if warm_head is not None:
            head.load_state_dict(warm_head.state_dict())
    head = backend.place_head(head)
    optimizer_steps = total_steps // settings.gradient_accumulation
    optimizer = AdamW(
        dict(head.named_parameters()), settings, optimizer_steps, backend, lr_scale, saved.optimizer if saved else None
    )
    step = TrainStep(recipe, backend, target, head, d2t, t2d, optimizer)
    backend.settle()

    def save(done: int, tau: float | None, folder: str = "checkpoints") -> Path:
        state = checkpoints.Checkpoint(
            micro_step=done,
            head={name: backend.to_host(value) for name, value in head.state_dict().items()},
            optimizer={name: backend.to_host(value) for name, value in optimizer.state().items()},
            d2t=d2t,
            t2d=t2d,
            recipe=dataclasses.asdict(recipe),
            data_key=data_key,
            draft_config=head.config.to_dict(),
            tau=tau,
        )
        if backend.process_index > 0:  # every host holds the whole state, one writes it
            return out / folder
        return checkpoints.save(out / folder, state, settings.keep)

    flops = flops_per_token(target_config, recipe)
    reporter = Reporter(settings, total_steps, first_step, dataclasses.asdict(recipe), backend, flops)
    with contextlib.closing(reporter), contextlib.ExitStack() as tracing:
        reporter.say(f"{backend.description}: {total_steps} steps of {rows_per_step} x {manifest['row_length']} tokens")
        planned = dict.fromkeys(step.graphs, len(batches.buckets)) | {"evaluation": len(heldout.lengths)}
        planned |= {"update": 1} if "update" in planned else {}
        reporter.say(
            f"compile budget: {sum(planned.values())} graphs ({', '.join(f'{n} {c}' for n, c in planned.items())})"
        )
        budget = CompileBudget(backend, planned, reporter.say, allow_recompile)
        if saved:
            reporter.say(f"continued after step {first_step}")

        def evaluate(done: int) -> float:
            figures = heldout.measure(heldout_loader, lambda batch: budget.run("evaluation", step.evaluate, batch))
            reporter.log_heldout(done, figures)
            return figures["tau"]

        whole_updates = -(-max_steps // settings.gradient_accumulation) * settings.gradient_accumulation
        last_step = min(total_steps, first_step + whole_updates) if max_steps else total_steps
        path = out / "checkpoints" / f"step-{first_step:08d}" if saved else None
        tau, window, waiting, done, ended = None, [], None, first_step, "done"
        if settings.patience and reporter.evaluations_without_gain() >= settings.patience:
            last_step, ended = first_step, "patience"
        if not saved and first_step < last_step:
            # The untrained head, to compare with.
            save(0, evaluate(0) if heldout.batches else None, "initial")

        for micro_step in range(first_step, last_step):
            batch, tokens = loader.load(batches.indices(micro_step))
            if profile and micro_step - first_step == PROFILED.start:
                tracing.enter_context(backend.profiler(str(out / "profile")))
            with reporter.dispatching():
                window.append(step.run(micro_step, batch, budget.run))
            if micro_step + 1 - first_step == PROFILED.stop:
                tracing.close()
            reporter.count(tokens)
            done = micro_step + 1

            # Read metrics one step late: the device already has the next step, so the host never makes it wait.
            if waiting:
                reporter.log(*waiting, optimizer, budget.made)
                waiting = None
            if done % settings.log_every == 0 or done == last_step:
                waiting, window = (done, window), []

            if done % settings.gradient_accumulation:
                continue
            updates = done // settings.gradient_accumulation
            every = settings.eval_every
            measured = done == total_steps or (updates % every == 0 if every else _passes(done, epoch_steps, settings))
            measured = measured and heldout.batches
            tau = evaluate(done) if measured else None
            stop = backend.agree_to_stop(micro_step, bool(stopping))
            if measured or stop or updates % settings.save_every == 0 or done == last_step:
                path = save(done, tau)
            if stop:
                ended = "SIGTERM"
                reporter.say(f"SIGTERM: saved {path}; start again to continue")
                break
            if settings.patience and reporter.evaluations_without_gain() >= settings.patience:
                ended = "patience"
                reporter.say(f"no better tau in {settings.patience} evaluations: stopped")
                break
        if waiting:
            reporter.log(*waiting, optimizer, budget.made)
        best = reporter.best_tau()
    ended = "max_steps" if ended == "done" and done < total_steps else ended
    return {
        "micro_steps": done,
        "of": total_steps,
        "tau": tau,
        "best_tau": best,
        "checkpoint": path and str(path),
        "ended": ended,
    }


def _passes(done: int, epoch_steps: int, settings) -> bool:
    """Whether an epoch ended within the last update."""
    return done // epoch_steps > (done - settings.gradient_accumulation) // epoch_steps


def refuse_other_head(warm, wanted, path: str) -> None:
    """Raises UserError when the head of a warm start was made for another target."""
    names = (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "rope_theta",
    )
    differences = [
        f"{n} is {getattr(warm, n)}, not {getattr(wanted, n)}" for n in names if getattr(warm, n) != getattr(wanted, n)
    ]
    if differences:
        raise UserError(f"train.warm_start: the head at {path} was made for another target: {'; '.join(differences)}")
