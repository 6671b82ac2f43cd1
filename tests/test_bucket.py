"""Every verb with everything in a bucket: data, target, run and head; the same bytes as on a disk."""

import asyncio
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save_file

from eagle3_xla import storage
from eagle3_xla.config import Recipe, load_recipe
from eagle3_xla.data.prepare import load_prepared, prepare
from eagle3_xla.doctor.run import doctor
from eagle3_xla.draft.saved import read_head
from eagle3_xla.errors import UserError
from eagle3_xla.evaluate.fingerprint import target_fingerprint
from eagle3_xla.export import export
from eagle3_xla.outputs import only_writer
from eagle3_xla.regenerate.run import Options, Sampling, regenerate
from eagle3_xla.target.model import load_target
from eagle3_xla.target.weights import StoredWeights
from eagle3_xla.train.loop import train


def test_prepare_train_and_export_in_a_bucket(gcs, small_run, small_target, chat_file, tmp_path):
    here = load_recipe(None, [*small_run, "train.epochs=1"])
    prepare(here)
    train(here, max_steps=2)
    export(tmp_path / "run", tmp_path / "head", "float32")

    url = f"{gcs.url}/everything"
    storage.upload_folder(small_target, f"{url}/target")
    storage.upload(chat_file, f"{url}/chats.jsonl")
    places = {"target.path": "target", "data.prepared": "data", "train.out": "run"}
    settings = [*small_run, "train.epochs=1", *(f"{name}={url}/{place}" for name, place in places.items())]
    settings += [f"data.{split}=[{url}/chats.jsonl]" for split in ("train", "heldout")]
    there = load_recipe(None, settings)
    manifest = prepare(there)
    requests = gcs.requests
    assert prepare(there) == manifest and gcs.requests - requests < 60  # it is there: nothing is made or fetched again
    train(there, max_steps=1)
    assert train(there, max_steps=1)["micro_steps"] == 2
    export(f"{url}/run", f"{url}/head", "float32")

    def content(folder, *names) -> bytes:
        return storage.read(storage.join(folder, *names))

    step = ("checkpoints", "step-00000002", "state.safetensors")
    assert content(f"{url}/run", *step) == content(tmp_path / "run", *step)
    assert content(f"{url}/head", "config.json") == content(tmp_path / "head", "config.json")
    # safetensors writes the entries of its metadata in any order.
    ours, theirs = (load(content(head, "model.safetensors")) for head in (tmp_path / "head", f"{url}/head"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    cached = storage.cached("files", "").parent.rglob("*")
    weights = (small_target / "model.safetensors").stat().st_size
    assert weights not in [file.stat().st_size for file in cached]  # the target's were read tensor by tensor
    assert read_head(f"{url}/head").tensors.keys() == read_head(tmp_path / "head").tensors.keys()

    def verdict(head, target) -> list[tuple]:
        return [(rule["rule"], rule["status"]) for rule in doctor(head, str(target))["rules"]]

    assert verdict(f"{url}/head", f"{url}/target") == verdict(tmp_path / "head", small_target)
    assert len(content(f"{url}/run", "metrics.jsonl").splitlines()) >= 3 and "run.yaml" in storage.entries(f"{url}/run")


@pytest.mark.parametrize("broken", ["heldout/dataset_info.json", "manifest.json"])
def test_an_upload_that_fails_costs_no_work(gcs, small_run, monkeypatch, broken):
    sleep = asyncio.sleep
    monkeypatch.setattr("gcsfs.retry.asyncio.sleep", lambda _: sleep(0))
    recipe = load_recipe(None, [*small_run, f"data.prepared={gcs.url}/broken-at-{broken.partition('.')[0]}"])
    monkeypatch.setattr(gcs, "break_uploads", broken)
    with pytest.raises(OSError, match=f"{broken}: the store failed"):
        prepare(recipe)
    monkeypatch.setattr(gcs, "break_uploads", "")
    monkeypatch.setattr("eagle3_xla.data.prepare.mix", pytest.fail)
    assert prepare(recipe) == load_prepared(recipe.data.prepared)[3] == prepare(recipe)
    assert ".work" not in storage.entries(recipe.data.prepared)


def test_regenerate_writes_to_a_bucket_and_goes_on_there(gcs, small_target, tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(3)))
    options = Options(target=str(small_target), chats=[str(questions)], sampling=Sampling(max_tokens=4))
    url = f"{gcs.url}/answers"

    def rows(folder) -> list[bytes]:
        return sorted(storage.read(storage.join(folder, "chats.jsonl")).splitlines())

    assert regenerate(Recipe(), url, replace(options, limit=2))["finished"] == 2
    begun = rows(url)
    with only_writer(url, "regenerate"), pytest.raises(UserError, match="another `regenerate` writes to gs:"):
        regenerate(Recipe(), url, options)
    assert regenerate(Recipe(), url, options)["finished"] == 3
    regenerate(Recipe(), tmp_path / "answers", options)
    assert rows(url) == rows(tmp_path / "answers") and len(begun) == 2 and {*begun} < {*rows(url)}


def test_weights_at_a_url_are_read_tensor_by_tensor(gcs, small_target):
    storage.upload_folder(small_target, f"{gcs.url}/weights")
    here, there = (StoredWeights(str(path), torch.float32) for path in (small_target, f"{gcs.url}/weights"))
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.norm.weight"):
        assert torch.equal(here.read(name), there.read(name))
    with pytest.raises(UserError, match="is missing"):
        there.read("nothing")


def test_doctor_copies_no_weights_of_a_target(gcs, small_target, exported_head, tmp_path, monkeypatch):
    """Of a head that brings the target's embeddings, these alone are read there. Other programs' weights never are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url, head = f"{gcs.url}/doctor", shutil.copytree(exported_head, tmp_path / "head")
    storage.upload_folder(small_target, url)
    others = {"consolidated.00.pth", "pytorch_model.bin"}
    for other in ("original/consolidated.00.pth", "pytorch_model.bin"):
        storage.write(f"{url}/{other}", "large")
    own = load((head / "model.safetensors").read_bytes())
    of_target = load((small_target / "model.safetensors").read_bytes())["model.embed_tokens.weight"]
    save_file(own | {"embed_tokens.weight": of_target}, head / "model.safetensors")
    rules = {rule["rule"]: rule["message"] for rule in doctor(head, url)["rules"]}
    assert rules["embedding"] == "embed_tokens is the target's"

    def copied() -> set[str]:
        return {file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()}

    assert "tokenizer_config.json" in copied() and not copied() & {"model.safetensors", *others}
    load_target(url, torch.float32)
    assert target_fingerprint(url) == target_fingerprint(str(small_target)) is not None
    assert "model.safetensors" in copied() and not copied() & others


@pytest.mark.parametrize(
    "change, kind, said",
    [
        ("data.train=[BUCKET/no-chats.jsonl]", UserError, "no-chats.jsonl: no such file, folder or bucket"),
        ("data.train=[gs://forbidden/chats.jsonl]", PermissionError, "access is denied"),
        ("target.path=BUCKET/no-target", UserError, "no target at"),
        ("data.prepared=gs://forbidden/data", PermissionError, "access is denied"),
    ],
)
def test_what_is_missing_or_forbidden_is_one_line(gcs, small_run, change, kind, said):
    with pytest.raises(kind) as failure:
        prepare(load_recipe(None, [*small_run, change.replace("BUCKET", gcs.url)]))
    assert said in str(failure.value) and "\n" not in str(failure.value)
