"""Held-out acceptance inside the run, early stop by it, warm starts, rows of several lengths, traces."""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eagle3_xla import checkpoint as checkpoints
from eagle3_xla.config import load_recipe
from eagle3_xla.data.prepare import load_prepared, prepare
from eagle3_xla.errors import UserError
from eagle3_xla.export import export
from eagle3_xla.target.families import load_target_config
from eagle3_xla.train import heldout, reporting
from eagle3_xla.train.flops import flops_per_token
from eagle3_xla.train.heldout import HeldOut
from eagle3_xla.train.loop import train
from eagle3_xla.train.setup import set_up
from eagle3_xla.train.step import TrainStep, unpack_metrics
from eagle3_xla.xla.hosts import Hosts
from eagle3_xla.xla.plain import PlainBackend


def rows_of(out) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def run(small_run, *more):
    recipe = load_recipe(None, [*small_run, *more])
    prepare(recipe)
    return recipe, train(recipe)


def test_each_source_is_measured_and_the_best_is_exported(small_run, chat_file, tmp_path, capfd):
    other = shutil.copy(chat_file, tmp_path / "other.jsonl")
    sources = f"data.heldout=[{{path: {chat_file}, name: first}}, {{path: {other}, name: second}}]"
    recipe, summary = run(small_run, sources, "train.eval_every=2", "train.epochs=1", "train.heldout_rows=8")
    measured = [row for row in rows_of(recipe.train.out) if "heldout_tau" in row]
    assert [row["step"] for row in measured] == [*range(0, summary["of"], 2), summary["of"]]
    for row in measured:
        assert set(row["heldout_sources"]) == {"first", "second"}
        assert min(row["heldout_sources"].values()) <= row["heldout_tau"] <= max(row["heldout_sources"].values())
        assert row["heldout_tau"] == pytest.approx(1 + sum(row["heldout_acceptance"]))
    assert summary["best_tau"] == max(row["heldout_tau"] for row in measured)
    assert "before the first step" not in capfd.readouterr().err
    trained = max(measured[1:], key=lambda row: (row["heldout_tau"], row["step"]))
    assert export(Path(recipe.train.out), tmp_path / "head")["micro_step"] == trained["step"]


def test_tau_is_of_the_rows_that_are_drafted_at_whatever_the_loss_counts(small_run, tmp_path):
    prepare(load_recipe(None, small_run))
    figures = {}
    for rows in ("serving", "specforge"):
        recipe = load_recipe(None, [*small_run, f"loss.rows={rows}", f"train.out={tmp_path / rows}"])
        run = set_up(recipe, [], Hosts(), ExitStack())
        batches = [run.data.heldout_loader.load(*batch[1:])[0] for batch in run.data.heldout.batches]
        assert all("rows" in batch for batch in batches)  # the others are not computed
        figures[rows] = torch.stack([run.step.evaluate(batch) for batch in batches])
    assert torch.equal(figures["serving"], figures["specforge"])


def test_it_stops_when_tau_no_longer_grows(small_run, capfd, monkeypatch):
    stuck = ["train.eval_every=1", "train.patience=3", "train.lr=1e-12", "train.epochs=4"]
    recipe = load_recipe(None, [*small_run, *stuck])
    prepare(recipe)
    with monkeypatch.context() as broken_off, pytest.raises(ZeroDivisionError):  # before the first checkpoint
        broken_off.setattr(TrainStep, "run", lambda *_: 1 / 0)
        train(recipe)
    assert [row["step"] for row in rows_of(recipe.train.out)] == [0]
    summary = train(recipe)
    assert summary["ended"] == "patience" and summary["micro_steps"] == 3 < summary["of"]
    assert [row["step"] for row in rows_of(recipe.train.out) if "heldout_tau" in row] == [0, 1, 2, 3]
    start = Path(recipe.train.out) / "initial" / "step-00000000"
    assert f"before the first step: train.lr may be too high; that head is at {start}\n" in capfd.readouterr().err
    assert checkpoints.load(start).tau == summary["best_tau"]
    (Path(recipe.train.out) / "metrics.jsonl").unlink()  # a full disk costs the log
    assert train(recipe) == summary and summary["checkpoint"].endswith("step-00000003")


