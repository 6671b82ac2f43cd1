"""On a GPU: the recorded step is the step, to the last bit."""

import pytest
import torch

from eagle3_xla.config import load_recipe
from eagle3_xla.data.batches import drafted_positions, list_rows
from eagle3_xla.data.vocab import d2t_t2d
from eagle3_xla.draft.model import Eagle3Head, draft_config
from eagle3_xla.target.model import Target, load_target
from eagle3_xla.train.optimizer import Optimizer
from eagle3_xla.train.step import TrainStep
from eagle3_xla.xla.plain import PlainBackend

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ROWS, LENGTH, DRAFT_VOCABULARY = 2, 128, 1024


def batches(vocabulary: int) -> list[dict[str, torch.Tensor]]:
    """Of two capacities, so of two shapes."""
    made = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        mask = torch.arange(LENGTH).repeat(ROWS, 1) % 32 > 8 + 8 * (seed % 2)
        batch = {
            "input_ids": torch.randint(vocabulary, (ROWS, LENGTH), generator=generator),
            "position_ids": torch.arange(LENGTH).repeat(ROWS, 1) % 32,
            "document_ids": torch.arange(LENGTH).repeat(ROWS, 1) // 32 + 1,
            "loss_mask": mask,
        }
        made.append(batch | list_rows(mask, 1, int(drafted_positions(mask.numpy()).sum())))
    return made


def run(model, recipe, captured: bool) -> tuple[list[float], dict]:
    backend = PlainBackend(recipe.xla)
    if not captured:
        backend.compile = lambda function, state=(): function
    draft_ids = torch.arange(DRAFT_VOCABULARY)
    target = backend.place_target(Target(model, draft_ids))
    torch.manual_seed(0)
    head = backend.place_head(Eagle3Head(draft_config(model.config, DRAFT_VOCABULARY)))
    optimizer = Optimizer(head, recipe.train, 100, backend, {})
    step = TrainStep(recipe, backend, target, head, *d2t_t2d(draft_ids, model.config.vocab_size), optimizer)
    every = [backend.put(batch) for batch in batches(model.config.vocab_size)]
    losses = [float(step.run(i, every[i % len(every)])[0][0]) for i in range(18)]
    losses += [float(step.evaluate(batch)[0]) for batch in (*every, *every)]
    return losses, optimizer.state()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_recorded_step_is_bit_identical(small_target, accumulation, capsys):
    settings = ["xla.device=cuda", "loss.ttt_length=3", f"train.gradient_accumulation={accumulation}"]
    recipe = load_recipe(None, settings)
    model = load_target(str(small_target), torch.bfloat16)
    losses, state = run(model, recipe, captured=False)
    recorded, recorded_state = run(model, recipe, captured=True)
    assert recorded == losses and len(set(losses)) > 18
    assert all(torch.equal(recorded_state[name], moment) for name, moment in state.items())
    assert "can't be a CUDA graph" not in capsys.readouterr().err
