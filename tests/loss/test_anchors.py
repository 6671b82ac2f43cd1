"""TTT steps at some rows alone: what all rows give, no more and no less."""

import numpy as np
import pytest
import torch
from golden_case import FILES, GoldenCase

from eagle3_xla.config import load_recipe
from eagle3_xla.data.batches import anchor_count, drafted_positions, draw_anchors, list_rows
from eagle3_xla.errors import UserError
from eagle3_xla.loss.config import LossConfig
from eagle3_xla.loss.rows import gather
from eagle3_xla.loss.unroll import rows_of

FILE = next(file for file in FILES if file.stem == "b2_assistant_spans")


def case(listed: bool, objective: str, ttt_length: int) -> GoldenCase:
    made = GoldenCase(FILE)
    made.loss = LossConfig(ttt_length=ttt_length, objective=objective)
    mask = made.batch["loss_mask"]
    if listed:
        made.batch |= list_rows(mask, 1, int(drafted_positions(mask.numpy()).sum()) + 3)
    return made


def run(made: GoldenCase, anchors: list[int] | None = None):
    """(the result, gradients). anchors: numbers in the list of rows."""
    made.head.zero_grad()
    count = made.batch["rows"].shape[1] if "rows" in made.batch else made.batch["loss_mask"].numel()
    made.batch = {name: x for name, x in made.batch.items() if "anchor" not in name}
    if "rows" not in made.batch:  # one group, as a list has it
        made.batch |= {"rows": torch.arange(count)[None], "slots": torch.arange(count)[None]}
    if anchors is not None:
        slots = torch.full((1, count), len(anchors))
        slots[0, anchors] = torch.arange(len(anchors))
        made.batch |= {"anchors": torch.tensor([anchors]), "anchor_slots": slots}
    result = made.run()
    return result, {name: p.grad.clone() for name, p in made.head.named_parameters()}


def rows_in_list(made: GoldenCase) -> int:
    return made.batch["rows"].shape[1] if "rows" in made.batch else made.batch["loss_mask"].numel()


@pytest.mark.parametrize("objective", ["kl", "lk_alpha", "reverse_kl + 0.5*tv", "lk_lambda"])
@pytest.mark.parametrize("listed", [True, False])
def test_all_rows_as_anchors_change_nothing(listed, objective):
    made = case(listed, objective, 4)
    expected, gradients = run(made)
    result, ours = run(made, [*range(rows_in_list(made))])
    assert torch.allclose(result.loss, expected.loss, rtol=1e-6)
    assert torch.allclose(result.step_losses, expected.step_losses, rtol=1e-6)
    for name, sums in expected.sums._asdict().items():
        assert torch.allclose(getattr(result.sums, name), sums, rtol=1e-6), name
    for name, gradient in gradients.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_anchors_one_by_one_add_up_to_all_rows():
    """Losses and hits of every single anchor are those that all rows have together; step 0 is always all rows."""
    made = case(True, "kl", 4)
    expected, _ = run(made)
    rows = rows_in_list(made)
    count = made.batch["loss_mask"]
    losses, hits, chains, trained = torch.zeros(4), torch.zeros(4), torch.zeros(4), torch.zeros(4)
    for anchor in range(rows):
        result, _ = run(made, [anchor])
        assert torch.allclose(result.step_losses[0], expected.step_losses[0], rtol=1e-6)
        losses += result.step_losses
        hits, chains = hits + result.sums.hits, chains + result.sums.chain_hits
        trained += (result.step_losses > 0).float()
    assert count.any() and (trained[1:] < rows).all()
    assert torch.allclose(losses[1:] / trained[1:], expected.step_losses[1:], rtol=1e-5)
    assert torch.equal(hits[1:], expected.sums.hits[1:]) and torch.equal(chains[1:], expected.sums.chain_hits[1:])


