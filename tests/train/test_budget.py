"""Every compilation beyond the plan ends the run, and the message says what changed."""

SCRIPT = """
import os
os.environ.update(PJRT_DEVICE="CPU", CPU_NUM_DEVICES="1")
import torch
from eagle3_xla.errors import RunError
from eagle3_xla.xla.config import XlaConfig
from eagle3_xla.train.budget import CompileBudget
from eagle3_xla.xla.backend import make_backend

backend = make_backend(XlaConfig())
scale = 0.25

def step(batch):
    return sum((x.float() * scale).sum() for x in batch.values())

def fresh(allow=False):
    return CompileBudget(backend, {"step": 1}, print, allow), backend.compile(step)

def attempt(name, budget, function, x, *more):
    batch = {"x": backend.replicate(x)} | {name: backend.replicate(x) for name in more}
    backend.settle()
    try:
        budget.run("step", function, batch)
        print(name, "went on,", budget.made, "compiled")
    except RunError as error:
        print(name, "stopped:", error)

x = torch.ones(2, 4)
budget, function = fresh()
attempt("first", budget, function, x)
attempt("again", budget, function, x)
attempt("shape", budget, function, torch.ones(2, 5))
attempt("dtype", *fresh(), x.to(torch.int32))
budget, function = fresh()
attempt("before lr", budget, function, torch.ones(2, 6))
scale = 1.0
attempt("lr", budget, function, torch.ones(2, 6))
budget, function = fresh(allow=True)
attempt("allowed first", budget, function, torch.ones(3, 4))
attempt("allowed", budget, function, torch.ones(3, 5))
budget, function = fresh()
attempt("one", budget, function, torch.ones(4, 4))
attempt("another", budget, function, torch.ones(4, 4), "rows")
"""


def test_what_changed_is_named(forks):
    done = forks.run_code(SCRIPT)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0] == "first went on, 1 compiled" and said[1] == "again went on, 1 compiled", said
    assert said[2].startswith("shape stopped: `step` was compiled beyond its budget (1): x is float32[2, 5], was")
    assert "--allow-recompile" in said[2]
    assert said[3] == "dtype went on, 1 compiled" and said[4] == "before lr went on, 1 compiled", said
    assert said[5].startswith("lr stopped: ") and "a Python number that changes is part of the graph" in said[5]
    assert said[6] == "allowed first went on, 1 compiled"
    assert said[7].startswith("`step` was compiled beyond") and said[8] == "allowed went on, 2 compiled", said
    assert said[10].startswith("another stopped: "), said
    assert "(1): rows is float32[4, 4], was None; every batch needs" in said[10]
