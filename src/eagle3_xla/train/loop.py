"""`train`: the loop, top to bottom.

    prepared rows + frozen target -> micro-steps (train/step.py) -> metrics.jsonl, tracker, checkpoints

It continues by itself from the newest whole checkpoint in `train.out`, and ends with the weights an unbroken run has.
"""

import dataclasses
import signal
from pathlib import Path

import numpy as np
import torch

from eagle3_xla import checkpoint as checkpoints
from eagle3_xla.config import Recipe, UserError, claim_output, write_run_file
from eagle3_xla.data.batches import batch_indices, steps_per_epoch, to_tensors
from eagle3_xla.data.prepare import load_prepared
from eagle3_xla.data.vocab import d2t_t2d
from eagle3_xla.draft.initialise import InputMoments, initialise_head
from eagle3_xla.draft.model import Eagle3Head, draft_config
from eagle3_xla.loss.metrics import add_up, expected_tau, rates
from eagle3_xla.target.model import Target, TargetStates, load_target
from eagle3_xla.target.states import StatesStore
from eagle3_xla.train.optimizer import AdamW
from eagle3_xla.train.reporting import Reporter
from eagle3_xla.train.step import TrainStep, unpack_metrics
from eagle3_xla.xla import make_backend


def train(recipe: Recipe, max_steps: int = 0) -> dict:
    """Train to the end of the recipe, or save and stop after `max_steps` further micro-steps (0: no such limit).

    Returns a summary: `micro_steps` done, `of` how many, held-out expected `tau`, the last `checkpoint`.
    Raises UserError for a recipe, data or output folder that doesn't fit.
    """
    settings = recipe.train
    if not settings.out:
        raise UserError("setting train.out is empty; name the folder for checkpoints and metrics")
    out = Path(settings.out)
    backend = make_backend(recipe.xla)  # first: XLA devices must exist before autograd runs anywhere

    # The data: fixed-shape rows; batch i is a pure function of (seed, i).
    train_rows, heldout_rows, draft_ids, manifest = load_prepared(recipe.data.prepared)
    rows_per_step = settings.batch_size * backend.data_parallel
    epoch_steps = steps_per_epoch(len(train_rows), rows_per_step)
    total_steps = settings.epochs * epoch_steps // settings.gradient_accumulation * settings.gradient_accumulation
    if total_steps == 0:
        raise UserError(
            f"{len(train_rows)} rows don't fill one optimizer step of {rows_per_step} rows x "
            f"{settings.gradient_accumulation}; lower train.batch_size or train.gradient_accumulation"
        )
    heldout_rows = heldout_rows.select(
        range(min(settings.heldout_rows, len(heldout_rows)) // rows_per_step * rows_per_step)
    )

    # The frozen target, and the run that is already there, which goes on if it is the same.
    claim_output(out)
    target = Target(load_target(recipe.target.path, getattr(torch, recipe.target.dtype)), draft_ids)
    data_key = f"{manifest['key']} {target.fingerprint()}"
    saved = checkpoints.load_latest(out / "checkpoints", warn=print)
    if saved:
        checkpoints.refuse_changed_run(saved, recipe, data_key)
    write_run_file(recipe, out)
    first_step = saved.micro_step if saved else 0

    # With reuse_states the target runs once over all rows, and the step starts from what it said.
    lm_head_rows, norm_weight = target.draft_rows.float(), target.final_norm_weight.float()
    head = Eagle3Head(draft_config(target.model.config, len(draft_ids)))
    d2t, t2d = d2t_t2d(draft_ids, target.model.config.vocab_size)
    target = backend.place_target(target)
    backend.settle()

    @backend.compile
    def target_states(batch):
        return target.states(batch["input_ids"], batch["position_ids"], batch["document_ids"])

    def states_of(host_batch):
        return TargetStates(*map(backend.to_host, target_states(backend.put(host_batch))))

    stores = {}
    if settings.reuse_states:
        for split, rows in (("train", train_rows), ("heldout", heldout_rows)):
            stores[split] = StatesStore(Path(recipe.data.prepared) / "states" / split, rows, data_key)
            stores[split].fill(states_of, rows_per_step)

    # The head: float32 master weights, from the checkpoint or from what the target says about a sample of rows.
    lr_scale = {}
    if saved:
        head.load_state_dict(saved.head)
    else:
        moments = InputMoments(head.config.hidden_size)
        for start in range(0, min(settings.init_rows, len(train_rows)) // rows_per_step * rows_per_step, rows_per_step):
            indices = np.arange(start, start + rows_per_step)
            batch = to_tensors(train_rows[indices])
            states = stores["train"].read(indices) if stores else states_of(batch)
            embeds = backend.to_host(target.embed_tokens(batch["input_ids"].to(target.device)))
            moments.add(states.aux, embeds, states.hidden, norm_weight, batch["loss_mask"])
        initialise_head(head, settings.init, settings.seed, lm_head_rows, norm_weight, moments)
        lr_scale["fc.weight"] = 1 / moments.aux_rms().clamp_min(1e-3)
    head = backend.place_head(head)
    optimizer_steps = total_steps // settings.gradient_accumulation
    optimizer = AdamW(
        dict(head.named_parameters()), settings, optimizer_steps, backend, lr_scale, saved.optimizer if saved else None
    )
    step = TrainStep(recipe, backend, target, head, d2t, t2d, optimizer)
    backend.settle()

    def load_batch(rows, split, indices):
        batch = to_tensors(rows[indices])
        tokens = int((batch["document_ids"] > 0).sum())
        if stores:
            batch |= stores[split].read(indices)._asdict()
        return backend.put(batch), tokens

    def save(done: int, folder: str = "checkpoints") -> Path:
        state = checkpoints.Checkpoint(
            micro_step=done,
            head={name: backend.to_host(value) for name, value in head.state_dict().items()},
            optimizer={name: backend.to_host(value) for name, value in optimizer.state().items()},
            d2t=d2t,
            t2d=t2d,
            recipe=dataclasses.asdict(recipe),
            data_key=data_key,
            draft_config=head.config.to_dict(),
        )
        return checkpoints.save(out / folder, state, settings.keep)

    def evaluate() -> tuple[float, list[float]]:
        batches = np.arange(len(heldout_rows)).reshape(-1, rows_per_step)
        sums = [unpack_metrics(step.evaluate(load_batch(heldout_rows, "heldout", b)[0]))[3] for b in batches]
        acceptance = rates(add_up(sums))["acceptance"]
        return expected_tau(acceptance), acceptance

    stopping = []
    previous_handler = signal.signal(signal.SIGTERM, lambda *_: stopping.append("SIGTERM"))
    reporter = Reporter(
        settings, total_steps, first_step, {"target": recipe.target.path, **dataclasses.asdict(settings)}
    )
    reporter.say(f"{backend.description}: {total_steps} steps of {rows_per_step} x {manifest['row_length']} tokens")
    if saved:
        reporter.say(f"continued after step {first_step}")
    whole_updates = -(-max_steps // settings.gradient_accumulation) * settings.gradient_accumulation
    last_step = min(total_steps, first_step + whole_updates) if max_steps else total_steps
    path, tau, window, waiting = None, None, [], None
    if saved is None:
        save(0, "initial")  # the untrained head, to compare with
        if len(heldout_rows):
            reporter.log_heldout(0, *evaluate())

    compiled_before = backend.compilations()
    for micro_step in range(first_step, last_step):
        indices = batch_indices(micro_step, len(train_rows), rows_per_step, settings.seed)
        batch, tokens = load_batch(train_rows, "train", indices)
        window.append(step.run(micro_step, batch))
        reporter.count(tokens)
        done = micro_step + 1

        # Read metrics one step late: the device already has the next step, so the host never makes it wait.
        if waiting:
            reporter.log(*waiting, optimizer, backend.compilations() - compiled_before)
            waiting = None
        if done % settings.log_every == 0 or done == last_step:
            waiting, window = (done, window), []

        at_update = done % settings.gradient_accumulation == 0
        if len(heldout_rows) and (done % epoch_steps == 0 or done == total_steps):
            tau, acceptance = evaluate()
            reporter.log_heldout(done, tau, acceptance)
        due = done // settings.gradient_accumulation % settings.save_every == 0
        if at_update and (due or stopping or done == last_step):
            path = save(done)
        if at_update and stopping:
            reporter.say(f"{stopping[0]}: saved {path}; start again to continue")
            break
    if waiting:
        reporter.log(*waiting, optimizer, backend.compilations() - compiled_before)

    signal.signal(signal.SIGTERM, previous_handler)
    reporter.close()
    done = done if last_step > first_step else first_step
    return {"micro_steps": done, "of": total_steps, "tau": tau, "checkpoint": str(path)}
