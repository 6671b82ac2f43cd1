"""Chats to tokens: the mask holds what the assistant wrote and its end of turn, and nothing else."""

import functools
import json
import random
import re
import shutil
import unicodedata

import pytest
from data.conftest import SPECIAL

from eagle3_xla.data.chat import ChatEncoder
from eagle3_xla.data.clean import Chat, Unusable
from eagle3_xla.data.config import DataConfig
from eagle3_xla.data.tokenizer import TODAY, answer_of, load_tokenizer, stop_token_ids

WORDS = (
    "Hello world 12 3.14 naïve 你好 🙂👩‍🔬 <b>html</b> def\tf(x): `code` assistant user system -- ... \n \n\n     \r\n "
    "| end <|y|> e\u0301 \u200b ```python\nprint(1)\n``` {json: [1]} $x^2$"
).split(" ")
END = {name: stops[0] for name, (_, stops) in SPECIAL.items()}
END |= {"qwen2.5": "<|im_end|>", "smollm2": "<|im_end|>", "phi-3": "<|end|>"}


def random_text(rng: random.Random) -> str:
    return "".join(rng.choice(WORDS) + rng.choice(["", " ", " ", "\n"]) for _ in range(rng.randint(1, 12)))


def random_chat(rng: random.Random, turns: int = 0) -> Chat:
    messages = [{"role": "system", "content": random_text(rng)}] if rng.random() < 0.3 else []
    for _ in range(turns or rng.randint(1, 5)):
        for role in ("user", "assistant"):
            text = ""
            while not text.strip():
                text = random_text(rng)
            messages.append({"role": role, "content": text})
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


tokenizer_of = functools.cache(load_tokenizer)  # seconds for each


def encoder(folder, **settings) -> ChatEncoder:
    tokenizer = tokenizer_of(str(folder))
    return ChatEncoder(tokenizer, stop_token_ids(str(folder), tokenizer), DataConfig(row_length=2048, **settings))


def shown(family: str, answer: str, last: bool, ends: bool = True) -> str:
    """An answer as the family's template shows it, with the end of its turn."""
    if family.startswith(("llama-3", "gemma")):
        answer = answer.strip()
    if family == "qwen3" and last:
        answer = answer.lstrip("\n")
    answer = {"gpt-oss": "<|channel|>final<|message|>", "mistral": " "}.get(family, "") + answer
    if ends and (last or family != "gpt-oss"):  # gpt-oss ends earlier answers by <|end|>, which the model doesn't write
        answer += END[family]
    return answer if family == "smollm2" else unicodedata.normalize("NFC", answer)  # the tokenizer's own normaliser


@pytest.mark.parametrize("family", sorted(END))
def test_mask_is_the_assistant_and_its_end_of_turn(family, template_targets):
    rng, coder = random.Random(family), encoder(template_targets[family])
    chats = [random_chat(rng) for _ in range(200)]
    for chat, encoded in zip(chats, coder.encode(chats), strict=True):
        answers = [m["content"] for m in chat.messages if m["role"] == "assistant"]
        expected = [shown(family, a, a is answers[-1]) for a in answers]
        assert [coder.tokenizer.decode(span) for span in spans(encoded.ids, encoded.mask)] == expected
        whole = coder.tokenizer.apply_chat_template(chat.messages, tokenize=False, strftime_now=TODAY.strftime)
        if family == "phi-3":  # the whitespace after a special token is its own, where both are one piece
            whole = re.sub(r"(<\|(?:user|system|end)\|>)\s+|(<\|assistant\|>)\n", r"\1\2", whole)
        assert coder.tokenizer.decode(encoded.ids) == (
            whole if family == "smollm2" else unicodedata.normalize("NFC", whole)
        )