@pytest.mark.slow
def test_warm_start_keeps_the_heads_vocabulary(trained, small_run, tmp_path, forks):
    small_run = [*small_run, "loss.ttt_length=2"]
    more = [f"train.warm_start={trained}", "data.draft_vocab_size=96", f"train.out={tmp_path / 'warm'}"]
    more += [f"data.prepared={tmp_path / 'data-96'}"]
    warm, summary = run(small_run, *more, "train.epochs=1")
    cold = load_recipe(None, [*small_run, f"train.out={tmp_path / 'cold'}"])
    prepare(cold)
    train(cold, max_steps=1)  # its acceptance before the first step is all that is read
    assert summary["micro_steps"] == summary["of"]  # not a continuation: it starts at step 0
    before = checkpoints.load_latest(trained.parent / "run" / "checkpoints", pytest.fail)
    after = checkpoints.load_latest(tmp_path / "warm" / "checkpoints", pytest.fail)
    assert torch.equal(before.d2t, after.d2t) and len(after.d2t) == 256
    taus = [rows_of(tmp_path / out)[0]["heldout_tau"] for out in ("warm", "cold")]
    assert taus[0] > taus[1] + 0.2

    sharded = [*small_run, *more, f"train.out={tmp_path / 'xla'}", "train.batch_size=1", "xla.device=xla"]
    done = forks.run("train", "--max-steps", 1, *[f"--{s}" for s in [*sharded, "xla.dp=2", "xla.tp=2"]])
    assert done.returncode == 0, done.stderr
    measured = [rows_of(tmp_path / out)[0]["heldout_acceptance"] for out in ("warm", "xla")]
    assert measured[0] == pytest.approx(measured[1]) and measured[0][1] > 0

    shutil.copytree(trained, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config |= {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"made for another target: rope_theta is 5.0, not 10000"):
        run(small_run, f"train.warm_start={tmp_path / 'other'}", f"train.out={tmp_path / 'refused'}")


@pytest.mark.slow
def test_rows_of_two_lengths_compile_once_each(small_run, forks):
    bucketed = [*small_run, "data.packing=bucketed", "data.buckets=[50]", "train.epochs=1", "xla.device=xla"]
    bucketed += ["train.heldout_rows=32", "loss.ttt_length=1"]
    manifest = prepare(load_recipe(None, bucketed))
    assert [bucket[0] for bucket in manifest["train"]["buckets"]] == [50, 64]
    done = forks.run("train", "--json", *[f"--{setting}" for setting in bucketed])
    assert done.returncode == 0, done.stderr
    assert "compile budget: 4 graphs (step 2, evaluation 2)" in done.stderr
    rows = rows_of(load_recipe(None, bucketed).train.out)
    assert rows[-1].get("compilations", rows[-2].get("compilations")) == 4


def test_held_out_rows_are_as_long_as_all_of_their_source(small_run, chat_file, tmp_path):
    """Rows of several lengths lie one length after the other."""
    lines, other, python = chat_file.read_text().splitlines(), tmp_path / "other.jsonl", tmp_path / "python.jsonl"
    other.write_text("\n".join(sorted(lines, key=len)[:20]))  # most of them short
    python.write_text("\n".join(line for line in lines if "Python" in line))  # all of them long
    settings = ["data.row_length=64", "data.packing=bucketed", "data.buckets=[47, 50]"]
    settings += [f"data.train=[{python}]", f"data.heldout=[{chat_file}, {other}]", "train.heldout_rows=1"]
    recipe = load_recipe(None, [*small_run, *settings, "train.reuse_states=true"])
    prepare(recipe)
    _, rows, _, manifest = load_prepared(recipe.data.prepared)
    source, lengths = np.asarray(rows["source"]), np.array([len(ids) for ids in rows["input_ids"]])
    assert set(lengths) == {47, 50, 64}
    for limit, count in ((1, 1), (2, 2), (3, 2), (16, 16), (64, 52)):
        chosen = HeldOut(rows, manifest["heldout_sources"], manifest["heldout"]["buckets"], limit, 2).rows
        assert len(chosen) == count
        of_chosen, its_source = np.array([len(ids) for ids in chosen["input_ids"]]), np.asarray(chosen["source"])
        for number in set(its_source):
            mine, all_of_it = of_chosen[its_source == number], lengths[source == number]
            for length in set(all_of_it):
                share, expected = (mine == length).mean(), (all_of_it == length).mean()
                assert abs(share - expected) <= 1 / len(mine), (limit, number, length)
    assert len(manifest["train"]["buckets"]) == 1
    with pytest.raises(UserError, match="train.reuse_states needs rows of one length"):  # others, with another limit
        train(recipe)


def test_figures_of_a_run_and_its_trace(small_run, small_target, forks, tmp_path):
    prepare(load_recipe(None, small_run))
    settings = [f"--{setting}" for setting in [*small_run, "xla.peak_tflops=0.05"]]
    settings += ["--data.row_length=2048", "--data.draft_vocab_size=32000"]  # not what was prepared
    done = forks.run("train", "--profile", "--json", "--device", "cpu", *settings)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run" / "profile").rglob("*.json*"))
    row = next(row for row in rows_of(tmp_path / "run") if row["step"] == 6 and "loss" in row)
    assert 0 < row["mfu"] < 1 and row["memory_gib"] > 0.1 and row["host_seconds_per_step"] > 0
    target, reused = load_target_config(str(small_target)), load_recipe(None, [*small_run, "train.reuse_states=true"])
    flops, without_target = (flops_per_token(target, recipe) for recipe in (load_recipe(None, small_run), reused))
    assert row["mfu"] * 0.05e12 == pytest.approx(flops * row["tokens_per_second"])
    target.num_hidden_layers += 1
    assert flops_per_token(target, reused) == without_target < flops
    assert {"loss", "acc", "tokens_per_second", "compilations", "lr", "gradient_norm"} <= row.keys()
    waits = [f"{what}_wait_seconds" for what in ("input", "save", "evaluation")]
    assert all(row[name] >= 0 for name in waits)
    assert all(sum(row.get(name, 0) for row in rows_of(tmp_path / "run")) > 0 for name in waits)
    assert json.loads(done.stdout)["ended"] == "done"


@pytest.mark.parametrize("log_every, eval_every, behind", [(1, 6, True), (4, 6, True), (1, 6, False), (4, 6, False)])
def test_speed_on_a_device_that_runs_behind_the_host(small_run, monkeypatch, log_every, eval_every, behind):
    """Each call takes it a second, during which the host dispatches the next; reading a result waits for it. And on one
    that the host waits for."""
    clock, free, ready, tokens = 0.0, 0.0, {}, []
    monkeypatch.setattr(PlainBackend, "runs_behind", behind)

    def run_step(step, micro_step, batch, call):
        nonlocal free, clock
        free = max(free, clock) + 1
        clock = clock if behind else free
        result = torch.ones(1 + 4 * 3)
        ready[id(result)] = free, result
        tokens.extend([int((batch["document_ids"] > 0).sum())] * (micro_step is not None))
        return result, torch.ones(())

    def read(result):
        nonlocal clock
        clock = max(clock, ready[id(result)][0])
        return unpack_metrics(result)

    monkeypatch.setattr(TrainStep, "run", run_step)
    monkeypatch.setattr(TrainStep, "evaluate", lambda step, batch: run_step(step, None, batch, None)[0])
    for module in (reporting, heldout):
        monkeypatch.setattr(module, "unpack_metrics", read)
    monkeypatch.setattr(reporting, "time", SimpleNamespace(perf_counter=lambda: clock))
    recipe, summary = run(small_run, f"train.log_every={log_every}", f"train.eval_every={eval_every}")
    rows, since = rows_of(recipe.train.out), 0  # since: when the clock was started
    assert summary["of"] > 2 * eval_every
    for row in rows:
        if "loss" in row:
            steps = tokens[since : row["step"]]
            assert row["tokens_per_second"] == pytest.approx(sum(steps) / len(steps)), row["step"]
        since = row["step"]
