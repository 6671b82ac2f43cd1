"""A target that is a hub id, as most users name theirs: from its data to a head, an answer and a card."""

import json
import shutil
from pathlib import Path

import pytest
import requests
import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors.torch import save_file

from eagle3_xla import hub
from eagle3_xla.cli import main
from eagle3_xla.data.files import read_rows
from eagle3_xla.data.tokenizer import load_tokenizer, stop_token_ids
from eagle3_xla.doctor.files import read_target
from eagle3_xla.errors import UserError
from eagle3_xla.evaluate.fingerprint import target_fingerprint
from eagle3_xla.evaluate.run import load_pair
from eagle3_xla.target.model import load_target
from eagle3_xla.target.weights import StoredWeights

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
    hub.snapshot.cache_clear()
    return HUB_ID


def test_from_data_to_a_card(hub_id, small_run, chat_file, tmp_path, capsys, monkeypatch):
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
    weights = next((tmp_path / "hub").rglob("model.safetensors"))
    elsewhere = weights.rename(tmp_path / "not fetched yet")

    def fetch_and_load(*arguments):
        elsewhere.rename(weights)
        return load_pair(*arguments)

    monkeypatch.setattr("eagle3_xla.evaluate.run.load_pair", fetch_and_load)
    figures = json.loads(run("eval", "--target", hub_id, "--draft", head, *options, "--json"))
    assert figures["identical"] and figures["measured"]["target"]
    places = [f"--data.train=[{chat_file}]", "--data.heldout=[]", "--data.max_tokens=300"]
    run("regenerate", "--target", hub_id, "--out", answers, "--max-tokens", 4, *places)
    assert len(list(read_rows(answers / "chats.jsonl")))
    (tmp_path / "eval.json").write_text(json.dumps(figures))
    run("push", head, "--repo", "someone/head", "--target", hub_id, "--results", tmp_path / "eval.json", "--dry-run")
    card = Path(head / "README.md").read_text()
    assert f"base_model: {hub_id}" in card


def answer(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    response = requests.Response()
    response.status_code = status
    return kind(f"{status} Client Error.\nmore", response=response)


def failing(error: Exception):
    def fail(*arguments, **options):
        raise error

    return fail


def test_the_hub_is_asked_for_no_file_twice(hub_id, monkeypatch):
    """transformers asks it again for a tokenizer, and of a large one for the model's tags."""
    asked = []
    for module in ("huggingface_hub", "transformers.tokenization_utils_base"):
        name = "model_info" if module == "huggingface_hub" else "list_repo_files"
        monkeypatch.setattr(f"{module}.{name}", lambda *arguments, name=name, **options: asked.append(name))
    monkeypatch.setattr("transformers.tokenization_utils_base.is_offline_mode", lambda: False)
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.vocab_size", 150_000)
    tokenizer = load_tokenizer(hub_id)
    monkeypatch.setattr("huggingface_hub.snapshot_download", failing(AssertionError("asked again")))
    assert stop_token_ids(hub_id, tokenizer) and not asked
    target = read_target(hub_id)
    assert target.name == hub_id and (target.folder / "tokenizer_config.json").is_file()


def unreachable() -> LocalEntryNotFoundError:
    error = LocalEntryNotFoundError("An error happened")
    error.__cause__ = ConnectionError("no route to host")
    return error


@pytest.mark.parametrize(
    "error, said",
    [
        (answer(GatedRepoError, 403), f"accept its terms at https://huggingface.co/{HUB_ID}, then `hf auth login`"),
        (answer(RepositoryNotFoundError, 401), "none on the hub that this machine may read"),
        (unreachable(), "no route to host"),
        (requests.exceptions.ProxyError("refused\nby the proxy"), r"\(refused\); start it again"),
    ],
)
def test_what_the_hub_refuses_is_one_line(error, said, hub_id, tmp_path, monkeypatch):
    """Where the target isn't here already."""
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *arguments, **options: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", failing(error))
    cache = tmp_path / "hub"
    elsewhere = cache.rename(tmp_path / "not fetched yet")
    for load in (load_tokenizer, lambda path: stop_token_ids(path, None)):
        with pytest.raises(UserError, match=f"^no target at '{HUB_ID}': .*{said}.*$"):
            load(hub_id)
    elsewhere.rename(cache)
    assert stop_token_ids(hub_id, load_tokenizer(hub_id))


@pytest.mark.parametrize(
    "error, said",
    [
        (answer(EntryNotFoundError, 404), "has neither model.safetensors nor"),
        (unreachable(), r"model.safetensors: .*\(no route to host\); start it again to go on"),
        (RuntimeError("Data processing error: CAS\nmore"), r"\(Data processing error: CAS\); start it again to go on"),
    ],
)
def test_weights_that_do_not_come(error, said, hub_id, small_target, tmp_path, monkeypatch):
    weights = StoredWeights(hub_id, torch.float32)
    assert weights.sample("model.norm.weight") == StoredWeights(str(small_target), torch.float32).sample(
        "model.norm.weight"
    )
    next((tmp_path / "hub").rglob("model.safetensors")).unlink()
    monkeypatch.setattr("huggingface_hub.hf_hub_download", failing(error))
    for load in (StoredWeights, load_target):
        with pytest.raises(UserError, match=said):
            load(hub_id, torch.float32)


def test_its_fingerprint_is_of_the_files_that_are_loaded(hub_id, small_target, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "not transformers' own"))
    expected = target_fingerprint(str(small_target))
    assert expected and target_fingerprint(hub_id) == expected
    weights = next((tmp_path / "hub").rglob("model.safetensors"))
    save_file({"norm.weight": torch.ones(4)}, weights.with_name("consolidated.safetensors"))
    assert target_fingerprint(hub_id) == expected
    stale = weights.with_name("model.safetensors.index.json")
    stale.write_text(json.dumps({"weight_map": {"norm.weight": "gone.safetensors"}}))
    assert target_fingerprint(hub_id) is None
    index = {"model.norm.weight": "model-1.safetensors", "lm_head.weight": "model-2.safetensors"}
    stale.write_text(json.dumps({"weight_map": index}))
    weights.rename(weights.with_name("model-1.safetensors"))
    assert target_fingerprint(hub_id) is None
    assert target_fingerprint("someone/nothing") is None
