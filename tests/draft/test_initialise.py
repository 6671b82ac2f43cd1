"""The start in closed form, on targets that the head can follow: of one the next state is a map of low rank of the next
token's embedding and of its state, another says what followed the last time."""

import pytest
import torch
from transformers import LlamaConfig

from eagle3_xla.draft import initialise
from eagle3_xla.draft.initialise import SampledRows, initialise_head, unscaled
from eagle3_xla.draft.model import Eagle3Head, draft_config
from eagle3_xla.loss.config import LossConfig
from eagle3_xla.loss.unroll import teacher_positions, unroll
from eagle3_xla.target.model import Teacher

SIZE, VOCABULARY, ROWS, LENGTH, RANK, STEPS = 64, 96, 48, 64, 32, 3
MASK = torch.ones(ROWS, LENGTH, dtype=torch.bool)


def normed(x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True))


@pytest.fixture(scope="module")
def target():
    """(token ids, embedding [V, H], aux, hidden after the norm, that norm's scale, lm_head [V, H])."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    ids, embedding = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator), draw(VOCABULARY, SIZE)
    basis = torch.linalg.qr(draw(SIZE, RANK)).Q
    of_embeds, state = draw(SIZE, RANK) @ basis.T / SIZE**0.5, normed(draw(ROWS, SIZE))
    states = []
    for t in range(LENGTH):
        state = normed(state - 0.5 * state @ basis @ basis.T + normed(embedding)[ids[:, t]] @ of_embeds)
        states.append(state)
    hidden = torch.stack(states, 1)
    aux = torch.cat([hidden @ draw(SIZE, SIZE) * size for size in (0.1, 1.0, 30.0)], -1)
    norm_weight = 2 + draw(SIZE).abs()
    return ids, embedding, aux, hidden * norm_weight, norm_weight, draw(VOCABULARY, SIZE)


@pytest.fixture(scope="module")
def repeating_target():
    """The same of a target whose rows say everything twice: its state is the token, and what followed that before."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    once = torch.stack([torch.randperm(VOCABULARY, generator=generator)[: LENGTH // 2] for _ in range(ROWS)])
    ids, embedding, lm_head = once.repeat(1, 2), draw(VOCABULARY, SIZE), draw(VOCABULARY, SIZE)
    lm_head[:, : SIZE // 2] = 0
    followed = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    followed[:, LENGTH // 2 :] = ids.roll(-1, 1)[:, LENGTH // 2 :]
    hidden = lm_head[followed]
    hidden[..., : SIZE // 2] = draw(VOCABULARY, SIZE // 2)[ids]
    hidden = normed(hidden)
    return ids, embedding, torch.cat([hidden] * 3, -1), hidden, torch.ones(SIZE), lm_head


def acceptance(target, how, kv_heads=1):
    """Of the head before its first step, at each TTT step, on all rows."""
    ids, embedding, aux, hidden, norm_weight, lm_head = target
    config = LlamaConfig(
        hidden_size=SIZE,
        intermediate_size=128,
        num_attention_heads=2,
        num_key_value_heads=kv_heads,
        head_dim=64,
        vocab_size=VOCABULARY,
        num_hidden_layers=8,
    )
    head = Eagle3Head(draft_config(config, VOCABULARY))
    positions, documents = torch.arange(LENGTH).expand(ROWS, -1), torch.zeros_like(ids)
    sample = [SampledRows(aux, embedding[ids], unscaled(hidden, norm_weight), MASK, documents, positions)]
    initialise_head(head, how, 0, lm_head, norm_weight, sample)
    batch = {"input_ids": ids, "position_ids": positions, "document_ids": documents, "loss_mask": MASK}
    logits = hidden @ lm_head.T
    of_rows = (teacher_positions(batch, x) for x in (logits, logits.logsumexp(-1), logits.argmax(-1)))
    every, none = torch.ones(VOCABULARY, dtype=torch.bool), torch.zeros(VOCABULARY, dtype=torch.long)
    with torch.no_grad():
        loss = LossConfig(ttt_length=STEPS)
        sums = unroll(head, lambda x: embedding[x], batch, aux, Teacher(*of_rows), every, none, loss).sums
    return sums.hits / sums.drafts


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_every_step_begins_near_the_target(target, kv_heads):
    assert acceptance(target, "target", kv_heads).max() < 0.2
    assert acceptance(target, "least_squares", kv_heads).min() > 0.8


def test_it_looks_for_rows_that_went_on_as_this_one_does(repeating_target, monkeypatch):
    assert acceptance(repeating_target, "least_squares")[0] > 0.25  # of half of the rows nobody can know it
    monkeypatch.setattr(initialise, "SHARPNESS", (0.0, 0.0, 0.0))
    assert acceptance(repeating_target, "least_squares")[0] < 0.1