@pytest.mark.parametrize("family", sorted(END))
def test_ids_are_the_templates_own(family, template_targets):
    """Where no answer starts with the whitespace that ends the prompt, the ids equal the whole chat's."""
    rng, coder = random.Random(1), encoder(template_targets[family])
    chats = [random_chat(rng) for _ in range(50)]
    for chat in chats:
        chat.messages = [m | {"content": f"A {m['content']} z"} for m in chat.messages]
    for chat, encoded in zip(chats, coder.encode(chats), strict=True):
        whole = coder.tokenizer.apply_chat_template(chat.messages, strftime_now=TODAY.strftime)
        assert encoded.ids.tolist() == whole


def test_qwen25_default_system_prompt_is_in_the_prompt(template_targets):
    coder = encoder(template_targets["qwen2.5"])
    [encoded] = coder.encode([random_chat(random.Random(5), turns=1)])
    assert coder.tokenizer.decode(encoded.ids).startswith("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud.")
    assert not encoded.mask[:20].any()


def test_qwen3_thoughts(template_targets):
    """The last answer's own thought is trained on; an earlier one, which the template leaves out, masks its answer."""
    coder = encoder(template_targets["qwen3"])
    thought = "<think>\nhm\n</think>\n\n"
    turns = [("user", "a"), ("assistant", f"{thought}b"), ("user", "c"), ("assistant", f"{thought}d")]
    [encoded] = coder.encode([Chat([{"role": r, "content": c} for r, c in turns], True, "t", "here:1")])
    assert [coder.tokenizer.decode(s) for s in spans(encoded.ids, encoded.mask)] == [f"{thought}d<|im_end|>"]


def test_last_turn_only(template_targets):
    for family, folder in template_targets.items():
        coder = encoder(folder, last_turn_only=True)
        chat = random_chat(random.Random(2), turns=3)
        [encoded] = coder.encode([chat])
        text = shown(family, chat.messages[-1]["content"], True)
        assert [coder.tokenizer.decode(s) for s in spans(encoded.ids, encoded.mask)] == [text]
    coder = encoder(template_targets["qwen2.5"], last_turn_only=True)
    coder.data.row_length = 48
    turns = [("user", "a"), ("assistant", "b " * 1000), ("user", "c"), ("assistant", "d")]
    chat = Chat([{"role": role, "content": content} for role, content in turns], True, "test", "here:1")
    assert [item.reason for item in coder.encode([chat])] == ["answer_after_row_length"]  # no earlier one instead


@pytest.mark.parametrize("family", sorted(END))
def test_cutting_keeps_the_mask_right(family, template_targets):
    length = 112 if family == "gpt-oss" else 64  # its system prompt alone is longer
    chats = [random_chat(random.Random(i), turns=4) for i in range(30)]
    whole = encoder(template_targets[family]).encode(chats)
    cut = encoder(template_targets[family])
    cut.data.row_length = length
    for full, short in zip(whole, cut.encode(chats)):
        if isinstance(short, Unusable):
            assert short.reason == "answer_after_row_length" and full.mask[:length].sum() < 2
            continue
        assert short.cut == (len(full.ids) > length)
        assert short.ids.tolist() == full.ids[:length].tolist() and short.mask.tolist() == full.mask[:length].tolist()
    cut.data.too_long = "turn"
    ends = [END[family]]
    kept = [item for item in cut.encode(chats) if not isinstance(item, Unusable)]
    assert 0 < len(kept) and all(len(item.ids) <= length for item in kept)
    assert family == "gpt-oss" or all(cut.tokenizer.decode(item.ids[-1:]) in ends for item in kept if item.cut)


