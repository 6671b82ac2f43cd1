"""What single published templates do: thoughts, channels, folded system turns, dates, tool calls."""

import asyncio
import json
import shutil
from collections import Counter

import pytest
from data.test_chat import encoder, spans
from target.family_models import CONFIGS
from transformers import GptOssConfig, GptOssForCausalLM

from eagle3_xla.data.clean import Chat, Unusable, clean
from eagle3_xla.data.config import DataConfig
from eagle3_xla.data.tokenizer import shows_reasoning
from eagle3_xla.regenerate.conversation import Sampling, rewrite
from eagle3_xla.regenerate.local import LocalTarget

TOOL = {"type": "function", "function": {"name": "add", "description": "d", "parameters": {"type": "object"}}}


def masked(coder, *turns, tools=None) -> tuple[str, list[str]]:
    """The rendered chat and what its mask holds. turns: (role, content) or messages."""
    messages = [turn if isinstance(turn, dict) else dict(zip(("role", "content"), turn)) for turn in turns]
    [encoded] = coder.encode([Chat(messages, True, "test", "here:1", tools=tools)])
    return coder.tokenizer.decode(encoded.ids), [coder.tokenizer.decode(s) for s in spans(encoded.ids, encoded.mask)]


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("b", "b<|im_end|>"),  # the empty thought before it is the prompt's, which says not to think
        ("<think>\n\n</think>\n\nb", "b<|im_end|>"),
        ("<think>\nhm\n</think>\n\nb", "<think>\nhm\n</think>\n\nb<|im_end|>"),
    ],
    ids=["without", "empty", "with"],
)
def test_qwen3_thinking(answer, expected, template_targets):
    text, answers = masked(encoder(template_targets["qwen3"]), ("user", "a"), ("assistant", answer))
    assert answers == [expected] and text.startswith("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n")


def test_gpt_oss_channels(template_targets):
    """The thought of the last answer is the assistant's; an earlier one is left out, and its answer with it."""
    coder = encoder(template_targets["gpt-oss"])
    assert shows_reasoning(coder.tokenizer)
    thought = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>"
    question = {"role": "user", "content": "a"}
    for name in ("thinking", "reasoning_content"):
        answer = {"role": "assistant", "content": "b", name: "hm"}
        for messages in ([question, answer], [question, answer, question, answer]):
            chat = clean({"messages": messages}, "here:1", "test", DataConfig(), Counter())
            assert masked(coder, *chat.messages)[1] == [thought]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    answer = {"role": "assistant", "content": "I add.", "reasoning_content": "hm", "tool_calls": [call]}
    assert "hm" not in masked(coder, question, answer)[0]  # the template takes one of the two


@pytest.mark.parametrize("prompted", ["", "<think>\n"], ids=["opened by the answer", "by the prompt"])
def test_a_thought_that_was_cut_off_is_shown_as_it_was_written(prompted, template_targets, monkeypatch):
    """Not after an empty thought, as Qwen3's template has it; the prompt of its thinking models opens the thought."""
    coder = encoder(template_targets["qwen3"])
    if prompted:
        history = coder.tokenizer.chat_template.partition("{%- if add_generation_prompt %}")[0]
        prompt = "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
        monkeypatch.setattr(coder.tokenizer, "chat_template", history + prompt)
    written = "<think>\nOkay, let".removeprefix(prompted)
    turns = [("user", "b"), ("assistant", "c"), ("user", "a"), ("assistant", written)]
    messages = [{"role": role, "content": content} for role, content in turns]
    for chat in (messages, messages[2:]):
        [encoded] = coder.encode([Chat(chat, False, "test", "here:1")])
        text = coder.tokenizer.decode(encoded.ids)
        assert text.endswith("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\nOkay, let")
        assert coder.tokenizer.decode(spans(encoded.ids, encoded.mask)[-1]) == written
    # With its whole thought beside it the answer itself was cut off.
    messages[-1] = {"role": "assistant", "content": "It is", "reasoning_content": "Okay."}
    [encoded] = coder.encode([Chat(messages, False, "test", "here:1")])
    masked = coder.tokenizer.decode(spans(encoded.ids, encoded.mask)[-1])
    assert masked == "<think>\nOkay.\n</think>\n\nIt is".removeprefix(prompted)


def test_an_answer_ends_after_its_text_not_within_its_thought(template_targets):
    coder = encoder(template_targets["qwen3"])
    answer = {"role": "assistant", "content": "4", "reasoning_content": "say 4 <|im_end|> then"}
    [encoded] = coder.encode([Chat([{"role": "user", "content": "a"}, answer], True, "test", "here:1")])
    [masked] = spans(encoded.ids, encoded.mask)
    assert coder.tokenizer.decode(masked) == "<think>\nsay 4 <|im_end|> then\n</think>\n\n4<|im_end|>"


