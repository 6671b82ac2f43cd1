"""The partitioned step itself, across two processes: their collectives are real, the devices are CPUs."""

import socket
from pathlib import Path

import pytest

from eagle3_xla.config import load_recipe
from eagle3_xla.data.prepare import prepare

SCRIPT = Path(__file__).with_name("partitioned.py").read_text()


def answers(forks, *arguments) -> list[list[float]]:
    """The numbers of each line that the script prints."""
    done = forks.run_code(SCRIPT, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return [[float(word) for word in line.split()] for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_two_processes_run_the_same_module_to_the_same_loss(forks, small_run, tmp_path):
    settings = [*small_run, "xla.device=xla", "xla.dp=2", "xla.tp=2", "train.batch_size=1", "loss.ttt_length=1"]
    prepare(load_recipe(None, settings))
    *_, [alone] = answers(forks, "lower", tmp_path, *settings)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    of_both = answers(forks, "run", tmp_path, port)
    assert len(of_both) == 2
    for loss, reductions in of_both:
        assert loss == pytest.approx(alone, rel=1e-5) and reductions > 0
