"""States of every small family model over a mesh, in one process: python spmd_families.py DP TP FOLDER..."""

import sys
from pathlib import Path

import torch

from eagle3_xla.config import XlaConfig
from eagle3_xla.target.model import open_target
from eagle3_xla.xla import make_backend

dp, tp = map(int, sys.argv[1:3])
backend = make_backend(XlaConfig(dp=dp, tp=tp))
for folder in map(Path, sys.argv[3:]):
    inputs = torch.load(folder / "inputs.pt")
    target = backend.place_target(open_target(str(folder), torch.float32, inputs.pop("draft_ids")))
    backend.settle()

    @backend.compile
    def states_and_teacher(batch):
        states = target.states(batch["input_ids"], batch["position_ids"], batch["document_ids"])
        return [*states, *target.teacher(states.hidden, states.argmax, states.logsumexp)[:1]]

    states = states_and_teacher(backend.put(inputs))
    before = backend.compilations()
    states = states_and_teacher(backend.put(inputs))
    assert backend.compilations() == before, f"{folder} compiles again"
    torch.save([backend.to_host(x) for x in states], folder / f"{dp}x{tp}.pt")
    print(folder, flush=True)