def test_gradients_of_anchors_add_up_too():
    made = case(True, "kl", 2)
    _, whole = run(made)
    rows, trained = rows_in_list(made), 0
    made.loss.ttt_length = 1
    _, first = run(made)
    made.loss.ttt_length = 2
    total = {name: torch.zeros_like(gradient) for name, gradient in whole.items()}
    for anchor in range(rows):
        result, gradients = run(made, [anchor])
        trained += int(result.step_losses[1] > 0)
        for name, gradient in gradients.items():
            total[name] += gradient - first[name]
    for name, gradient in whole.items():
        later = gradient - first[name]
        assert (total[name] / trained - later).norm() <= 1e-4 * later.norm().clamp_min(1e-4), name


def test_groups_are_apart():
    """Two groups with anchors of their own give what one group with all of them gives."""
    made = case(False, "kl", 3)
    mask = made.batch["loss_mask"]
    length = mask.shape[1]
    chosen = [[2, 5, 9], [1, 7, 8]]
    slots = torch.full((2, length), 3)
    for group, anchors in enumerate(chosen):
        slots[group, anchors] = torch.arange(3)
    made.batch |= {"anchors": torch.tensor(chosen), "anchor_slots": slots}
    result = made.run()
    single, _ = run(case(False, "kl", 3), [*chosen[0], *(length + anchor for anchor in chosen[1])])
    assert torch.allclose(result.step_losses, single.step_losses, rtol=1e-5)


def test_the_draw():
    """Distinct rows in order, those that are drafted at first; new ones each step, the same on any number of hosts."""
    mask = np.arange(2 * 4 * 64).reshape(8, 64) % 64 > 20
    mask[3] = False
    listed = list_rows(torch.from_numpy(mask), 4, 128)
    drafted = np.take_along_axis(drafted_positions(mask).reshape(4, -1), listed["rows"].numpy().astype(int), axis=1)
    count = anchor_count(0.4, 128)
    assert count == 64
    drawn = [draw_anchors(drafted, count, seed=7, step=step, first=0) for step in (0, 0, 1)]
    for anchors in (draw["anchors"].numpy() for draw in drawn):
        assert (np.diff(anchors) > 0).all() and anchors.min() >= 0 and anchors.max() < 128
        enough = drafted.sum(1) >= count
        assert enough.tolist() == [True, False, True, True]
        assert np.take_along_axis(drafted, anchors, axis=1)[enough].all()
        assert np.take_along_axis(drafted, anchors, axis=1)[~enough].sum() == drafted[~enough].sum()
    assert torch.equal(drawn[0]["anchors"], drawn[1]["anchors"]) and not torch.equal(*(d["anchors"] for d in drawn[1:]))
    second = draw_anchors(drafted[2:], count, seed=7, step=0, first=2)
    assert torch.equal(second["anchors"], drawn[0]["anchors"][2:])
    places = gather(drawn[0]["anchor_slots"], drawn[0]["anchors"].long())
    assert torch.equal(places, torch.arange(count).expand(4, -1).int())
    assert (drawn[0]["anchor_slots"] == count).sum() == 4 * (128 - count)


def test_rows_of_anchors_among_listed_rows():
    made = case(True, "kl", 2)
    made.batch |= draw_anchors(np.ones((1, rows_in_list(made)), bool), 5, 0, 0, 0)
    rows = rows_of(made.batch)
    anchors = type(rows)(1, made.batch["anchors"], made.batch["anchor_slots"])
    positions = torch.arange(made.batch["loss_mask"].numel()).view(made.batch["loss_mask"].shape)
    taken = rows.at(anchors).take(positions)
    assert torch.equal(taken, anchors.take(rows.take(positions)))
    put = rows.at(anchors).put(taken, len(positions))
    assert torch.equal(put[put > 0], taken[taken > 0].sort().values) and torch.equal(put[put > 0], positions[put > 0])


def test_what_anchors_go_with():
    assert load_recipe(None, ["loss.anchors=0.25"]).loss.anchors == 0.25
    for wrong in ("loss.rows=specforge", "loss.mean_over=all"):
        with pytest.raises(UserError, match="loss.anchors is below 1: not for loss.rows=specforge"):
            load_recipe(None, ["loss.anchors=0.25", wrong])
