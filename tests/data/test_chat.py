"""Chats to tokens: the mask holds what the assistant wrote and its end of turn, and nothing else."""

import json
import random

import pytest

from eagle3_xla.config import UserError
from eagle3_xla.data.chat import Chat, encode_chat, read_chats, read_prompts

WORDS = "Hello world 12 naïve\ncode: def f(x): return x<|y|> 你好 ... end".split(" ")


def random_chat(rng: random.Random) -> Chat:
    messages = [{"role": "system", "content": "Be brief."}] if rng.random() < 0.3 else []
    for _ in range(rng.randint(1, 4)):
        for role in ("user", "assistant"):
            messages.append({"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))})
    return Chat(messages, True, "test", "here:1")


def spans(ids, mask):
    span, out = [], []
    for token, on in zip([*ids, None], [*mask, 0]):
        if on:
            span.append(token)
        elif span:
            out.append(span)
            span = []
    return out


def test_mask_is_the_assistant_and_its_end_of_turn(tokenizer):
    rng = random.Random(0)
    for _ in range(200):
        chat = random_chat(rng)
        ids, mask = encode_chat(tokenizer, chat)
        answers = [m["content"] for m in chat.messages if m["role"] == "assistant"]
        assert [tokenizer.decode(span) for span in spans(ids, mask)] == [f"{answer}<|im_end|>" for answer in answers]


def test_cut_answer_does_not_end_its_turn(tokenizer):
    messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "1 2 3"}]
    ids, mask = encode_chat(tokenizer, Chat(messages, False, "test", "here:1"))
    assert [tokenizer.decode(span) for span in spans(ids, mask)] == ["1 2 3"]


def test_empty_mask_is_refused(tokenizer):
    messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": ""}]
    with pytest.raises(UserError, match="here:1: no token of the assistant"):
        encode_chat(tokenizer, Chat(messages, False, "test", "here:1"))


@pytest.mark.parametrize(
    "line, message",
    [
        ("", "empty line"),
        ("{broken", "not valid JSON"),
        ("[1]", "a JSON object was expected"),
        ('{"text": "x"}', "neither `conversations` nor `messages`"),
        ('{"messages": []}', "no turns"),
        ('{"messages": [{"role": "user"}]}', "needs `role` and `content`"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "no assistant turn"),
        ('{"messages": [{"role": "robot", "content": "hi"}]}', "unknown role 'robot'"),
        ('{"messages": [{"role": "assistant", "content": null}]}', "not a string"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    file = tmp_path / "chats.jsonl"
    file.write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(UserError, match=f"chats.jsonl:2: .*{message}"):
        read_chats(file)


def test_prompts_in_every_form(tmp_path):
    rows = [
        {"prompt": "a"},
        {"turns": ["a", "b"]},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [prompt[-1]["content"] for prompt in read_prompts(file)]
    assert asked == ["a"] * 4
    assert [len(prompt) for prompt in read_prompts(file)] == [1, 1, 2, 1]
