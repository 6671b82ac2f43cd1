"""Several prompts at once: every answer, its counts and its drafts are those of the prompt alone."""

import pytest
import torch

from eagle3_xla.evaluate.decode import PREFILL_ROWS, Choice, Decoder, SpeculativeDecoder


@pytest.fixture(scope="module")
def prompts():
    """Of many lengths, one of them prefilled in two pieces, one a single token; more than there are slots."""
    generator = torch.Generator().manual_seed(3)
    lengths = (5, 40, 1, PREFILL_ROWS + 10, 17, 3, 260)
    return [torch.randint(0, 1000, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("temperature", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(4, 1, 4), (8, 3, 3)], ids=["chain", "tree"])
def test_every_answer_is_the_one_of_its_prompt_alone(small_pair, prompts, shape, temperature):
    choices = [Choice(temperature, 0.9, seed=5, prompt=i) for i in range(len(prompts))]
    alone = SpeculativeDecoder(*small_pair, *shape)
    stops = {alone.decode(prompts[1], 4, set(), choices[1]).tokens[3]}  # some end early; their slots go to the next
    expected = [alone.decode(prompt, 16, stops, choose) for prompt, choose in zip(prompts, choices)]
    assert len({len(answer.tokens) for answer in expected}) > 1
    ended, seen = [], {}
    together = SpeculativeDecoder(*small_pair, *shape, slots=3)
    together.watch = lambda prompt, answer: seen.setdefault(prompt, []).append([*answer.tokens])
    answers = together.decode_all(prompts, 16, stops, choices, lambda: ended.append(1))
    assert len(ended) == len(prompts) and any(sum(answer.accepted) for answer in answers)
    for prompt, (ours, one) in enumerate(zip(answers, expected)):
        assert ours.tokens == one.tokens and ours.accepted == one.accepted
        grown = seen[prompt]  # after the prefill and after each call
        assert len(grown) == 1 + len(ours.accepted) and len(grown[0]) == 1 and grown[-1] == ours.tokens
        assert all(len(a) < len(b) and b[: len(a)] == a for a, b in zip(grown, grown[1:]))
        for (tree, kept), (tree_alone, kept_alone) in zip(ours.rounds, one.rounds, strict=True):
            assert tree.tokens == tree_alone.tokens and tree.parents == tree_alone.parents and kept == kept_alone
    plain = Decoder(small_pair[0], slots=4).decode_all(prompts, 16, stops, choices)
    assert [answer.tokens for answer in plain] == [answer.tokens for answer in expected]


def test_a_long_prompt_is_the_targets_own(small_pair, prompts):
    """Prefilled in two pieces: as transformers has it in one."""
    target, head, d2t = small_pair
    long = prompts[3]
    golden = target.model.generate(torch.tensor([long]), max_new_tokens=12, do_sample=False, eos_token_id=-1)
    assert SpeculativeDecoder(target, head, d2t, 3).decode(long, 12, set()).tokens == golden[0, len(long) :].tolist()
