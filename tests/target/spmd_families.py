"""Small family models over meshes of four devices, all in one process; the arguments are their folders.

Writes each one's states and teacher to FOLDER/DPxTP.pt for both meshes. On the first, three training steps are compiled
once, or three calls for the states where a step has nothing of the family beyond them.
"""

import sys
import time
from pathlib import Path

import torch
from target.family_models import SHALLOW_AUX

from eagle3_xla.config import load_recipe
from eagle3_xla.data.tokenizer import load_config
from eagle3_xla.data.vocab import d2t_t2d
from eagle3_xla.draft.model import Eagle3Head, draft_config
from eagle3_xla.target.model import Target, _empty
from eagle3_xla.train.optimizer import Optimizer
from eagle3_xla.train.step import TrainStep
from eagle3_xla.xla.backend import make_backend
from eagle3_xla.xla.config import XlaConfig

MESHES, STEPS = ((2, 2), (1, 4)), 3
# Tied embeddings, and an untied one; routed experts; logits that are capped or scaled.
STEPPED = ("qwen2", "qwen3_moe", "mixtral", "gpt_oss", "gemma2", "gemma3_text", "granite")
BACKENDS = {mesh: make_backend(XlaConfig(dp=mesh[0], tp=mesh[1])) for mesh in MESHES}


def compiled_once(folder: Path, backend, calls: int, call):
    """What the last of so many calls gives."""
    counts = []
    for _ in range(calls):
        result = call()
        counts.append(backend.compilations())
    assert len(set(counts)) == 1, f"{folder} compiles again: {counts}"
    return result


def run(folder: Path, dp: int, tp: int) -> None:
    backend, inputs = BACKENDS[dp, tp], torch.load(folder / "inputs.pt")
    draft_ids = inputs.pop("draft_ids")
    # open_target, for as few layers as a real target never has
    model, weights = _empty(str(folder), load_config(str(folder)), torch.float32)
    target = backend.place_target(Target(model, draft_ids, SHALLOW_AUX, weights))
    backend.settle()

    @backend.compile
    def states_and_teacher(batch):
        states = target.states(batch["input_ids"], batch["position_ids"], batch["document_ids"])
        return (*states, target.teacher(states.hidden, states.argmax, states.logsumexp).logits)

    first, stepped = (dp, tp) == MESHES[0], model.config.model_type in STEPPED
    calls = STEPS if first and not stepped else 1
    states = compiled_once(folder, backend, calls, lambda: states_and_teacher(backend.put(inputs)))
    torch.save([backend.to_host(x) for x in states], folder / f"{dp}x{tp}.pt")
    if not (first and stepped):
        return
    recipe = load_recipe(None, ["loss.ttt_length=1", "xla.device=xla", f"xla.dp={dp}", f"xla.tp={tp}"])
    head = backend.place_head(Eagle3Head(draft_config(model.config, len(draft_ids))))
    optimizer = Optimizer(head, recipe.train, 10, backend, {})
    d2t_and_t2d = d2t_t2d(draft_ids, model.config.vocab_size)
    step = TrainStep(recipe, backend, target, head, *d2t_and_t2d, optimizer)
    backend.settle()
    batch = inputs | {"loss_mask": inputs["document_ids"] > 0}
    metrics = compiled_once(folder, backend, STEPS, lambda: step.run(0, backend.put(batch))[0].cpu())
    assert metrics.isfinite().all()


for name in sys.argv[1:]:
    for mesh in MESHES:
        started = time.process_time()
        run(Path(name), *mesh)
        print(f"{name} {mesh} {time.process_time() - started:.1f} s of CPU", flush=True)
