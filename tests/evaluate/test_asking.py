"""Turns, thinking, the figures of teacher-forced answers, the length of a chain that pays."""

import copy
import json

import pytest
import torch

from eagle3_xla import cli
from eagle3_xla.data.prompts import read_prompts
from eagle3_xla.data.tokenizer import load_tokenizer, stop_token_ids
from eagle3_xla.errors import UserError
from eagle3_xla.evaluate.decode import Choice, Decoder, SpeculativeDecoder
from eagle3_xla.evaluate.draft_length import LONGEST, MeasuringDecoder
from eagle3_xla.evaluate.forced import teacher_forced
from eagle3_xla.evaluate.options import EvalOptions
from eagle3_xla.evaluate.run import decode_turns, prompt_ids


@pytest.fixture(scope="module")
def turns_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("turns") / "prompts.jsonl"
    rows = [{"turns": ["What is 2 and 3?", "And 4?", "Why?"]}, {"prompt": "What is 1 and 1?"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_later_turns_follow_the_targets_own_answers(small_pair, small_target, turns_file):
    target, head, d2t = small_pair
    tokenizer, options = load_tokenizer(str(small_target)), EvalOptions(turns=0, max_new_tokens=8)
    decoder = SpeculativeDecoder(target, head, d2t, 3, slots=2)
    prompts, stop_ids = read_prompts(turns_file), stop_token_ids(str(small_target), tokenizer)
    ids = prompt_ids(tokenizer, turns_file, options, 10**6)

    def asked(longest=10**6, turns=0):
        options.turns = turns
        return decode_turns(decoder, prompts, ids, tokenizer, stop_ids, options, longest)

    turns, without_room = asked()
    assert [turn.prompt for turn in turns] == [0, 0, 0, 1] and not without_room
    assert [turn.asked for turn in turns][:3] == ["What is 2 and 3?", "And 4?", "Why?"]
    answer = tokenizer.decode(turns[0].generation.tokens, skip_special_tokens=True)
    chat = [{"role": r, "content": c} for r, c in (("user", "What is 2 and 3?"), ("assistant", answer))]
    text = tokenizer.apply_chat_template(
        [*chat, {"role": "user", "content": "And 4?"}], tokenize=False, add_generation_prompt=True
    )
    assert turns[1].ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [len(turn.generation.tokens) > 0 for turn in turns] == [True] * 4
    assert [turn.prompt for turn in asked(turns=2)[0]] == [0, 0, 1]
    fewer, without_room = asked(longest=len(turns[1].ids) + 8)
    assert [turn.prompt for turn in fewer] == [0, 0, 1] and without_room == 1


def test_thinking_is_the_templates_own_switch(small_target, turns_file):
    tokenizer = load_tokenizer(str(small_target))
    with pytest.raises(UserError, match="--thinking off: the target's chat template does not know enable_thinking"):
        prompt_ids(tokenizer, turns_file, EvalOptions(thinking="off"), 10**6)
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = "{{ messages[0]['content'] }}{{ '' if enable_thinking else ' no thoughts' }}"
    on, off = (prompt_ids(thinking, turns_file, EvalOptions(thinking=way), 10**6)[1] for way in ("on", "off"))
    assert thinking.decode(on) == "What is 1 and 1?" and thinking.decode(off) == "What is 1 and 1? no thoughts"


@pytest.mark.parametrize("length, seed", [(5, 13), (30, 4)])  # two drafts in a row are accepted, one often
def test_teacher_forced_figures_are_those_of_decoding(small_pair, length, seed):
    target, head, d2t = small_pair
    steps = 3
    prompt = torch.randint(0, 1000, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    decoded = SpeculativeDecoder(target, head, d2t, steps).decode(prompt, 80, set())
    tried, hit, start = [0] * steps, [0] * steps, 0
    for accepted in decoded.accepted:  # drafts for what follows tokens[start]
        left = len(decoded.tokens) - 1 - start  # of the answer; what was drafted for after it, nobody can tell from it
        for k in range(min(accepted + 1, steps, left)):
            tried[k] += 1
            hit[k] += k < accepted
        start += accepted + 1
    computed = []  # positions of each step
    hook = head.midlayer.register_forward_hook(lambda layer, given, hidden: computed.append(hidden.shape[1]))
    sums = teacher_forced(target, head, d2t, prompt, decoded.tokens, steps)[1]
    hook.remove()
    assert computed == [length + len(decoded.tokens)] * steps + [len(decoded.tokens)] * steps
    assert teacher_forced(target, head, d2t, prompt, decoded.tokens[:1], steps)[1].drafts.tolist() == [0] * steps
    assert sums.chain_drafts.tolist() == tried and sums.chain_hits.tolist() == hit
    assert hit[1] > 0 if length == 5 else hit[0] > 3
    assert sums.drafts[0] == len(decoded.tokens) - 1 > tried[0]


def test_the_length_that_pays(small_pair):
    """Figures of rounds that were counted: no time is asserted."""
    prompts = [list(range(start, start + 10)) for start in (5, 50, 90)]
    pilot = MeasuringDecoder(*small_pair, slots=2)

    best, rows = pilot.lengths(prompts, 40, set(), [Choice()] * 3)
    assert 1 <= best <= len(rows) <= LONGEST
    assert rows[best - 1]["tokens_per_second"] == max(row["tokens_per_second"] for row in rows)
    first = [a >= 1 for _, _, accepted in pilot.rounds for a in accepted]
    assert rows[0]["acceptance_conditional"] == pytest.approx(sum(first) / len(first))
    share, tokens = 1.0, 1.0
    for row in rows:
        share *= row["acceptance_conditional"]
        tokens += share
        assert row["tokens_per_second"] == pytest.approx(2 * tokens / row["seconds"])
    target, head, d2t = small_pair
    narrow = copy.deepcopy(head)
    narrow.window = 3
    _, rows = MeasuringDecoder(target, narrow, d2t, slots=2).lengths(prompts, 20, set(), [Choice()] * 3)
    assert len(rows) == 3
    with pytest.raises(UserError, match="--draft-tokens auto finds the length of a chain"):
        EvalOptions(draft_tokens=0, topk=2)


def test_short_answers_leave_no_length_unmeasured(small_pair, capsys):
    prompts = [list(range(start, start + 10)) for start in (5, 50, 90)]
    answers = [Decoder(small_pair[0]).decode(prompt, 40, set()).tokens for prompt in prompts]
    short = next(i for i, own in enumerate(answers) if not any(own[1] in a[: 1 if a is own else 20] for a in answers))
    pilot = MeasuringDecoder(*small_pair, slots=3)
    _, rows = pilot.lengths(prompts, 20, {answers[short][1]}, [Choice()] * 3)
    assert len(rows) == LONGEST and capsys.readouterr().err == ""
    _, rows = pilot.lengths(prompts, 3, set(), [Choice()] * 3)
    assert f"too short to time chains of {len(rows) + 1} or more drafts" in capsys.readouterr().err


def test_all_of_it_from_the_command_line(trained, small_target, turns_file, capsys):
    words = ["eval", "--target", small_target, "--draft", trained, "--prompts", turns_file, "--json", "--turns", 2]
    words += ["--max-new-tokens", 12, "--draft-tokens", "auto"]
    assert cli.main([str(word) for word in words]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["prompts"] == 2 and figures["answers"] == 3 and figures["identical"]
    assert figures["draft_tokens"] == figures["steps"] <= len(figures["draft_lengths"])
    assert figures["speedup"] == pytest.approx(figures["tokens_per_second"] / figures["baseline_tokens_per_second"])
    assert figures["expected_tau"] >= 1 and figures["turns_without_room"] == 0
    assert len(figures["expected_acceptance_conditional"]) == figures["steps"]
