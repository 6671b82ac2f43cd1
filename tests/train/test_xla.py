"""The compiled SPMD step on virtual CPU devices: the losses of one plain CPU, one graph, no compilation after it."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from eagle3_xla.config import load_recipe
from eagle3_xla.data.prepare import prepare
from eagle3_xla.train.loop import train

STEPS = 4


def losses(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize(
    "dp, tp, accumulation, reuse, settings",
    [
        (2, 2, 1, False, ["xla.remat=true", "loss.ttt_length=2", "train.optimizer=muon"]),
        (2, 2, 1, False, ["xla.draft_data_parallel=true", "loss.ttt_length=2"]),
        (1, 1, 2, False, ["loss.ttt_length=1"]),
        (2, 1, 1, True, ["loss.ttt_length=1", "train.optimizer=muon"]),
        (2, 2, 1, False, ["xla.autocast=true", "target.dtype=bfloat16", "loss.ttt_length=2"]),
        (1, 4, 1, False, ["loss.anchors=0.3", "loss.ttt_length=3"]),
    ],
    ids=["2x2, remat, Muon", "2x2, draft dp 4", "accumulation", "states reused, dp 2, Muon", "bfloat16", "anchors"],
)
def test_spmd_equals_plain_torch(forks, small_run, tmp_path, dp, tp, accumulation, reuse, settings):
    shape = [f"train.gradient_accumulation={accumulation}", f"train.reuse_states={reuse}", "train.epochs=20"]
    shape += [setting for setting in settings if setting.startswith(("loss.", "train."))]
    plain = load_recipe(None, [*small_run, *shape, "train.batch_size=4"])
    prepare(plain)
    train(plain, max_steps=STEPS)
    sharded = [*small_run, *shape, f"train.out={tmp_path / 'xla'}", f"train.batch_size={4 // dp}"]
    sharded += ["xla.device=xla", f"xla.dp={dp}", f"xla.tp={tp}", *settings]
    done = forks.run("train", "--max-steps", STEPS, *[f"--{s}" for s in sharded])
    assert done.returncode == 0, done.stderr
    ours, golden = losses(tmp_path / "xla"), losses(Path(plain.train.out))
    assert [row["step"] for row in ours] == [row["step"] for row in golden] == list(range(1, STEPS + 1))
    rounding = 1e-2 if "xla.autocast=true" in settings else 1e-4  # golden is in float32
    for row, expected in zip(ours, golden):
        assert row["loss"] == pytest.approx(expected["loss"], rel=rounding)
    assert (ours[0]["loss"] == pytest.approx(golden[0]["loss"], rel=1e-4)) == (rounding == 1e-4)
    graphs = 2 if accumulation == 1 else 3  # the held-out evaluation is one of them
    assert f"compile budget: {graphs} graphs" in done.stderr
    # A row is written one step late, so the first one may count the next graph already.
    assert [row["compilations"] for row in ours][1:] == [graphs] * (STEPS - 1)


@pytest.mark.slow
def test_the_ttt_length_grows_and_each_length_is_one_graph(forks, small_run, tmp_path):
    settings = [*small_run, "loss.ttt_length=2", "loss.ttt_warmup=0.5", "train.epochs=1", "train.batch_size=4"]
    plain = load_recipe(None, settings)
    prepare(plain)
    train(plain)
    settings += [f"train.out={tmp_path / 'xla'}", "xla.device=xla"]
    done = forks.run("train", *[f"--{setting}" for setting in settings])
    assert done.returncode == 0, done.stderr
    assert "compile budget: 3 graphs (step, TTT 1 1, step, TTT 2 1, evaluation 1)" in done.stderr
    ours, golden = losses(tmp_path / "xla"), losses(Path(plain.train.out))
    for row, expected in zip(ours, golden, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert row["acc"] == pytest.approx(expected["acc"], abs=1e-6)
    lengths = [plain.loss.ttt_length_at(update, len(golden)) for update in range(len(golden))]
    assert lengths == [1, 1, 1, 1, 2, 2, 2, 2]
    assert [row["acc"][length:] for row, length in zip(golden, lengths)] == [[0.0] * (2 - k) for k in lengths]
    assert ours[-1]["compilations"] == 3


def test_remat_on_plain_torch_gives_the_same_weights(small_run, tmp_path):
    states = []
    for remat in (False, True):
        settings = [f"train.out={tmp_path / str(remat)}", f"xla.remat={remat}"]
        recipe = load_recipe(None, [*small_run, *settings])
        prepare(recipe)
        train(recipe, max_steps=3)
        states.append((Path(recipe.train.out) / "checkpoints" / "step-00000003" / "state.safetensors").read_bytes())
    assert states[0] == states[1]


def test_weights_and_moments_take_their_own_buffers(forks, small_run, small_target, tokenizer, tmp_path):
    """XLA gives an output the buffer of an argument of its size: another than its own has to be copied first."""
    # No matrices of one size but those of the same kind: gate, up and down; k and v.
    changes = {"num_hidden_layers": 8, "intermediate_size": 160, "num_key_value_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(**Qwen2Config.from_pretrained(small_target).to_dict() | changes)).save_pretrained(
        tmp_path / "distinct"
    )
    tokenizer.save_pretrained(tmp_path / "distinct")
    flags = f"{os.environ['XLA_FLAGS']} --xla_dump_to={tmp_path / 'dump'} --xla_dump_hlo_as_text"
    settings = [*small_run, f"target.path={tmp_path / 'distinct'}", "data.draft_vocab_size=96", "xla.device=xla"]
    settings.append("loss.ttt_length=1")
    prepare(load_recipe(None, settings))
    done = forks.run("train", "--max-steps", 1, *[f"--{s}" for s in settings], environment={"XLA_FLAGS": flags})
    assert done.returncode == 0, done.stderr
    (step,) = (tmp_path / "dump").glob("*_gradients_and_update_eager*cpu_after_optimizations.txt")
    text = step.read_text()
    assert text.splitlines()[0].count("may-alias") == 13 * 3 + 1  # weights with their moments, the count of steps
    assert re.findall(r"= f32\[(\d+,\d+)\]\S* copy\(%p\d", text) == []


@pytest.mark.slow
def test_28_layers_on_16_devices_equal_one(forks, small_run, small_target, tokenizer, tmp_path):
    """The depth of Qwen2.5-7B: the same losses, and no graph beyond the budget."""
    settings = Qwen2Config.from_pretrained(small_target).to_dict() | {"num_hidden_layers": 28, "layer_types": None}
    torch.manual_seed(0)
    deep = Qwen2ForCausalLM(Qwen2Config(**settings))
    # Its words, or none of the target's choices would be in the small draft vocabulary and every loss were 0.
    spoken = Qwen2ForCausalLM.from_pretrained(small_target).model.embed_tokens.weight
    deep.model.embed_tokens.weight.data.copy_(spoken)
    deep.save_pretrained(tmp_path / "deep")
    tokenizer.save_pretrained(tmp_path / "deep")
    settings = [*small_run, f"target.path={tmp_path / 'deep'}", "train.epochs=10", "loss.ttt_length=2"]
    prepare(load_recipe(None, settings))
    train(load_recipe(None, [*settings, "train.batch_size=4"]), max_steps=STEPS)
    sharded = [*settings, f"train.out={tmp_path / 'xla'}", "train.batch_size=1", "xla.device=xla"]
    sharded = [f"--{s}" for s in [*sharded, "xla.dp=4", "xla.tp=4"]]
    done = forks.run("train", "--max-steps", STEPS, *sharded)
    assert done.returncode == 0, done.stderr
    ours, golden = losses(tmp_path / "xla"), losses(tmp_path / "run")
    assert min(row["loss"] for row in golden) > 0.1
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in golden], rel=1e-4)
    assert len(ours) == STEPS and "compile budget: 2 graphs" in done.stderr and ours[-1]["compilations"] == 2


def test_a_mesh_that_does_not_fit_is_refused(forks, small_run):
    prepare(load_recipe(None, small_run))
    settings = [f"--{s}" for s in [*small_run, "xla.device=xla", "xla.dp=2", "xla.tp=2"]]
    done = forks.run("train", *settings, environment={"CPU_NUM_DEVICES": "3"})
    assert done.returncode == 2
    assert "xla.dp * xla.tp = 2 * 2 = 4, but there are 3 devices" in done.stderr
