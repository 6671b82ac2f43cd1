"""The forms of chats that people bring, and answers with thoughts."""

import json
import shutil
from collections import Counter

import pytest
from data.test_surprises import chats, recipe, write

from eagle3_xla.data.chat import ChatEncoder
from eagle3_xla.data.clean import Chat, Unusable, clean
from eagle3_xla.data.config import DataConfig
from eagle3_xla.data.prepare import load_prepared, prepare
from eagle3_xla.data.tokenizer import shows_reasoning, stop_token_ids
from eagle3_xla.errors import UserError

QUESTION, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
FORMS = [
    ({"prompt": "q", "completion": "a"}, [QUESTION, ANSWER]),
    ({"prompt": [SYSTEM, QUESTION], "completion": [ANSWER]}, [SYSTEM, QUESTION, ANSWER]),
    ({"prompt": [QUESTION], "completion": "a"}, [QUESTION, ANSWER]),
    ({"prompt": [QUESTION, ANSWER, QUESTION], "completion": [ANSWER]}, [QUESTION, ANSWER, QUESTION, ANSWER]),
    ({"instruction": "q", "output": "a"}, [QUESTION, ANSWER]),
    ({"instruction": "q", "input": "", "output": "a"}, [QUESTION, ANSWER]),
    ({"instruction": "q", "input": None, "output": "a"}, [QUESTION, ANSWER]),
    ({"instruction": "q", "input": "i", "output": "a"}, [{"role": "user", "content": "q\n\ni"}, ANSWER]),
    ({"messages": [{"role": "developer", "content": "s"}, QUESTION, ANSWER]}, [SYSTEM, QUESTION, ANSWER]),
    ({"messages": [QUESTION, ANSWER | {"reasoning_content": "r"}]}, [QUESTION, ANSWER | {"reasoning_content": "r"}]),
    ({"messages": [QUESTION, ANSWER | {"reasoning_content": ""}]}, [QUESTION, ANSWER]),
    ({"messages": None, "prompt": "q", "completion": "a"}, [QUESTION, ANSWER]),
]


@pytest.mark.parametrize("row, messages", FORMS)
def test_forms(row, messages):
    assert clean(row, "here:1", "test", DataConfig(), Counter()).messages == messages


@pytest.mark.parametrize(
    "row, error, message",
    [
        ({"prompt": "q"}, UserError, "here:1: neither `conversations` nor `messages` nor `prompt` with `completion`"),
        ({"instruction": "q"}, UserError, "`instruction` with `output` in this row"),
        ({"prompt": 5, "completion": "a"}, Unusable, "the text of a user turn is int"),
        ({"prompt": "q", "completion": ["a"]}, Unusable, "a turn without `role`"),
        ({"prompt": "q", "completion": []}, Unusable, "no question with an answer"),
        ({"instruction": {"a": 1}, "output": "a"}, Unusable, "the text of a user turn is dict"),
        ({"instruction": "q", "output": None}, Unusable, "no question with an answer"),
        ({"messages": [QUESTION, ANSWER | {"reasoning_content": 5}]}, Unusable, "assistant turn is int"),
        ({"messages": [QUESTION, ANSWER | {"reasoning_content": "\ud800"}]}, Unusable, "half characters"),
    ],
)
def test_forms_that_are_none(row, error, message):
    with pytest.raises(error, match=message):
        clean(row, "here:1", "test", DataConfig(), Counter())


def test_all_forms_in_one_file(small_target, tmp_path):
    rows = chats(4) + [{"instruction": f"Say {n}.", "input": "", "output": f"Here is {n} for you."} for n in range(4)]
    rows += [{"messages": [{"role": "developer", "content": f"Be {n}."}, QUESTION, ANSWER]} for n in range(4)]
    chosen = recipe(small_target, tmp_path / "data", write(tmp_path / "a.jsonl", rows), "data.deduplicate=none")
    manifest = prepare(chosen)
    assert manifest["sources"][0]["kept"] == 12 and manifest["sources"][0]["dropped"] == {}


# Shows the thoughts of the last answer alone, as reasoning models' templates do.
SHOWS = """{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.reasoning_content and loop.last -%}{{- '<think>' + m.reasoning_content + '</think>' -}}{%- endif -%}
{{- m.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


def test_thoughts_are_kept_where_the_template_shows_them(small_target, tokenizer, tmp_path):
    turns = [QUESTION, {"role": "assistant", "content": "One it is.", "reasoning_content": "Hm."}]
    turns += [QUESTION, {"role": "assistant", "content": "Two it is.", "reasoning_content": "Let me think."}]
    rows = [{"messages": turns}, *chats(5)]
    file = write(tmp_path / "a.jsonl", rows)
    manifest = prepare(recipe(small_target, tmp_path / "plain", file, "data.heldout_share=0"))
    assert manifest["sources"][0]["with_reasoning"] == 1
    [warning] = manifest["warnings"]
    assert "a: 1 conversations have reasoning_content, which the target's chat template does not show" in warning

    target = shutil.copytree(small_target, tmp_path / "target")
    (target / "chat_template.jinja").write_text(SHOWS)
    manifest = prepare(recipe(target, tmp_path / "shown", file, "data.heldout_share=0"))
    assert manifest["warnings"] == [] and manifest["sources"][0]["with_reasoning"] == 1
    ids = load_prepared(str(tmp_path / "shown"))[0][:]["input_ids"]
    assert "<think>Let me think.</think>Two it is." in tokenizer.decode(ids.reshape(-1))

    # The first answer, shown without its thoughts, is nothing that the target would write there: not trained on.
    own = json.loads(json.dumps(turns))
    tokenizer = type(tokenizer).from_pretrained(target)
    assert shows_reasoning(tokenizer)
    encoder = ChatEncoder(tokenizer, stop_token_ids(str(target), tokenizer), DataConfig(row_length=128))
    [encoded] = encoder.encode([Chat(own, True, "test", "here:1")])
    assert tokenizer.decode(encoded.ids[encoded.mask]) == "<think>Let me think.</think>Two it is.<|im_end|>"
