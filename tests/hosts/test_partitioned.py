"""The partitioned step itself, across two processes: their collectives are real, the devices are CPUs."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from eagle3_xla.config import load_recipe
from eagle3_xla.data.prepare import prepare

SCRIPT = Path(__file__).with_name("partitioned.py")


def start(*arguments) -> subprocess.Popen:
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen) -> list[float]:
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors[-3000:]
    return [float(word) for word in output.splitlines()[-1].split()]


@pytest.mark.slow
def test_two_processes_run_the_same_module_to_the_same_loss(small_run, tmp_path):
    settings = [*small_run, "xla.device=xla", "xla.dp=2", "xla.tp=2", "train.batch_size=1"]
    prepare(load_recipe(None, settings))
    [alone] = answer(start("lower", tmp_path, *settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for process in [start("run", tmp_path, rank, port) for rank in range(2)]:
        loss, reductions = answer(process)
        assert loss == pytest.approx(alone, rel=1e-5) and reductions > 0
