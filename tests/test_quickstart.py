"""The quickstart as a user gets it, on the embedded target."""

import json

import pytest
from safetensors.torch import load_file

from eagle3_xla import quickstart as module
from eagle3_xla.config import UserError


@pytest.mark.slow
def test_quickstart(quickstart_run):
    done, out = quickstart_run
    assert done.returncode == 0, done.stderr[-3000:]
    for part in ("acceptance length tau", "same tokens as the target alone: yes", "Serve it", "launch_server"):
        assert part in done.stdout
    result = json.loads((out / "result.json").read_text())
    assert result["eval"]["identical"]
    assert result["training"]["tau"] > 1.05  # held-out rows; half a minute of training on 5,000 tokens
    assert load_file(out / "head" / "model.safetensors")["lm_head.weight"].shape == (8192, 576)
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert list((out / "run" / "tensorboard").rglob("events.out.tfevents.*"))
    rows = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    # The step and the held-out evaluation: nothing compiles after the first steps.
    assert {row["compilations"] for row in rows if "compilations" in row} == {2}


@pytest.mark.parametrize("minutes", [float("nan"), float("inf"), -1, 0, 0.000001, 1e9])
def test_minutes_that_are_none(minutes, tmp_path):
    with pytest.raises(UserError, match=r"--minutes \S+: a number from 0.1 to 100000 is expected"):
        module.quickstart(tmp_path / "out", minutes)
    assert not (tmp_path / "out").exists()


def test_minutes_become_tokens_then_epochs():
    assert module._budget(None) == []
    tokens, epochs = module._budget(2)
    assert 0 < int(tokens.removeprefix("data.max_tokens=")) < 100_000
    everything, more_epochs = module._budget(300)
    assert everything == "data.max_tokens=0"
    assert int(more_epochs.removeprefix("train.epochs=")) > int(epochs.removeprefix("train.epochs="))
