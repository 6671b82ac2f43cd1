"""Evaluation prompts in every form, and sets by name."""

import json

import pytest

from eagle3_xla.data.prompts import fingerprint, read_prompts
from eagle3_xla.errors import UserError


def written(file, rows) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_prompts_in_every_form(tmp_path):
    rows = [
        {"prompt": "a", "source": "s"},
        {"turns": ["a", "b"], "category": "writing"},  # MT-Bench, FastChat's file
        {"prompt": ["a", "b"], "category": "writing", "prompt_id": 1},  # and the hub's
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]},
        {"conversations": [
            {"from": "human", "value": "a"}, {"from": "gpt", "value": None}, {"from": "human", "value": "b"}
        ]},
        {"prompt": "a", "task_id": "HumanEval/0", "canonical_solution": "x", "test": "t"},
        {"question": "a", "answer": "1 #### 1"},  # GSM8K
        {"problem": "a", "solution": "1", "answer": "1", "subject": "Algebra"},  # MATH500
        {"instruction": "a", "input": "", "output": "o"},  # Alpaca
        {"instruction": "a", "input": " "},
        {"instruction": "a", "input": "b", "output": "o"},
    ]  # fmt: skip
    found = read_prompts(written(tmp_path / "prompts.jsonl", rows))
    assert [prompt.messages[-1]["content"] for prompt in found] == ["a"] * 10 + ["a\n\nb"]
    assert [prompt.later for prompt in found] == [[], ["b"], ["b"], [], ["b"], *[[]] * 6]
    assert [len(prompt.messages) for prompt in found] == [1, 1, 1, 2, *[1] * 7]
    assert [prompt.category for prompt in found][:4] == ["", "writing", "writing", ""]
    assert [prompt.source for prompt in found][:2] == ["s", ""]
    assert len(read_prompts(str(tmp_path / "prompts.jsonl"), 3)) == 3


def test_prompts_are_read_as_regenerate_reads_them(tmp_path):
    parts = [{"type": "text", "text": "a"}]
    rows = [
        {"messages": [{"role": "User", "content": parts}]},
        {"conversations": [{"role": "user", "content": "a"}], "messages": None},
        {"prompt": "a", "messages": []},
        {"messages": [{"from": "Human", "value": "a"}]},
        {"messages": [{"role": "system", "content": None}, {"role": "user", "content": "a"}]},
        {"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "a"}]},
        {"prompt": "a", "messages": [
            {"role": "system", "content": "s"},
            *[{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}] * 2
        ]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": {"x": 1}}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "ipython", "content": "x"}]},
        {"messages": [{"role": "system", "content": "s"}, *[{"role": "user", "content": "a"}] * 2]},
        {"prompt": "a", "turns": ["a", "b"], "messages": None},
    ]  # fmt: skip
    found = read_prompts(written(tmp_path / "prompts.jsonl", rows))
    assert [prompt.messages[-1]["content"] for prompt in found] == ["a"] * 9 + ["a\n\na", "a"]
    assert [len(prompt.messages) for prompt in found] == [1] * 6 + [2, 1, 1, 2, 1]
    assert [prompt.later for prompt in found] == [*[[]] * 6, ["a"], [], [], [], ["b"]]
    with pytest.raises(UserError, match="prompts.jsonl:1: no question in it"):
        read_prompts(written(tmp_path / "prompts.jsonl", [{"prompt": " "}]))


def test_a_row_without_a_prompt_is_named(tmp_path):
    file = written(tmp_path / "prompts.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match="prompts.jsonl:1: no question in this row .*`question`"):
        read_prompts(file)
    for row in ({"turns": [3]}, {"instruction": 3, "input": "b"}):
        with pytest.raises(UserError, match="the text of a user turn is int, not a string"):
            read_prompts(written(tmp_path / "other.jsonl", [row]))


def test_a_set_without_a_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="openai/gsm8k.*download it and name the file"):
        fingerprint("gsm8k")
    with pytest.raises(UserError, match="no such file; sets that are known by name: mt-bench, humaneval"):
        fingerprint("mtbench")
    written(tmp_path / "gsm8k", [{"question": "a"}])  # a file of that name is what is meant
    assert fingerprint("gsm8k")["name"] == "gsm8k" and len(read_prompts("gsm8k")) == 1
