"""A run that is killed again and again, while it writes checkpoints too, ends with an unbroken run's weights.

With 20 kills and more: TIMES=2 bash launch/test.sh tests/train/test_kills.py
"""

import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
from forks import same_bits

from eagle3_xla import storage
from eagle3_xla.config import load_recipe
from eagle3_xla.data.prepare import prepare
from eagle3_xla.storage import Location

TIMES = int(os.environ.get("TIMES", 1))
KILLS = {"folder": 6 * TIMES, "bucket": 4 * TIMES}  # on a bucket each one waits for hundreds of requests

RUN = """
import sys
from eagle3_xla.config import load_recipe
from eagle3_xla.train.loop import train
train(load_recipe(None, sys.argv[1:]))
"""

# A run that is killed soon after its fifth checkpoint.
KILLED = """
import os, runpy, signal, sys, threading, time
from pathlib import Path
folder = Path(sys.argv[-1].removeprefix("--train.out=")) / "checkpoints"
def kill():
    while not (folder / "step-00000005").exists():
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=kill, daemon=True).start()
sys.argv.insert(1, "train")
runpy.run_module("eagle3_xla", run_name="__main__", alter_sys=True)
"""

# An unbroken run, then the rest of one that was killed, which finds the step compiled.
WHOLE_AND_REST = """
import sys
from eagle3_xla.config import load_recipe
from eagle3_xla.train.loop import train
whole, killed, *settings = sys.argv[1:]
for out in (whole, killed):
    train(load_recipe(None, [*settings, "train.out=" + out]))
"""


def alive(process: int) -> bool:
    """Also while a thread of one that was killed has not ended: it may be writing."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    state, threads = fields[0], int(fields[17])
    return state != "Z" or threads > 1


def wait_until(condition, process: int, pause: float) -> None:
    while not condition():
        assert alive(process), "the run ended before it was killed"
        time.sleep(pause)


def wait_for_end(process: int) -> None:
    while alive(process):
        time.sleep(0.01)


def newest(folder: Location) -> str:
    return max(storage.whole_folders(folder, "SHA256SUMS", "step-"), default="")


def unfinished(folder: Location) -> set[str]:
    """What is being written or removed."""
    return set(storage.entries(folder)) - set(storage.whole_folders(folder, "SHA256SUMS", "step-"))


def last_state(out: Location) -> tuple[str, bytes]:
    folder = storage.join(out, "checkpoints")
    return newest(folder), storage.read(storage.join(folder, newest(folder), "state.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["folder", "bucket"])
def test_many_kills_change_nothing(forks, small_run, tmp_path, request, where):
    gcs = request.getfixturevalue("gcs") if where == "bucket" else None
    place = f"{gcs.url}/kills" if gcs else tmp_path
    epochs = TIMES * (3 if where == "folder" else 2)  # steps go faster than saves here, and slower there
    settings = [*small_run, f"train.epochs={epochs}", "train.save_every=1", "train.keep=2", "train.heldout_rows=0"]
    settings.append("loss.ttt_length=1")
    prepare(load_recipe(None, settings))

    def start(out: Location) -> int:
        return forks.start(RUN, *settings, f"train.out={out}")

    wait_for_end(start(tmp_path / "whole"))
    whole = last_state(tmp_path / "whole")
    draw = random.Random(0)
    killed = storage.join(place, "killed")
    folder, while_writing, reached = storage.join(killed, "checkpoints"), 0, set()
    for attempt in range(KILLS[where]):
        run = start(killed)
        wait_until(lambda: newest(folder) not in ("", *reached), run, 0.05 if gcs else 0.005)  # it got further
        gone = threading.Event()
        if attempt % 2 and gcs:  # in the middle of writing a checkpoint: the upload ends with the run
            gcs.hold, gcs.break_uploads = gone, draw.choice(["state.safetensors", "SHA256SUMS"])
            wait_until(gcs.held.is_set, run, 0.005)
        elif attempt % 2:
            wait_until(lambda: unfinished(folder), run, 0.0005)
        time.sleep(draw.uniform(0, 0.0005 if attempt % 2 else 0.04))
        os.kill(run, signal.SIGKILL)
        wait_for_end(run)
        gone.set()
        if gcs:
            gcs.hold, gcs.break_uploads = None, ""
            gcs.held.clear()
        while_writing += bool(unfinished(folder))
        reached.add(newest(folder))
    assert whole[0] not in reached and len(reached) >= KILLS[where] // 2, reached
    assert while_writing >= KILLS[where] // (2 if gcs else 4)
    wait_for_end(start(killed))
    assert last_state(killed) == whole
    steps = [json.loads(line)["step"] for line in storage.read(storage.join(killed, "metrics.jsonl")).splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == int(whole[0].removeprefix("step-"))


@pytest.mark.slow
def test_a_kill_through_xla_changes_nothing(forks, small_run, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", same_bits()["XLA_FLAGS"])
    settings = [*small_run, "xla.device=xla", "loss.ttt_length=1", "train.epochs=1", "train.save_every=1"]
    settings.append("train.heldout_rows=0")
    prepare(load_recipe(None, small_run))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = forks.run_code(KILLED, *[f"--{setting}" for setting in settings], f"--train.out={killed}")
    assert done.returncode == -signal.SIGKILL, done.stderr
    reached = newest(killed / "checkpoints")
    done = forks.run_code(WHOLE_AND_REST, whole, killed, *settings)
    assert done.returncode == 0 and "continued after step" in done.stderr, done.stderr
    assert "step-00000005" <= reached < newest(whole / "checkpoints")
    assert last_state(killed) == last_state(whole)
