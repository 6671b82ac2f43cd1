"""Which rows each host reads; packed rows against the same conversations alone."""

import numpy as np
import pytest
import torch

from eagle3_xla.data.batches import Batches, list_rows, share_of_process
from eagle3_xla.draft.model import Eagle3Head, draft_config
from eagle3_xla.loss.config import LossConfig
from eagle3_xla.loss.unroll import teacher_positions, unroll
from eagle3_xla.target.model import Target, load_target

LENGTHS = [17, 30, 9]
ROW = 64  # the three and some padding


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_each_batch(hosts):
    drafted = np.random.default_rng(0).integers(1, 64, 50)
    batches = Batches(drafted, [(64, 0, 50)], 2, 4, seed=3)
    for step in range(2 * batches.steps_per_epoch):
        whole = batches.indices(step)
        parts = [share_of_process(whole, host, hosts) for host in range(hosts)]
        assert {len(part) for part in parts} == {8 // hosts}
        assert np.concatenate(parts).tolist() == whole.tolist() and len(set(whole)) == 8


def test_another_number_of_hosts_continues_at_the_same_position():
    """Four hosts up to step 7, then one: no row of the epoch is read twice or left out."""
    drafted = np.arange(80) % 13
    four, one = (Batches(drafted, [(64, 0, 80)], 2, 4, seed=0) for _ in range(2))
    read = [row for step in range(7) for host in range(4) for row in share_of_process(four.indices(step), host, 4)]
    read += [row for step in range(7, one.steps_per_epoch) for row in share_of_process(one.indices(step), 0, 1)]
    assert sorted(read) == list(range(80))


def packed(tokens: list[torch.Tensor], rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """The conversations of each row one after the other, padded to ROW; an answer begins at a third of each."""
    batch = {name: torch.zeros(len(rows), ROW, dtype=torch.int64) for name in ("input_ids", "position_ids")}
    batch |= {"document_ids": torch.zeros(len(rows), ROW, dtype=torch.int64)}
    batch |= {"loss_mask": torch.zeros(len(rows), ROW, dtype=torch.bool)}
    for row, documents in enumerate(rows):
        start = 0
        for number, document in enumerate(documents, 1):
            length = len(tokens[document])
            part = slice(start, start + length)
            batch["input_ids"][row, part] = tokens[document]
            batch["position_ids"][row, part] = torch.arange(length)
            batch["document_ids"][row, part] = number
            batch["loss_mask"][row, start + length // 3 : start + length] = True
            start += length
    return batch


def test_packed_and_alone_give_the_same_loss_per_token_and_gradient(small_target):
    torch.manual_seed(0)
    target = Target(load_target(str(small_target), torch.float32), torch.arange(128))
    config = target.model.config
    head = Eagle3Head(draft_config(config, 128))
    tokens = [torch.randint(0, 128, (length,)) for length in LENGTHS]
    # Each of the random tokens counts, whatever the target would have said.
    t2d, d2t = torch.ones(config.vocab_size, dtype=torch.bool), torch.zeros(128, dtype=torch.int64)
    results = []
    for rows in ([[0, 1, 2]], [[2, 0, 1]], [[0], [1], [2]]):
        batch = packed(tokens, rows)
        states = target.states(batch["input_ids"], batch["position_ids"], batch["document_ids"])
        next_row = [torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1) for x in states[1:]]
        teacher = target.teacher(*next_row)
        result = unroll(head, target.embed_tokens, batch, states.aux, teacher, t2d, d2t, LossConfig(ttt_length=4))
        head.zero_grad()
        result.loss.backward()
        results.append((result, {name: p.grad.clone() for name, p in head.named_parameters()}))
    alone, alone_gradients = results[-1]
    assert float(alone.loss.detach()) > 1 and float(alone.sums[0].sum()) > 0
    for result, gradients in results[:-1]:
        torch.testing.assert_close(result.step_losses, alone.step_losses, rtol=1e-5, atol=1e-6)
        for ours, expected in zip(result.sums, alone.sums):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, alone_gradients[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("rows", [[[0, 1, 2]], [[2], [0, 1]]])
def test_mean_over_sequences(small_target, rows):
    """Each conversation weighs the same, however long its answer: the mean of what each gives alone."""
    torch.manual_seed(0)
    target = Target(load_target(str(small_target), torch.float32), torch.arange(128))
    head = Eagle3Head(draft_config(target.model.config, 128))
    tokens = [torch.randint(0, 128, (length,)) for length in LENGTHS]
    t2d = torch.ones(target.model.config.vocab_size, dtype=torch.bool)

    def step_losses(rows: list[list[int]], listed: int = 0, **settings) -> torch.Tensor:
        batch = packed(tokens, rows)
        states = target.states(batch["input_ids"], batch["position_ids"], batch["document_ids"])
        batch |= list_rows(batch["loss_mask"], 1, listed) if listed else {}
        next_row = [teacher_positions(batch, x) for x in states[1:]]
        config = LossConfig(ttt_length=3, **settings)
        arguments = (target.teacher(*next_row), t2d, torch.zeros(128, dtype=torch.int64), config)
        return unroll(head, target.embed_tokens, batch, states.aux, *arguments).step_losses

    for objective in ("kl", "tv"):
        alone = torch.stack([step_losses([[document]], objective=objective) for document in range(3)])
        together = step_losses(rows, objective=objective, mean_over="sequences")
        torch.testing.assert_close(together, alone.mean(0), rtol=1e-5, atol=1e-6)
        assert (together != step_losses(rows, objective=objective)).all()
    for mean_over in ("rows", "sequences", "all"):  # the same whether the other rows are computed or not
        ours, every = (step_losses(rows, listed, mean_over=mean_over) for listed in (48, 0))
        torch.testing.assert_close(ours, every, rtol=1e-5, atol=1e-6)
