"""Continuous batching in this process writes what the target alone would write."""

import asyncio
import json

import pytest
import torch
from regenerate.conftest import rows_of, write_questions

from eagle3_xla.cli import main
from eagle3_xla.config import Recipe
from eagle3_xla.data.tokenizer import load_tokenizer, stop_token_ids
from eagle3_xla.errors import RunError
from eagle3_xla.evaluate.decode import Decoder
from eagle3_xla.regenerate.conversation import Refused, Sampling
from eagle3_xla.regenerate.local import LocalTarget
from eagle3_xla.regenerate.run import Options, regenerate
from eagle3_xla.target.model import Target, load_target
from eagle3_xla.target.sampling import choose_tokens


def answers(target, prompts, sampling, slots, together=1):
    async def ask():
        async with LocalTarget(str(target), sampling, slots, "cpu") as local:
            local.together = together
            return await asyncio.gather(*(local.ask(prompt, seed) for seed, prompt in enumerate(prompts)))

    return asyncio.run(ask())


def prompts_of(count):
    return [[{"role": "user", "content": "word " * (i % 7) + f"question {i}"}] for i in range(count)]


@pytest.mark.parametrize("together", [1, 3])
def test_greedy_is_the_targets_own_decoding(small_target, together):
    """Prompts of several lengths, more than slots, answers of several lengths: slots are moved and taken again."""
    tokenizer, stop_ids = load_tokenizer(str(small_target)), stop_token_ids(str(small_target), None)
    target = Target(load_target(str(small_target), torch.float32), torch.arange(8))
    prompts = prompts_of(11)
    replies = answers(small_target, prompts, Sampling(0.0, max_tokens=12), slots=4, together=together)
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
        tokens = Decoder(target).decode(ids, 12, stop_ids).tokens
        stopped = tokens[-1] in stop_ids
        assert reply.text == tokenizer.decode(tokens[:-1] if stopped else tokens, skip_special_tokens=True)
        assert reply.finish == ("stop" if stopped else "length") and reply.tokens == len(tokens)


def test_samples_depend_on_the_seed_alone(small_target):
    prompts = prompts_of(6)
    first = answers(small_target, prompts, Sampling(1.0, 0.9, 8), slots=2)
    assert first == answers(small_target, prompts, Sampling(1.0, 0.9, 8), slots=6)
    assert first[::-1] != answers(small_target, prompts[::-1], Sampling(1.0, 0.9, 8), slots=2)


def test_samples_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    rows = [torch.Generator().manual_seed(i) for i in range(4000)]
    for top_p, kept in ((1.0, [0, 1, 2, 3]), (0.4, [2]), (0.7, [1, 2])):
        counts = torch.bincount(torch.tensor(choose_tokens(logits.expand(4000, -1), 2.0, top_p, rows)), minlength=4)
        expected = (logits[0] / 2.0).softmax(-1)
        expected = torch.where(torch.isin(torch.arange(4), torch.tensor(kept)), expected, 0.0)
        assert torch.allclose(counts / 4000, expected / expected.sum(), atol=0.03)


def test_context_is_the_limit(small_target):
    long = [{"role": "user", "content": "word " * 1100}]
    with pytest.raises(Refused, match="the target's context is 1024"):
        answers(small_target, [long], Sampling(), slots=1)
    nearly = [{"role": "user", "content": "word " * 980}]
    [reply] = answers(small_target, [nearly], Sampling(0.0, max_tokens=100), slots=1)
    assert reply.finish == "length" and 0 < reply.tokens < 100


@pytest.mark.parametrize("failing", ["the first prefill", "a later prefill", "a decoding step"])
def test_a_target_that_fails_answers_nobody_and_keeps_nobody_waiting(small_target, failing):
    """A decoder layer raises, as when memory runs out: running, waiting and later questions hear of it."""

    async def ask():
        async with LocalTarget(str(small_target), Sampling(0.0, max_tokens=12), 2, "cpu") as local:
            prefills = []

            def forward(module, arguments, keywords):
                prefill = keywords["position_ids"].shape[1] > 1
                prefills.extend([1] * prefill)
                works = failing == "a decoding step" or failing == "a later prefill" and len(prefills) < 3
                if not (works if prefill else failing == "a later prefill"):
                    raise torch.OutOfMemoryError("out of memory\nTried to allocate")

            local.target.model.layers[3].register_forward_pre_hook(forward, with_kwargs=True)
            asked = [local.ask(prompt, seed) for seed, prompt in enumerate(prompts_of(5))]
            replies = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 60)
            with pytest.raises(RunError):
                await local.ask(prompts_of(1)[0], 0)
            return replies

    replies = asyncio.run(ask())
    failed = [reply for reply in replies if isinstance(reply, RunError)]
    assert {str(reply) for reply in failed} == {"the target can't go on answering: out of memory"}
    assert len(failed) >= 3 and (failing == "a later prefill" or len(failed) == 5)


def test_the_verb_in_process(small_target, tmp_path, capsys):
    questions = write_questions(tmp_path / "questions.jsonl", 6)
    arguments = ["--target", small_target, "--chats", questions, "--max-tokens", 4, "--concurrency", 3, "--json"]
    assert main(["regenerate", *map(str, arguments), "--out", str(tmp_path / "out")]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["finished"] == 6 and "tokens/s" in output.err
    rows = sorted(rows_of(tmp_path / "out"), key=lambda row: row["id"])
    assert [row["messages"][0]["content"] for row in rows] == [f"question {i} 0" for i in range(6)]
    options = Options(target=str(small_target), chats=[str(questions)], concurrency=1, sampling=Sampling(max_tokens=4))
    regenerate(Recipe(), tmp_path / "again", options)
    assert sorted(rows_of(tmp_path / "again"), key=lambda row: row["id"]) == rows  # whatever the number of slots
