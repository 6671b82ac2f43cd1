"""A run that is killed again and again, while it writes checkpoints too, ends with an unbroken run's weights."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eagle3_xla.config import load_recipe
from eagle3_xla.data.prepare import prepare

KILLS = 20

# Forks a run for each line on stdin (the folder it writes to), so that the runs needn't import everything anew.
RUNS = """
import os, signal, sys
from eagle3_xla.config import load_recipe
from eagle3_xla.train.loop import train
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
for line in sys.stdin:
    child = os.fork()
    if not child:
        try:
            train(load_recipe(None, [*sys.argv[1:], "train.out=" + line.strip()]))
        finally:
            sys.stderr.flush()
            os._exit(0)
    print(child, flush=True)
"""


def alive(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def wait_until(condition, process: int) -> None:
    while not condition():
        assert alive(process), "the run ended before it was killed"
        time.sleep(0.0005)


def wait_for_end(process: int) -> None:
    while alive(process):
        time.sleep(0.01)


def newest(folder: Path) -> str:
    return max((path.name for path in folder.glob("step-*")), default="")


def last_state(out: Path) -> tuple[str, bytes]:
    last = max((out / "checkpoints").glob("step-*"))
    return last.name, (last / "state.safetensors").read_bytes()


@pytest.mark.slow
def test_twenty_kills_change_nothing(small_run, tmp_path):
    settings = [*small_run, "train.epochs=10", "train.save_every=1", "train.keep=2", "train.heldout_rows=0"]
    prepare(load_recipe(None, settings))
    command = [sys.executable, "-c", RUNS, *settings]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(out: Path) -> int:
        print(out, file=server.stdin, flush=True)
        return int(server.stdout.readline())

    wait_for_end(start(tmp_path / "whole"))
    whole = last_state(tmp_path / "whole")
    draw = random.Random(0)
    folder, while_writing, reached = tmp_path / "killed" / "checkpoints", 0, set()
    for attempt in range(KILLS):
        run = start(tmp_path / "killed")
        wait_until(lambda: newest(folder) not in ("", *reached), run)  # it got further
        if attempt % 2:  # in the middle of writing a checkpoint
            wait_until(lambda: list(folder.glob(".partial-step-*")), run)
        time.sleep(draw.uniform(0, 0.002 if attempt % 2 else 0.04))
        os.kill(run, signal.SIGKILL)
        wait_for_end(run)
        while_writing += bool(list(folder.glob(".partial-*")))
        reached.add(newest(folder))
    assert whole[0] not in reached and len(reached) >= KILLS // 2 and while_writing >= 3, (reached, while_writing)
    wait_for_end(start(tmp_path / "killed"))
    server.stdin.close()
    server.wait()
    assert last_state(tmp_path / "killed") == whole


@pytest.mark.slow
def test_kills_through_xla_change_nothing(cli, small_run, tmp_path):
    settings = [f"--{s}" for s in [*small_run, "xla.device=xla", "train.epochs=4", "train.save_every=1"]]
    prepare(load_recipe(None, small_run))
    done = cli("train", *settings, f"--train.out={tmp_path / 'whole'}")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "killed"
    for kill_at in (2, 9):
        command = [sys.executable, "-m", "eagle3_xla", "train", *settings, f"--train.out={out}"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while newest(out / "checkpoints") < f"step-{kill_at:08d}":
            assert process.poll() is None, "the run ended before it was killed"
            time.sleep(0.002)
        process.kill()
        process.wait()
    done = cli("train", *settings, f"--train.out={out}")
    assert done.returncode == 0 and "continued after step" in done.stderr, done.stderr
    assert last_state(out) == last_state(tmp_path / "whole")
