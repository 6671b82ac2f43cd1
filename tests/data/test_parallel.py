"""Chunks through processes: every one, in order."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eagle3_xla.data.parallel import batched, ordered_map
from eagle3_xla.errors import UserError


def make(add):
    return add.__add__


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 9])
def test_every_chunk_comes_back_in_order(workers, count):
    assert list(ordered_map(make, (100,), iter(range(count)), workers)) == list(range(100, 100 + count))


def test_batches_of_a_stream():
    assert list(batched(range(5), 2)) == [[0, 1], [2, 3], [4]] and not list(batched([], 2))


def make_refused():
    raise UserError("no target at 'nowhere'")


def test_a_process_that_cannot_begin_says_why():
    with pytest.raises(UserError, match="no target at 'nowhere'"):
        list(ordered_map(make_refused, (), range(3), 2))


def make_imported():
    at_first = {*sys.modules}
    return lambda name: name in at_first


def test_its_processes_begin_with_what_they_need_and_without_torch_xla():
    names = ["eagle3_xla.data.documents", "transformers.models.auto.tokenization_auto", "torch_xla"]
    assert list(ordered_map(make_imported, (), names, 2)) == [True, True, False]


def make_busy(folder):
    Path(folder, str(os.getpid())).touch()
    return time.sleep


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_its_processes_end_when_it_is_killed(how, tmp_path):
    code = "from tests.data.test_parallel import *; list(ordered_map(make_busy, sys.argv[1:], [600] * 9, 2))"
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=Path(__file__).parents[2])
    try:
        _wait_until(lambda: len([*tmp_path.iterdir()]) == 2)
    finally:
        process.send_signal(how)
        process.wait()
    _wait_until(lambda: not any(Path("/proc", worker.name).exists() for worker in tmp_path.iterdir()))


def _wait_until(is_so):
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)
