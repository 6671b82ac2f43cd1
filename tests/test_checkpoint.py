"""What a kill, a damaged file or a full disk leaves behind: always a checkpoint that can be used, and a clear word."""

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import resource
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from eagle3_xla import checkpoint as checkpoints
from eagle3_xla import storage
from eagle3_xla.config import load_recipe
from eagle3_xla.data.prepare import prepare
from eagle3_xla.errors import UserError
from eagle3_xla.train.loop import train
from eagle3_xla.train.reporting import Reporter
from eagle3_xla.train.saving import Saver
from eagle3_xla.xla.backend import make_backend


def at(step: int, tau: float | None = None) -> checkpoints.Checkpoint:
    """A small checkpoint whose tensors say its step."""
    tensor = torch.full((64,), float(step))
    return checkpoints.Checkpoint(
        micro_step=step,
        head={"fc.weight": tensor},
        optimizer={"first.fc.weight": -tensor, "step_count": torch.tensor(float(step))},
        d2t=torch.arange(4),
        t2d=torch.ones(4, dtype=torch.bool),
        recipe={"train": {"lr": 1e-3}},
        data_key="key",
        draft_config={"hidden_size": 64},
        tau=tau,
    )


def steps(folder) -> list[int]:
    names = storage.entries(folder)
    assert all(name.startswith("step-") for name in names), names
    return [int(name[5:]) for name in names]


@contextlib.contextmanager
def file_size_limit(size: int):
    """No file of this process may grow past `size` bytes: a write beyond fails, as on a full disk, for any user."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_everything_comes_back(tmp_path):
    path = checkpoints.save(tmp_path, at(3, tau=1.25), keep=1)
    back = checkpoints.load(path)
    assert (back.micro_step, back.tau, back.recipe, back.data_key) == (3, 1.25, {"train": {"lr": 1e-3}}, "key")
    assert torch.equal(back.head["fc.weight"], at(3).head["fc.weight"])
    assert back.optimizer.keys() == at(3).optimizer.keys()
    assert back.d2t.tolist() == [0, 1, 2, 3] and back.t2d.dtype == torch.bool
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=path, check=True)


def test_what_a_continued_run_may_change():
    """What changes no weight: paths (data_key knows what lies there), workers, logging, saving, what `plan` takes."""
    begun = at(3)
    begun.recipe = dataclasses.asdict(load_recipe(None, []))
    free = "target.path=a data.prepared=b data.workers=2 train.out=c train.log_every=1 train.save_every=7 train.keep=5"
    free += " train.tracker=none plan.topology=v5e-16 plan.tokens=9 plan.price_per_chip_hour=1 plan.layers=4"
    checkpoints.refuse_changed_run(begun, load_recipe(None, [*free.split(), "plan.xla_flags=--xla_a=1"]), "key")
    for changed in (
        "data.seed: 0 -> 1",
        "xla.remat: False -> True",
        "train.eval_every: 0 -> 5",
        "train.lr: 0.0008 -> 0.1",
    ):
        name, _, _, now = changed.replace(":", "").split()
        with pytest.raises(UserError, match=f"changed: {changed}. Give the old settings back"):
            checkpoints.refuse_changed_run(begun, load_recipe(None, [f"{name}={now}"]), "key")

    del begun.recipe["train"]["optimizer"]  # a run that is older than the setting
    checkpoints.refuse_changed_run(begun, load_recipe(None, []), "key")
    with pytest.raises(UserError, match="changed: train.optimizer: 'adamw' -> 'muon'"):
        checkpoints.refuse_changed_run(begun, load_recipe(None, ["train.optimizer=muon"]), "key")


@pytest.fixture
def bucket(gcs) -> str:
    """A folder's URL in the emulated bucket."""
    return f"{gcs.url}/{random.randrange(10**9)}/checkpoints"


