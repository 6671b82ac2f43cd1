"""The loop learns; a seed gives the same weights twice; a killed run ends where an unbroken one does."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from eagle3_xla import checkpoint as checkpoints
from eagle3_xla.config import load_recipe
from eagle3_xla.data.prepare import prepare
from eagle3_xla.errors import RunError, UserError
from eagle3_xla.outputs import only_writer
from eagle3_xla.target.states import StatesStore
from eagle3_xla.train.loop import train
from eagle3_xla.train.step import TrainStep


def final_weights(recipe):
    return checkpoints.load_latest(Path(recipe.train.out) / "checkpoints", warn=pytest.fail)


def assert_same(a, b):
    assert a.micro_step == b.micro_step
    for group in ("head", "optimizer"):
        ours, theirs = getattr(a, group), getattr(b, group)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def recipe_of(small_run, *more):
    recipe = load_recipe(None, [*small_run, *more])
    prepare(recipe)
    return recipe


@pytest.mark.parametrize(
    "reuse, accumulation, warmup, optimizer",
    [(False, 2, 0.5, "adamw"), (True, 1, 0, "muon")],
    ids=["target in the step, growing TTT length", "states reused, Muon"],
)
def test_a_seed_gives_the_same_weights_twice_and_resumes_to_them(
    small_run, tmp_path, reuse, accumulation, warmup, optimizer
):
    more = [f"train.reuse_states={reuse}", f"train.gradient_accumulation={accumulation}", "train.init=least_squares"]
    more += [f"loss.ttt_warmup={warmup}", f"train.optimizer={optimizer}", "train.epochs=1"]
    whole = recipe_of(small_run, *more)
    summary = train(whole)
    assert summary["micro_steps"] == summary["of"] >= 8
    other_seed = recipe_of(small_run, *more, f"train.out={tmp_path / 'other'}", "train.seed=1")
    train(other_seed)
    assert not torch.equal(final_weights(whole).head["fc.weight"], final_weights(other_seed).head["fc.weight"])

    broken_off = recipe_of(small_run, *more, f"train.out={tmp_path / 'parts'}")
    while train(broken_off, max_steps=2 * accumulation)["micro_steps"] < summary["of"]:
        pass
    assert_same(final_weights(whole), final_weights(broken_off))
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(summary["of"] + 1))


def test_it_learns(trained):
    rows = [json.loads(line) for line in (trained.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    taus = [row["heldout_tau"] for row in rows if "heldout_tau" in row]
    assert losses[-1] < 0.9 * losses[0]
    assert taus[-1] > 1.5 and taus[-1] > taus[0]


def test_states_reused_equal_the_target_in_the_step(small_run, tmp_path):
    """Within the rounding of the stored states to bfloat16."""
    losses = []
    for reuse in (False, True):
        recipe = recipe_of(small_run, f"train.reuse_states={reuse}", f"train.out={tmp_path / str(reuse)}")
        train(recipe, max_steps=1)
        losses.append(json.loads((tmp_path / str(reuse) / "metrics.jsonl").read_text().splitlines()[1])["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_a_changed_recipe_is_refused_with_its_differences(small_run):
    recipe = recipe_of(small_run)
    train(recipe, max_steps=1)
    saved = final_weights(recipe)
    assert saved.d2t.dtype == torch.int64 and saved.t2d.dtype == torch.bool
    assert int(saved.t2d.sum()) == len(saved.d2t) == 128
    begun = (Path(recipe.train.out) / "run.yaml").read_text()
    with only_writer(recipe.train.out, "train"), pytest.raises(UserError, match="another `train` writes to"):
        train(recipe_of(small_run, "train.save_every=1"))
    assert (Path(recipe.train.out) / "run.yaml").read_text() == begun
    with pytest.raises(UserError, match=r"changed: loss.decay: 0.8 -> 0.7; train.lr: 0.0008 -> 0.1"):
        train(recipe_of(small_run, "train.lr=0.1", "loss.decay=0.7"))
    with pytest.raises(UserError, match="the content of data.prepared"):
        chats = Path(load_recipe(None, small_run).data.train[0].path)
        chats.write_text(chats.read_text().replace("Paris", "Lyon"))
        train(recipe_of(small_run))


# A run that is interrupted once it has a checkpoint.
INTERRUPTED = """
import os, runpy, signal, sys, threading, time
from pathlib import Path
folder = Path(sys.argv[-1].removeprefix("--train.out=")) / "checkpoints"
def interrupt():
    while not list(folder.glob("step-*")):
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt, daemon=True).start()
sys.argv.insert(1, "train")
runpy.run_module("eagle3_xla", run_name="__main__", alter_sys=True)
"""


# SIGTERM takes the same way as Ctrl-C; tests/hosts sends it. SIGKILL: test_kills.py.
@pytest.mark.slow
def test_an_interrupted_process_resumes_to_the_same_weights(forks, small_run, tmp_path):
    long = ["train.save_every=2", "loss.ttt_length=1"]
    whole = recipe_of(small_run, *long)
    train(whole)
    out = f"train.out={tmp_path / 'killed'}"
    killed = recipe_of(small_run, *long, out)
    done = forks.run_code(INTERRUPTED, *[f"--{setting}" for setting in [*small_run, *long, out]])
    before = final_weights(killed).micro_step
    assert 0 < before < final_weights(whole).micro_step, done.stderr
    assert done.returncode == 0 and "SIGINT: saved" in done.stderr and "the same command again" in done.stderr
    assert train(killed)["micro_steps"] == final_weights(whole).micro_step
    assert_same(final_weights(whole), final_weights(killed))


def test_a_damaged_checkpoint_is_passed_over(small_run):
    recipe = recipe_of(small_run, "train.save_every=1", "train.keep=3")
    train(recipe)
    whole = final_weights(recipe)
    folders = sorted((Path(recipe.train.out) / "checkpoints").glob("step-*"))
    assert len(folders) == 3
    state = folders[-1] / "state.safetensors"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    (folders[-2] / "meta.json").write_text("{")
    said = []
    latest = checkpoints.load_latest(folders[0].parent, warn=said.append)
    assert latest.micro_step == whole.micro_step - 2
    assert len(said) == 2 and "damaged" in said[0] and "damaged" in said[1]
    train(recipe)
    assert_same(whole, final_weights(recipe))


def test_a_signal_before_the_first_step_tells_where_the_run_is(small_run, tmp_path, monkeypatch):
    recipe = recipe_of(
        small_run, "train.reuse_states=true", "train.epochs=1", "loss.ttt_length=1", "train.eval_every=1"
    )
    begun = train(recipe, max_steps=1)
    shutil.rmtree(tmp_path / "data" / "states")
    fill = StatesStore.fill

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        fill(*arguments)

    monkeypatch.setattr(StatesStore, "fill", interrupted)
    assert train(recipe) == begun | {"ended": "SIGTERM"} and begun["tau"]


def test_weights_that_are_no_numbers_replace_no_checkpoint(small_run, monkeypatch):
    recipe = recipe_of(small_run, "train.save_every=1", "train.keep=1", "train.heldout_rows=0", "loss.ttt_length=1")
    step = TrainStep.run

    def diverging(self, micro_step, *arguments):
        if micro_step == 2:
            self.head.fc.weight.data[0, 0] = torch.nan
        return step(self, micro_step, *arguments)

    monkeypatch.setattr(TrainStep, "run", diverging)
    with pytest.raises(RunError, match=r"not finite after step 3: .* lower train.lr. .*/step-00000002 is whole"):
        train(recipe)
    assert final_weights(recipe).micro_step == 2
