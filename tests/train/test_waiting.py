"""What the steps don't wait for: batches come ahead of them, checkpoints are written behind them, nothing is lost."""

import threading
import time
from functools import partial

import numpy as np
import pytest
import torch

from eagle3_xla import checkpoint as checkpoints
from eagle3_xla.config import load_recipe
from eagle3_xla.data.prepare import load_prepared, prepare
from eagle3_xla.train.heldout import HeldOut
from eagle3_xla.train.loader import AHEAD, Loader, training_batches
from eagle3_xla.train.saving import Saver
from eagle3_xla.xla.plain import PlainBackend


class CountingBackend(PlainBackend):
    placed = 0

    def put(self, batch):
        self.placed += 1
        return super().put(batch)


def test_batches_come_ahead_in_order(small_run):
    recipe = load_recipe(None, small_run)
    prepare(recipe)
    rows, heldout_rows, _, manifest = load_prepared(recipe.data.prepared)
    backend = CountingBackend(recipe.xla)
    batches, loader = training_batches(recipe, rows, manifest, backend)
    golden = [loader.load(batches.indices(step)) for step in range(6)]
    backend.placed, asked = 0, []

    def indices():
        for step in range(6):
            asked.append(step)
            yield step, batches.indices(step)

    ahead = loader.ahead(indices())
    first = next(ahead)
    assert asked == list(range(AHEAD + 1))
    deadline = time.monotonic() + 60
    while backend.placed < AHEAD + 1:  # without being asked for them
        assert time.monotonic() < deadline
        time.sleep(0.001)
    for (batch, tokens), (expected, expected_tokens) in zip([first, *ahead], golden, strict=True):
        assert tokens == expected_tokens and batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in batch)

    with pytest.raises(IndexError):  # where the row is read, not lost in the thread
        list(loader.ahead([(0, batches.indices(0)), (1, np.array([10**6, 0]))]))

    heldout = HeldOut(heldout_rows, manifest["heldout_sources"], [[64, 0, len(heldout_rows)]], 4, 2)
    loader, backend.placed = Loader(heldout.rows, None, 2, backend), 0
    figures = [heldout.measure(loader, lambda batch: torch.ones(1 + 4 * 3)) for _ in range(3)]
    assert backend.placed == len(heldout.batches) == 2 and figures[0] == figures[2]


def state_after(step: int) -> checkpoints.Checkpoint:
    return checkpoints.Checkpoint(
        micro_step=step,
        head={"fc.weight": torch.full((64,), float(step))},
        optimizer={},
        d2t=torch.zeros(1, dtype=torch.int64),
        t2d=torch.ones(1, dtype=torch.bool),
        recipe={},
        data_key="",
        draft_config={},
    )


def test_checkpoints_are_written_behind_the_steps(tmp_path):
    begin = threading.Event()
    with Saver(2, pytest.fail, before=partial(begin.wait, 60)) as saver:
        saver.save(tmp_path / "run", state_after(0))
        saver.check()
        assert not (tmp_path / "run" / "step-00000000").exists()
        begin.set()
        saver.save(tmp_path / "run", state_after(1))  # after the one before
        assert (tmp_path / "run" / "step-00000000").exists()
        saver.check()
    assert [path.name for path in sorted((tmp_path / "run").iterdir())] == ["step-00000000", "step-00000001"]


@pytest.mark.parametrize("noticed", ["at the next step", "at the next save", "at the end", "with another error"])
def test_a_failed_write_is_not_lost(tmp_path, noticed):
    (tmp_path / "file").write_text("where a folder should be")
    said = []
    expected = KeyError if noticed == "with another error" else checkpoints.SaveFailed
    with pytest.raises(expected) as raised:
        with Saver(1, said.append) as saver:
            saver.save(tmp_path / "file", state_after(1))
            if noticed == "at the next step":
                while True:
                    saver.check()
                    time.sleep(0.001)
            elif noticed == "at the next save":
                saver.save(tmp_path, state_after(2))
            elif noticed == "with another error":
                raise KeyError
    assert "step-00000001 could not be written" in (said[0] if said else str(raised.value))
    assert not (tmp_path / "step-00000002").exists()
