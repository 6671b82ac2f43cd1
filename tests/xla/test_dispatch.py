"""Running a graph by its hash: the values of the traced function, its state handed on, nothing stale."""

import json
from pathlib import Path

import pytest
from forks import same_bits
from safetensors.torch import load_file

from eagle3_xla.config import load_recipe
from eagle3_xla.data.prepare import prepare

# The same function over three states: on the CPU in plain torch, dispatched, and as torch_xla.compile traces it.
VALUES = """
import os, warnings
os.environ.update(PJRT_DEVICE="CPU", CPU_NUM_DEVICES="1")
import torch
import torch_xla
from eagle3_xla.xla.config import XlaConfig
from eagle3_xla.xla.backend import make_backend

backend = make_backend(XlaConfig())
scale, calls = 0.25, 0

def make(place):
    weight, count, unread = place(torch.arange(6.).reshape(2, 3)), place(torch.zeros(())), place(torch.ones(2, 3))
    def step(batch):
        global calls
        calls += 1
        rows = batch["x"].float()
        count.add_(1)
        weight.mul_(0.5).add_(rows.mean(0) * scale)
        unread.zero_().add_(rows.sum())
        return weight.sum(), None, rows.sum() * count
    return step, [weight, count, unread]

def same(ours, golden):
    return all((a is None) == (b is None) and (a is None or torch.allclose(a.cpu(), b)) for a, b in zip(ours, golden))

def compare(steps, changed_scale=None):
    global scale, calls
    plain, expected = make(lambda tensor: tensor)
    function, state = make(backend.replicate)
    backend.settle()
    step, traced = backend.compile(function, state), 0
    for number, rows in enumerate(steps):
        if number == 1 and changed_scale:
            scale = changed_scale
        batch = {"x": torch.arange(rows * 3.).reshape(rows, 3) + number}
        golden = plain(batch)
        before, calls = backend.compilations(), 0
        result = step(backend.put(batch))
        print(rows, "traced" if calls else "by hash", backend.compilations() - before, end="; ")
        assert same([*result, *state], [*golden, *expected]), (result, state, golden, expected)
    print()
    scale = 0.25
    return step, state

step, state = compare([2, 2, 2, 4, 2, 4, 4, 2])
kept = state[0].detach()
step(backend.put({"x": torch.ones(2, 3)}))
torch_xla.core.xla_model.wait_device_ops()
try:
    print("its buffer is still there:", kept.cpu())
except RuntimeError as error:
    print("its buffer was given up:", "HasValue()" in str(error))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    compare([5, 5, 5, 5], 0.75)
    compare([6, 6, 6], 1.0)
    del torch_xla._XLAC._run_cached_graph
    compare([7, 7, 7])
print(*[w.message for w in said if "traced at every call" in str(w.message)], sep="\\n")
"""


def test_values_state_and_changing_numbers(forks):
    done = forks.run_code(VALUES)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0] == (
        "2 traced 1; 2 traced 0; 2 by hash 0; 4 traced 1; 2 by hash 0; 4 traced 0; 4 by hash 0; 2 by hash 0; "
    )
    assert said[1] == "its buffer was given up: True"
    assert said[2] == "5 traced 1; 5 traced 0; 5 traced 0; 5 by hash 0; "
    assert said[3] == "6 traced 1; 6 traced 1; 6 traced 0; "
    assert said[4] == "7 traced 1; 7 traced 0; 7 traced 0; "
    assert "a constant of shape [] in it changes from call to call" in said[5] and "`step`" in said[5]
    assert "its graph changes from call to call" in said[6]
    assert "has no _run_cached_graph" in said[7] and len(said) == 8


# Batches come from a thread while another one syncs, as the first steps of a run do.
THREADS = """
import os
os.environ.update(PJRT_DEVICE="CPU", CPU_NUM_DEVICES="2")
from concurrent.futures import ThreadPoolExecutor
import torch
from eagle3_xla.xla.config import XlaConfig
from eagle3_xla.xla.backend import make_backend

backend = make_backend(XlaConfig(dp=2, tp=1))

def load():
    for _ in range(150):
        backend.put({"aux": torch.ones(4, 256, 1728), "input_ids": torch.ones(4, 256, dtype=torch.long)})

with ThreadPoolExecutor(1) as pool:
    loading = pool.submit(load)
    while not loading.done():
        backend.settle()
loading.result()
print(backend.compilations())
"""


def test_a_sync_leaves_the_batches_of_another_thread_alone(forks):
    done = forks.run_code(THREADS)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["0"]


# Three runs in a process: one without the API that dispatch needs, then one in two parts.
RUNS = """
import sys
import torch_xla
from eagle3_xla.config import load_recipe
from eagle3_xla.train.loop import train

out, *stops, settings = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4:]
run_cached_graph = torch_xla._XLAC._run_cached_graph
del torch_xla._XLAC._run_cached_graph
train(load_recipe(None, [*settings, f"train.out={out}/traced"]), sum(stops))
torch_xla._XLAC._run_cached_graph = run_cached_graph
print("from here on by hash", file=sys.stderr)
for stop in stops:
    train(load_recipe(None, [*settings, f"train.out={out}/by-hash"]), stop)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "dp, tp, accumulation, stops",
    [(2, 2, 1, (4, 1)), (1, 1, 2, (6, 2))],  # from the third call on a graph runs by its hash
    ids=["2x2", "one device, accumulation"],
)
def test_a_dispatched_run_resumes_to_the_weights_of_a_traced_one(
    forks, small_run, tmp_path, dp, tp, accumulation, stops
):
    """Evaluation included: the same acceptance at the same steps."""
    settings = [*small_run, "xla.device=xla", f"xla.dp={dp}", f"xla.tp={tp}", f"train.batch_size={2 // dp}"]
    settings += [f"train.gradient_accumulation={accumulation}", "train.eval_every=1", "train.epochs=4"]
    settings += ["loss.ttt_length=1"]
    prepare(load_recipe(None, settings))
    done = forks.run_code(RUNS, tmp_path, *stops, *settings, environment=same_bits())
    assert done.returncode == 0, done.stderr
    traced, by_hash = done.stderr.split("from here on by hash")
    assert "is traced at every call" in traced and "is traced at every call" not in by_hash
    last = Path("checkpoints") / f"step-{sum(stops):08}" / "state.safetensors"
    ours, golden = (load_file(tmp_path / name / last) for name in ("by-hash", "traced"))
    assert ours.keys() == golden.keys() and all(ours[name].equal(golden[name]) for name in golden)
    assert taus(tmp_path / "by-hash") == taus(tmp_path / "traced")
    assert [step for step, _ in taus(tmp_path / "traced")] == list(range(0, sum(stops) + 1, accumulation))


def taus(out: Path) -> list:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["heldout_tau"]) for row in rows if "heldout_tau" in row]
