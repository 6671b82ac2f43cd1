"""A run on data, targets and checkpoints that don't fit: one line each, and what it does without held-out rows."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_checkpoint import file_size_limit

from eagle3_xla import checkpoint as checkpoints
from eagle3_xla import storage
from eagle3_xla.config import load_recipe
from eagle3_xla.data.prepare import prepare
from eagle3_xla.data.vocab import d2t_t2d
from eagle3_xla.draft.model import Eagle3Head, draft_config
from eagle3_xla.errors import UserError
from eagle3_xla.export import export
from eagle3_xla.plan.rows import run_graphs
from eagle3_xla.target.families import load_target_config
from eagle3_xla.target.model import TargetStates
from eagle3_xla.target.states import StatesStore
from eagle3_xla.train.loop import train
from eagle3_xla.xla.backend import make_backend
from eagle3_xla.xla.config import XlaConfig


def test_without_held_out_rows(small_run, small_target, capsys, tmp_path):
    own = [setting for setting in small_run if not setting.startswith("data.heldout")] + ["data.heldout_share=0"]
    assert prepare(load_recipe(None, own))["heldout"]["rows"] == 0
    result = train(load_recipe(None, own), max_steps=1)
    assert result["micro_steps"] == 1 and result["tau"] is None
    said = "no held-out rows, so no tau is measured: `export` takes the newest checkpoint, not the best"
    output = capsys.readouterr().err
    assert said in output and "the rows are as prepared" not in output
    own = [*own, "data.row_length=96", "data.packing=bucketed"]
    with pytest.raises(UserError, match="train.patience counts evaluations, and there are no held-out rows"):
        train(load_recipe(None, [*own, "train.patience=2", f"train.out={tmp_path / 'other'}"]))
    said = "the rows are as prepared: data.row_length 64, not 96; data.packing packed, not bucketed\n"
    assert said in capsys.readouterr().err

    # The same folder, for a target of another vocabulary.
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    size = manifest["vocab_size"]
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest | {"vocab_size": size + 1}))
    with pytest.raises(UserError, match=rf"was prepared for a target of {size + 1} tokens .*; this one has {size}\."):
        train(load_recipe(None, own))

    # And for one of the same size whose chat template, then whose end-of-turn token is another.
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    for file, change in (
        ("chat_template.jinja", lambda text: f"{text} "),
        ("generation_config.json", lambda text: json.dumps({"eos_token_id": 5})),
    ):
        other = tmp_path / file
        shutil.copytree(small_target, other)
        (other / file).write_text(change((other / file).read_text()))
        with pytest.raises(UserError, match="was prepared with another chat template, tokenizer or end-of-turn token"):
            train(load_recipe(None, [*own, f"target.path={other}", f"train.out={tmp_path / 'other'}"]))

    # A checkpoint with whole checksums and a meta.json of another kind.
    path = tmp_path / "run" / "checkpoints" / "step-00000001"
    meta = json.loads((path / "meta.json").read_text())
    for change, message in (
        ({"micro_step": "one"}, "meta.json: micro_step is 'one'; a whole number from 0"),
        ({"tau": [1]}, r"meta.json: tau is \[1\]; a number"),
        ({"heldout_taus": [None]}, "meta.json: tau is null; a number"),
        ({"recipe": None}, "meta.json: recipe is null; a mapping"),
        ({"data_key": 1}, "meta.json: data_key is 1; a text"),
        ({"draft_config": []}, r"meta.json: draft_config is \[\]; a mapping"),
        ({"more": 1}, "meta.json: more is no field of a checkpoint"),
    ):
        (path / "meta.json").write_text(json.dumps(meta | change))
        sums = [f"{storage.sha256(path / name)}  {name}\n" for name in ("state.safetensors", "meta.json")]
        (path / "SHA256SUMS").write_text("".join(sums))
        with pytest.raises(UserError, match=message):
            checkpoints.load(path)


def test_a_head_of_a_larger_vocabulary(small_run, small_target, tmp_path):
    """Its draft tokens may lie beyond this target's rows."""
    config = load_target_config(str(small_target))
    size = config.vocab_size
    config.vocab_size = 2 * size
    d2t, t2d = d2t_t2d(torch.arange(size, size + 128), 2 * size)
    head = Eagle3Head(draft_config(config, 128))
    weights = {name: value.detach() for name, value in head.state_dict().items()}
    saved = checkpoints.Checkpoint(1, weights, {"step": torch.ones(())}, d2t, t2d, {}, "", head.config.to_dict())
    export(checkpoints.save(tmp_path / "checkpoints", saved, keep=1), tmp_path / "head", "float32")
    prepare(load_recipe(None, small_run))
    with pytest.raises(UserError, match=f"made for another target: vocab_size is {2 * size}, not {size}"):
        train(load_recipe(None, [*small_run, f"train.warm_start={tmp_path / 'head'}"]))