def test_gpt_oss_answers_of_regenerate(template_targets, tmp_path):
    """In this process: what it writes becomes a row whose mask holds just that, or is refused."""
    coder = encoder(template_targets["gpt-oss"])
    shutil.copytree(template_targets["gpt-oss"], tmp_path / "target")
    sizes = {"vocab_size": len(coder.tokenizer), "hidden_size": 16, "intermediate_size": 16}
    model = GptOssForCausalLM(GptOssConfig(**CONFIGS["gpt_oss"].to_dict() | sizes))
    model.generation_config.eos_token_id = coder.tokenizer.convert_tokens_to_ids(["<|return|>", "<|call|>"])
    model.save_pretrained(tmp_path / "target")
    greets = "<|channel|>analysis<|message|>We greet.<|end|><|start|>assistant"
    answers = {  # what it writes -> (its text, its thoughts)
        f"{greets}<|channel|>final<|message|>Hello!<|return|>": ("Hello!", "We greet."),
        "<|channel|>final<|message|>Hello!<|return|>": ("Hello!", ""),
        f"{greets}<|channel|>final<|message|>Hel": ("Hel", "We greet."),
        "<|channel|>analysis<|message|>We greet": None,
        "<|channel|>commentary to=functions.add<|message|>{}<|call|>": None,
    }

    async def rows():
        asked = Chat([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}], True, "test", "here:1")
        async with LocalTarget(str(tmp_path / "target"), Sampling(0.0), 1, "cpu") as local:
            for written, expected in answers.items():
                tokens = coder.tokenizer(written, add_special_tokens=False)["input_ids"]
                local._choose = lambda logits, of, tokens=tokens: [tokens[len(question.tokens)] for question in of]
                local.sampling.max_tokens = len(tokens)
                if expected:
                    yield written, expected, await rewrite(asked, 0, 0, local.ask)
                    continue
                with pytest.raises(Unusable, match="the target answers nothing( but a thought)? within"):
                    await rewrite(asked, 0, 0, local.ask)

    async def read():
        return [each async for each in rows()]

    for written, expected, row in asyncio.run(read()):
        chat = clean(row, "here:1", "test", DataConfig(), Counter())
        assert (chat.messages[1]["content"], chat.messages[1].get("reasoning_content", "")) == expected
        [encoded] = coder.encode([chat])
        assert [coder.tokenizer.decode(s) for s in spans(encoded.ids, encoded.mask)] == [written]


def test_gemma_folds_the_system_turn(template_targets):
    text, answers = masked(encoder(template_targets["gemma-3"]), ("system", "s"), ("user", "a"), ("assistant", " b "))
    assert text == "<bos><start_of_turn>user\ns\n\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n"
    assert answers == ["b<end_of_turn>"]


def test_mistral_has_no_generation_prompt(template_targets):
    text, answers = masked(encoder(template_targets["mistral"]), ("user", "a"), ("assistant", "b"))
    assert text == "<s> [INST] a [/INST] b</s>" and answers == [" b</s>"]


def test_a_system_turn_that_is_shown_at_an_open_question_alone(template_targets, monkeypatch):
    """As Mistral's of 7B v0.3 and Nemo: with its answer, a chat is shown without its system turn."""
    template = """{%- set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}
    {{- bos_token }}{%- for message in (messages[1:] if system else messages) %}
    {%- if message.role == 'user' %}{{ '[INST] ' + (system if loop.last else '') + message.content + '[/INST]' }}
    {%- else %}{{ ' ' + message.content + eos_token }}{%- endif %}{%- endfor %}"""
    coder = encoder(template_targets["mistral"])
    monkeypatch.setattr(coder.tokenizer, "chat_template", template)
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    assert masked(coder, *turns) == ("<s>[INST] a[/INST] b</s>[INST] c[/INST] d</s>", [" b</s>", " d</s>"])
    assert masked(coder, ("system", "s"), *turns[:2]) == ("<s>[INST] s\n\na[/INST] b</s>", [" b</s>"])
    # The first answer was not given to what stands before it here.
    expected = "<s>[INST] a[/INST] b</s>[INST] s\n\nc[/INST] d</s>"
    assert masked(coder, ("system", "s"), *turns) == (expected, [" d</s>"])


@pytest.mark.parametrize("family, date", [("llama-3.1", "26 Jul 2024"), ("llama-3.2", "26 Jul 2024")])
def test_llama_has_a_pinned_date(family, date, template_targets):
    assert f"Today Date: {date}" in masked(encoder(template_targets[family]), ("user", "a"), ("assistant", "b"))[0]


def test_gpt_oss_has_a_pinned_date(template_targets):
    text, _ = masked(encoder(template_targets["gpt-oss"]), ("user", "a"), ("assistant", "b"))
    assert "Current date: 2024-07-26" in text


@pytest.mark.parametrize(
    "family, first, second",
    [
        ("qwen3", '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>', "2<|im_end|>"),
        ("llama-3.1", '{"name": "add", "parameters": {"a": 1}}<|eot_id|>', "2<|eot_id|>"),
        ("llama-3.2", '{"name": "add", "parameters": {"a": 1}}<|eot_id|>', "2<|eot_id|>"),
        (
            "gpt-oss",
            ' to=functions.add<|channel|>commentary json<|message|>{"a": 1}<|call|>',
            "<|channel|>final<|message|>2<|return|>",
        ),
    ],
)
def test_tool_calls_are_the_assistants(family, first, second, template_targets):
    """As objects and, as OpenAI's API and many sets have them, as JSON text."""
    coder, keep = encoder(template_targets[family], tool_turns="keep"), DataConfig(tool_turns="keep")
    for form in (lambda value: value, json.dumps):
        call = {"type": "function", "function": {"name": "add", "arguments": form({"a": 1})}}
        messages = [
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "2"},
        ]
        chat = clean({"messages": messages, "tools": form([TOOL])}, "here:1", "test", keep, Counter())
        text, answers = masked(coder, *chat.messages, tools=chat.tools)
        assert answers == [first, second]
        assert ("type add" if family == "gpt-oss" else '"description": "d"') in text
