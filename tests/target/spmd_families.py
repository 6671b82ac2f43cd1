"""Small family models over a mesh, all in one process: python spmd_families.py DP TP STEPS FOLDER...

Writes each one's states and teacher to FOLDER/DPxTP.pt, and makes STEPS training steps.
"""

import sys
import time
from pathlib import Path

import torch

from eagle3_xla.config import XlaConfig, load_recipe
from eagle3_xla.data.vocab import d2t_t2d
from eagle3_xla.draft.model import Eagle3Head, draft_config
from eagle3_xla.target.model import open_target
from eagle3_xla.train.optimizer import AdamW
from eagle3_xla.train.step import TrainStep
from eagle3_xla.xla import make_backend

dp, tp, steps = map(int, sys.argv[1:4])
backend = make_backend(XlaConfig(dp=dp, tp=tp))
recipe = load_recipe(None, ["loss.ttt_length=1", "xla.device=xla", f"xla.dp={dp}", f"xla.tp={tp}"])


def run(folder: Path) -> None:
    inputs = torch.load(folder / "inputs.pt")
    draft_ids = inputs.pop("draft_ids")
    target = backend.place_target(open_target(str(folder), torch.float32, draft_ids))
    config = target.model.config
    backend.settle()

    @backend.compile
    def states_and_teacher(batch):
        states = target.states(batch["input_ids"], batch["position_ids"], batch["document_ids"])
        return (*states, target.teacher(states.hidden, states.argmax, states.logsumexp).logits)

    states = states_and_teacher(backend.put(inputs))
    torch.save([backend.to_host(x) for x in states], folder / f"{dp}x{tp}.pt")
    if not steps:
        return
    head = backend.place_head(Eagle3Head(draft_config(config, len(draft_ids))))
    optimizer = AdamW(dict(head.named_parameters()), recipe.train, 10, backend, {})
    step = TrainStep(recipe, backend, target, head, *d2t_t2d(draft_ids, config.vocab_size), optimizer)
    backend.settle()
    counts = []
    for _ in range(steps):
        batch = backend.put(inputs | {"loss_mask": inputs["document_ids"] > 0})
        metrics, _ = step.run(0, batch)
        assert metrics.cpu().isfinite().all()
        counts.append(backend.compilations())
    assert len(set(counts)) == 1, f"{folder} compiles again: {counts}"


for name in sys.argv[4:]:
    started = time.process_time()
    run(Path(name))
    print(f"{name} {time.process_time() - started:.1f} s of CPU", flush=True)