def test_system_prompts_dropped_and_varied(template_targets):
    chats = [random_chat(random.Random(i), turns=1) for i in range(200)]
    chats = [chat for chat in chats if chat.messages[0]["role"] == "user"]
    starts = {"qwen2.5": "<|im_start|>user", "smollm2": "<|im_start|>user"}
    for family, start in starts.items():
        coder = encoder(template_targets[family], drop_system=0.3, vary_system=0.3)
        texts = [coder.tokenizer.decode(item.ids) for item in coder.encode(chats)]
        dropped = sum(text.startswith(start) for text in texts)
        varied = sum(any(f"system\n{p}<|im_end|>" in text for p in coder.data.system_prompts) for text in texts)
        assert 0.2 < dropped / len(chats) < 0.4 and 0.2 < varied / len(chats) < 0.4
        for chat, item in zip(chats, coder.encode(chats)):
            answer = shown(family, chat.messages[-1]["content"], True)
            assert [coder.tokenizer.decode(s) for s in spans(item.ids, item.mask)] == [answer]
    # With tools the template's system turn holds them too, and stays whole.
    tool = {"type": "function", "function": {"name": "add", "description": "d", "parameters": {"type": "object"}}}
    coder = encoder(template_targets["qwen2.5"], drop_system=1.0)
    [item] = coder.encode([Chat(chats[0].messages, True, "test", "here:1", tools=[tool])])
    assert coder.tokenizer.decode(item.ids).startswith("<|im_start|>system\nYou are Qwen")
    coder = encoder(template_targets["llama-3"], drop_system=1.0)  # no default system prompt: nothing to drop but it
    assert coder.tokenizer.decode(coder.encode(chats)[0].ids).startswith("<|begin_of_text|><|start_header_id|>user")


def test_cut_answer_does_not_end_its_turn(template_targets):
    messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "1 2 🙂"}]
    for family, folder in template_targets.items():
        coder = encoder(folder)
        [encoded] = coder.encode([Chat(messages, False, "test", "here:1")])
        expected = shown(family, "1 2 🙂", True, ends=False)
        assert [coder.tokenizer.decode(s) for s in spans(encoded.ids, encoded.mask)] == [expected]


def test_tool_turns_are_context(template_targets):
    tool = {"type": "function", "function": {"name": "add", "description": "d", "parameters": {"type": "object"}}}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ]
    coder = encoder(template_targets["qwen2.5"], tool_turns="keep")
    [encoded] = coder.encode([Chat(messages, True, "test", "here:1", tools=[tool])])
    first, second = [coder.tokenizer.decode(s) for s in spans(encoded.ids, encoded.mask)]
    assert '{"name": "add", "arguments": {"a": 1}}' in first and first.endswith("<|im_end|>")
    assert second == "It is 2.<|im_end|>"
    assert '"description": "d"' in coder.tokenizer.decode(encoded.ids)


def test_what_a_template_cannot_show_is_left_out(template_targets):
    coder = encoder(template_targets["smollm2"])
    empty = Chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}], False, "test", "here:1")
    assert coder.encode([empty])[0].reason == "no_answer_tokens"
    coder.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    assert "roles must alternate" in str(coder.encode([empty])[0])


def test_a_tokenizer_saved_with_truncation_padding_and_clean_up(tokenizer_folder, tmp_path):
    """As `save_pretrained` leaves it after a call with padding=True, truncation=True; Llama 3's own cleans up."""
    saved = tmp_path / "target"
    shutil.copytree(tokenizer_folder, saved)
    whole = load_tokenizer(str(saved))
    whole(["a", "b c"], padding=True, truncation=True, max_length=8)
    whole.save_pretrained(saved)
    stored = json.loads((saved / "tokenizer.json").read_text())
    assert stored["truncation"] and stored["padding"]
    config = json.loads((saved / "tokenizer_config.json").read_text())
    (saved / "tokenizer_config.json").write_text(json.dumps(config | {"clean_up_tokenization_spaces": True}))
    chats = [random_chat(random.Random(i), turns) for i, turns in enumerate((1, 4))]
    for found, expected in zip(encoder(saved).encode(chats), encoder(tokenizer_folder).encode(chats), strict=True):
        assert found.ids.tolist() == expected.ids.tolist() and found.mask.tolist() == expected.mask.tolist()
    text = "a != b . It 's"
    assert answer_of(load_tokenizer(str(saved)), whole(text)["input_ids"]) == (text, "")
