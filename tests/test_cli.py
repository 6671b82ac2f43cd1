"""Bad input: one line on stderr, exit code 2, no traceback."""

import json

import pytest


def refused(done, *parts):
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("eagle3-xla ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["train", "--trian.lr=1"], "unknown setting trian; the nearest known one is train"),
        (["train", "--config", "nonsense"], "no recipe 'nonsense'"),
        (["train", "--oops"], "unknown argument --oops"),
        (["train"], "train.out is empty"),
        (["prepare", "--target.path=/nowhere/at/all"], "no target at '/nowhere/at/all'"),
        (["eval", "--target", "x", "--draft", "/nowhere", "--prompts", "p"], "no head at /nowhere"),
        (["export", "--checkpoint", "/nowhere", "--out", "o"], "/nowhere is not a checkpoint"),
        (["quickstart", "--minutes", "-1"], "--minutes -1: a number above 0 is expected"),
    ],
)
def test_refused(cli, arguments, part, tmp_path):
    refused(cli(*arguments), part)


def test_refused_data_and_folders(cli, small_run, small_target, tmp_path, chat_file):
    settings = [f"--{setting}" for setting in small_run]
    refused(cli("prepare", *settings, f"--data.train=[{tmp_path / 'none.jsonl'}]"), "none.jsonl: no such file")
    lines = chat_file.read_text().splitlines()
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join([*lines[:3], "{not json", *lines[3:]]) + "\n")
    refused(cli("prepare", *settings, f"--data.train=[{broken}]"), "broken.jsonl:4: not valid JSON")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letter.txt").write_text("mine")
    assert cli("prepare", *settings).returncode == 0
    refused(cli("train", *settings), "not ours")


def test_a_target_with_few_layers_is_refused(cli, small_run, small_target, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(small_target)
    model.model.layers = model.model.layers[:6]
    model.config.num_hidden_layers = 6
    model.config.layer_types = model.config.layer_types[:6]
    folder = tmp_path / "shallow"
    model.save_pretrained(folder)
    settings = [f"--{setting}" for setting in small_run]
    assert cli("prepare", *settings).returncode == 0
    refused(cli("train", *settings, f"--target.path={folder}"), "6 decoder layers", "at least 8")


def test_json_is_one_object(cli, small_run):
    done = cli("prepare", "--json", *[f"--{setting}" for setting in small_run])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["train"]["chats"] == 32
