"""A target that is a hub id, as most users name theirs: from its data to a head, an answer and a card."""

import json
import shutil
from pathlib import Path

import pytest

from eagle3_xla.cli import main
from eagle3_xla.data.files import read_rows

HUB_ID, REVISION = "someone/small-model", "0" * 40


@pytest.fixture
def hub_id(small_target, tmp_path, monkeypatch) -> str:
    """small_target as the hub's library keeps it once it has been downloaded; there is no network."""
    cache = tmp_path / "hub"
    fetched = cache / f"models--{HUB_ID.replace('/', '--')}"
    shutil.copytree(small_target, fetched / "snapshots" / REVISION)
    (fetched / "refs").mkdir()
    (fetched / "refs" / "main").write_text(REVISION)
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return HUB_ID


def test_from_data_to_a_card(hub_id, small_run, chat_file, tmp_path, capsys):
    def run(*arguments) -> str:
        assert main([*map(str, arguments)]) == 0, arguments
        return capsys.readouterr().out

    settings = [f"--{setting}" for setting in small_run if not setting.startswith("target.path=")]
    settings.append(f"--target.path={hub_id}")
    head, answers = tmp_path / "head", tmp_path / "answers"
    run("prepare", *settings)
    run("train", *settings, "--max-steps=2")
    run("export", "--checkpoint", tmp_path / "run", "--out", head)
    assert json.loads(run("doctor", head, "--target", hub_id, "--json"))["ok"]
    options = ["--prompts", chat_file, "--limit", 2, "--max-new-tokens", 4]
    figures = json.loads(run("eval", "--target", hub_id, "--draft", head, *options, "--json"))
    assert figures["identical"] and figures["measured"]["target"]
    places = [f"--data.train=[{chat_file}]", "--data.heldout=[]", "--data.max_tokens=300"]
    run("regenerate", "--target", hub_id, "--out", answers, "--max-tokens", 4, *places)
    assert len(list(read_rows(answers / "chats.jsonl")))
    (tmp_path / "eval.json").write_text(json.dumps(figures))
    run("push", head, "--repo", "someone/head", "--target", hub_id, "--results", tmp_path / "eval.json", "--dry-run")
    card = Path(head / "README.md").read_text()
    assert f"base_model: {hub_id}" in card