@pytest.mark.parametrize("place", ["tmp_path", "bucket"])
def test_the_last_and_the_best_are_kept(request, place):
    folder = request.getfixturevalue(place)
    for step, tau in enumerate([None, 1.2, 1.5, None, 1.4, float("nan"), 1.3]):
        checkpoints.save(folder, at(step, tau), keep=2)
    assert steps(folder) == [2, 5, 6]
    assert checkpoints.load_best(folder, warn=pytest.fail).micro_step == 2
    latest = checkpoints.load_latest(folder, warn=pytest.fail)
    assert latest.micro_step == 6 and torch.equal(latest.head["fc.weight"], at(6).head["fc.weight"])
    checkpoints.save(folder, at(7, 1.6), keep=2)
    assert steps(folder) == [6, 7]


def test_without_tau_the_best_is_the_newest(tmp_path):
    for step in range(3):
        checkpoints.save(tmp_path, at(step), keep=2)
    assert checkpoints.load_best(tmp_path, warn=pytest.fail).micro_step == 2


def flip(file: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def cut(file: Path, draw: random.Random) -> None:
    os.truncate(file, draw.randrange(file.stat().st_size - 1))


@pytest.mark.parametrize("damage", [flip, cut, lambda file, draw: file.unlink()], ids=["flipped", "cut", "missing"])
@pytest.mark.parametrize("name", ["state.safetensors", "meta.json", "SHA256SUMS"])
def test_a_damaged_file_is_noticed_and_the_checkpoint_before_is_used(tmp_path, name, damage):
    draw = random.Random(name)
    checkpoints.save(tmp_path, at(1), keep=2)
    for _ in range(20):
        newest = checkpoints.save(tmp_path, at(2, tau=9.0), keep=2)
        damage(newest / name, draw)
        with pytest.raises(UserError, match="damaged|not a checkpoint"):
            checkpoints.load(newest)
        for load in (checkpoints.load_latest, checkpoints.load_best):
            said = []
            assert load(tmp_path, said.append).micro_step == 1
            assert len(said) == 1 and str(newest) in said[0]


def test_damaged_checkpoints_do_not_push_out_whole_ones(tmp_path):
    """A run that starts over because its only checkpoints are damaged must keep the new ones, whose steps are lower."""
    for step in (10, 20):
        (checkpoints.save(tmp_path, at(step), keep=2) / "meta.json").write_text("{}")
    assert checkpoints.load_latest(tmp_path, lambda _: None) is None
    checkpoints.save(tmp_path, at(5), keep=2)
    assert steps(tmp_path) == [5]


def test_what_a_kill_left_goes_with_the_next_save(tmp_path):
    for name in (".partial-step-00000007", ".partial-old-step-00000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.safetensors").write_bytes(b"half")
    assert checkpoints.load_latest(tmp_path, pytest.fail) is None
    checkpoints.save(tmp_path, at(8), keep=1)
    assert steps(tmp_path) == [8]


def test_a_failed_write_leaves_the_last_checkpoint_and_says_so(tmp_path):
    folder = tmp_path / "checkpoints"
    with file_size_limit(100), pytest.raises(checkpoints.SaveFailed, match="no earlier checkpoint is there"):
        checkpoints.save(folder, at(1), keep=1)
    checkpoints.save(folder, at(1), keep=1)
    with file_size_limit(100), pytest.raises(checkpoints.SaveFailed) as failure:
        checkpoints.save(folder, at(2), keep=1)
    message = str(failure.value)
    assert "step-00000002 could not be written (File too large): it takes" in message
    assert f"{folder}/step-00000001 is whole" in message and "bytes" in message and "\n" not in message
    assert steps(folder) == [1]
    assert checkpoints.load_latest(folder, pytest.fail).micro_step == 1


def test_in_a_bucket_a_checkpoint_is_whole_with_its_last_object(bucket):
    checkpoints.save(bucket, at(1), keep=2)
    newest = checkpoints.save(bucket, at(2), keep=2)
    content = bytearray(storage.read(f"{newest}/state.safetensors"))
    content[-1] ^= 1
    storage.write(f"{newest}/state.safetensors", bytes(content))
    said = []
    assert checkpoints.load_latest(bucket, said.append).micro_step == 1
    assert len(said) == 1 and "the checksum of state.safetensors does not hold" in said[0]
    storage.remove(f"{newest}/SHA256SUMS")  # the rest is what a kill leaves
    assert checkpoints.load_latest(bucket, pytest.fail).micro_step == 1
    assert steps(bucket) == [1, 2]
    checkpoints.save(bucket, at(3), keep=2)
    assert steps(bucket) == [1, 3]


def test_a_bucket_that_fails_leaves_the_last_checkpoint_and_says_so(gcs, bucket, monkeypatch):
    sleep = asyncio.sleep
    monkeypatch.setattr("gcsfs.retry.asyncio.sleep", lambda _: sleep(0))  # between its tries
    checkpoints.save(bucket, at(1), keep=1)
    for broken in ("state.safetensors", "SHA256SUMS"):
        gcs.break_uploads = broken
        try:
            with pytest.raises(checkpoints.SaveFailed) as failure:
                checkpoints.save(bucket, at(2), keep=1)
        finally:
            gcs.break_uploads = ""
        message = str(failure.value)
        assert f"step-00000002 could not be written ({bucket}/step-00000002/{broken}: the store failed" in message
        assert f"{bucket}/step-00000001 is whole; mend that and start again" in message and "\n" not in message
        assert checkpoints.load_latest(bucket, pytest.fail).micro_step == 1
    with pytest.raises(checkpoints.SaveFailed, match="access is denied.*the folder can't be read"):
        checkpoints.save("gs://forbidden/run", at(1), keep=1)
    checkpoints.save(bucket, at(2), keep=1)
    assert steps(bucket) == [2]


def test_a_save_to_a_bucket_that_fails_for_a_while_is_tried_again(gcs, bucket, monkeypatch):
    sleep = asyncio.sleep
    monkeypatch.setattr("gcsfs.retry.asyncio.sleep", lambda _: sleep(0))
    monkeypatch.setattr("eagle3_xla.train.saving.PAUSES", (0.01,) * 4)
    said = []

    def mended(message: str) -> None:
        said.append(message)
        gcs.break_uploads = ""

    gcs.break_uploads = "state.safetensors"
    with Saver(1, mended) as saver:
        saver.save(bucket, at(1))
        saver.save(bucket, at(2))  # once the one before is written
    assert len(said) == 1 and "step-00000001/state.safetensors: the store failed" in said[0]
    assert checkpoints.load_latest(bucket, pytest.fail).micro_step == 2 and steps(bucket) == [2]

    monkeypatch.setattr("eagle3_xla.train.saving.PAUSES", (600,))  # but the end of a run waits for no bucket
    gcs.break_uploads, said = "state.safetensors", []
    try:
        with pytest.raises(checkpoints.SaveFailed, match="step-00000002 is whole"), Saver(1, said.append) as saver:
            saver.save(bucket, at(3))
        stopping = []  # nor does a run that is told to stop while it waits to save
        with pytest.raises(checkpoints.SaveFailed), Saver(1, said.append, stopping=stopping) as saver:
            saver.save(bucket, at(3))
            threading.Timer(0.2, stopping.append, ["SIGTERM"]).start()
            saver.save(bucket, at(4))
    finally:
        gcs.break_uploads = ""
    assert len(said) == 2 and checkpoints.load_latest(bucket, pytest.fail).micro_step == 2
    with pytest.raises(checkpoints.SaveFailed, match="access is denied"), Saver(1, pytest.fail) as saver:
        saver.save("gs://forbidden/run", at(1))


def test_a_bucket_that_removes_nothing_ends_no_run(gcs, bucket, monkeypatch):
    monkeypatch.setattr(gcs, "keeps", True)
    said = []
    with Saver(1, said.append) as saver:
        saver.save(bucket, at(1))
        saver.save(bucket, at(2))
    assert len(said) == 1 and "an old checkpoint stays" in said[0] and "access is denied" in said[0]
    assert steps(bucket) == [1, 2]


def weights(recipe) -> dict:
    saved = checkpoints.load_latest(Path(recipe.train.out) / "checkpoints", pytest.fail)
    return {**saved.head, **saved.optimizer}


# The run's second checkpoint meets a full disk: for any user by a file size limit, for real on a tmpfs of its own.
@pytest.mark.parametrize("disk", ["file size limit", "full tmpfs"])
def test_a_run_on_a_full_disk_exits_1_and_goes_on_later(small_run, tmp_path, disk, forks):
    settings = [*small_run, "train.keep=1", "train.save_every=1", "train.epochs=1", "train.batch_size=4"]
    settings.append("loss.ttt_length=1")
    full = load_recipe(None, [*settings, f"train.out={tmp_path / 'full'}"])
    prepare(full)
    train(full, max_steps=1)
    size = sum(file.stat().st_size for file in (tmp_path / "full" / "checkpoints").rglob("*") if file.is_file())
    arguments = ["train", *(f"--{s}" for s in settings), f"--train.out={tmp_path / 'full'}"]
    if disk == "file size limit":
        limited = f"import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2}))\n"
        limited += "runpy.run_module('eagle3_xla', run_name='__main__', alter_sys=True)"
        done = forks.run_code(limited, *arguments)
        reason = "File too large"
    else:
        if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
            pytest.skip("this system lets nobody but root mount a file system, not even in a namespace")
        # It holds the untrained head, one checkpoint and half of another.
        out, kept = shlex.quote(str(tmp_path / "full")), shlex.quote(str(tmp_path / "kept"))
        script = f"""
            mv {out} {kept} && mkdir {out} && mount -t tmpfs -o size={int(2.5 * size)} tmpfs {out}
            cp -r {kept}/. {out}
            {shlex.join([sys.executable, "-m", "eagle3_xla", *arguments])}; status=$?
            rm -r {kept} && cp -r {out} {kept} && umount {out} && rmdir {out} && mv {kept} {out}
            exit $status"""
        done = subprocess.run(["unshare", "-rm", "bash", "-c", script], capture_output=True, text=True)
        reason = "No space left on device"
    assert done.returncode == 1, done.stderr
    said = [line for line in done.stderr.splitlines() if "eagle3-xla train: " in line]
    assert len(said) == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"step-00000002 could not be written ({reason}): it takes" in said[0]
    assert "step-00000001 is whole" in said[0] and "start again to continue" in said[0]
    assert steps(tmp_path / "full" / "checkpoints") == [1]

    train(full)
    whole = load_recipe(None, [*settings, f"train.out={tmp_path / 'whole'}"])
    train(whole)
    assert all(torch.equal(value, weights(full)[name]) for name, value in weights(whole).items())
    rows = [json.loads(line) for line in (tmp_path / "full" / "metrics.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows if "loss" in row} == set(range(1, 9))
    shutil.rmtree(tmp_path / "full")


def test_a_log_that_is_not_uploaded_costs_no_checkpoint_and_hides_no_failure(gcs, small_run, tmp_path, capsys):
    recipe = load_recipe(None, [*small_run, f"train.out={gcs.url}/unlogged"])

    def reporter() -> Reporter:
        made = Reporter(recipe.train, 4, 0, dataclasses.asdict(recipe), make_backend(recipe.xla))
        made.local.location = "gs://forbidden/unlogged"
        made.log_heldout(1, {"tau": 1.5, "acceptance": [0.5], "sources": {}})
        return made

    with pytest.raises(UserError, match="what the user is to know"), reporter() as first:
        with Saver(1, first.say, first.upload) as saver:
            saver.save(tmp_path / "run", at(1))
        raise UserError("what the user is to know")
    assert steps(tmp_path / "run") == [1]
    assert capsys.readouterr().err.count("the log was not uploaded (gs://forbidden/unlogged/metrics.jsonl: access") == 2
    with pytest.raises(PermissionError, match="access is denied"), reporter():
        pass  # a log that is lost at the end of all is a failure of its own


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of tensorboard's thread
def test_a_tracker_on_a_full_disk_hides_no_failure(small_run, capsys):
    recipe = load_recipe(None, [*small_run, "train.tracker=tensorboard"])
    reporter = Reporter(recipe.train, 4, 0, dataclasses.asdict(recipe), make_backend(recipe.xla))
    with pytest.raises(checkpoints.SaveFailed, match="a whole one remains"), file_size_limit(16):
        with reporter:
            reporter.log_heldout(1, {"tau": 1.5, "acceptance": [0.5], "sources": {}})
            raise checkpoints.SaveFailed("a whole one remains")
    assert capsys.readouterr().err.count("is not logged") == 1