def test_a_bucket_that_fills_no_batch(small_run, capsys):
    recipe = load_recipe(None, [*small_run, "data.packing=bucketed", "data.row_length=72", "data.buckets=[52, 64]"])
    (_, _, many), (length, _, few) = prepare(recipe)["train"]["buckets"]
    recipe.train.batch_size, recipe.train.epochs = few + 1, 1
    recipe.loss.ttt_length, recipe.loss.ttt_warmup = 2, 0.5
    assert train(recipe)["micro_steps"] == many // (few + 1) > 0
    said = capsys.readouterr().err
    left_out = f"{few} rows of {length} tokens fill no batch of {few + 1} and are not trained on; lower"
    assert said.count(f"{left_out} train.batch_size or leave {length} out of data.buckets\n") == 1
    graphs = run_graphs(recipe)  # as `plan` counts them
    counts = ", ".join(f"{name} {count}" for name, count in graphs.items())
    assert f"compile budget: {sum(graphs.values())} graphs ({counts})" in said
    assert counts.startswith("step, TTT 1 1, step, TTT 2 1, evaluation ")


class Rows(list):
    def __getitem__(self, indices):
        return {
            name: np.zeros((len(indices), 4), bool if name == "loss_mask" else np.int32)
            for name in ("input_ids", "position_ids", "document_ids", "loss_mask")
        }


def states_of(batch) -> TargetStates:
    shape = batch["input_ids"].shape
    return TargetStates(torch.ones(*shape, 6), torch.ones(*shape, 2), torch.ones(shape), torch.ones(shape))


def fill(folder, rows: int, batch_rows: int = 8) -> int:
    """Returns over how many rows the target ran."""
    asked = []

    def counted(batch) -> TargetStates:
        asked.append(len(batch["input_ids"]))
        return states_of(batch)

    StatesStore(folder, Rows(range(rows))).fill(counted, batch_rows, make_backend(XlaConfig(device="cpu")))
    return sum(asked)


def test_damaged_states_are_computed_again(tmp_path):
    """Of 40 rows in three files: each file that a power loss cut or emptied."""
    assert (fill(tmp_path, 40), fill(tmp_path, 40)) == (40, 0)
    first, second, third = sorted(tmp_path.glob("*.safetensors"))
    first.write_bytes(b"")
    second.write_bytes(second.read_bytes()[:-20])
    assert (fill(tmp_path, 40), fill(tmp_path, 40)) == (32, 0)
    third.write_bytes(first.read_bytes())  # of more rows
    assert (fill(tmp_path, 40), fill(tmp_path, 40)) == (8, 0)


def test_a_full_disk_leaves_no_half_written_states(tmp_path):
    with file_size_limit(1024), pytest.raises(SafetensorError, match="File too large"):
        fill(tmp_path, 40)
    assert not any(tmp_path.iterdir())


def test_the_target_runs_once_over_the_rows_whatever_a_batch_is(tmp_path):
    for batch_rows, asked in ((16, 80), (24, 72), (64, 128), (128, 128)):
        assert fill(tmp_path / str(batch_rows), 72, batch_rows) == asked  # the last batch is filled up
        whole = StatesStore(tmp_path / str(batch_rows), Rows(range(72))).read(np.arange(72))
        assert whole.aux.shape == (72, 4, 6)
    shards = sorted((tmp_path / "64").glob("*.safetensors"))
    for shard in shards[:1] + shards[2:]:
        shard.unlink()
    assert fill(tmp_path / "64", 72, 64) == 64  # 56 rows that don't lie together


def test_two_runs_that_compute_the_same_states(tmp_path, monkeypatch):
    fsync = os.fsync

    def other_run(descriptor: int) -> None:  # while this one writes its first shard
        fsync(descriptor)
        monkeypatch.setattr(os, "fsync", fsync)
        assert fill(tmp_path, 40) == 40

    monkeypatch.setattr(os, "fsync", other_run)
    assert (fill(tmp_path, 40), fill(tmp_path, 40)) == (40, 0)
    running, killed = (tmp_path / f"rows-000000.partial-{name}" for name in ("running", "killed"))
    for partial in (running, killed):
        partial.write_bytes(b"half")
    os.utime(killed, (0, 0))
    assert fill(tmp_path, 40) == 0 and running.exists() and not killed.exists()


def test_a_fine_tune_is_another_target(small_run, small_target, tmp_path, capfd):
    """It has the config and the lm_head of its base."""
    tuned = shutil.copytree(small_target, tmp_path / "fine-tune")
    tensors = load_file(tuned / "model.safetensors")
    tensors["model.layers.3.self_attn.q_proj.weight"] *= -1
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})

    def run(out: str, *more: str) -> None:
        settings = [*small_run, "train.reuse_states=true", "train.heldout_rows=0", f"train.out={tmp_path / out}"]
        train(load_recipe(None, [*settings, *more]), max_steps=1)

    prepare(load_recipe(None, small_run))
    run("base")
    states = tmp_path / "data" / "states"
    (base,) = states.iterdir()
    before = storage.files(base)
    with pytest.raises(UserError, match="changed: the content of data.prepared .* or of the target"):
        run("base", f"target.path={tuned}")
    assert str(base.name) not in capfd.readouterr().err
    run("tuned", f"target.path={tuned}")
    assert f"bytes of states of other rows or targets too: {base.name}; remove" in capfd.readouterr().err
    run("other dtype", "target.dtype=bfloat16")
    assert len(list(states.iterdir())) == 3 and storage.files(base) == before
    losses = [json.loads((tmp_path / out / "metrics.jsonl").read_text())["loss"] for out in ("base", "tuned")]
    assert losses[0] != losses[1]
