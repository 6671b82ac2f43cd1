"""The mix: shares, caps, seed, duplicates, evaluation prompts, the split; caches, interruptions, numbers of workers."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from eagle3_xla.config import load_recipe
from eagle3_xla.data import documents, filters, mix, prepare, spool
from eagle3_xla.data.config import DataConfig, Source
from eagle3_xla.data.evaluations import Evaluations
from eagle3_xla.data.spool import read_chat
from eagle3_xla.errors import UserError

WORDS = [f"word{i}" for i in range(4000)]


def text(seed, words=60) -> list[str]:
    return random.Random(seed).choices(WORDS, k=words)


def chat(question: str, answer: str, **more) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]} | more


def random_chats(count, name) -> list[dict]:
    return [chat(f"{name} {i}?", " ".join(text(f"{name} {i}"))) for i in range(count)]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def three(tmp_path) -> list[Path]:
    return [write(tmp_path / f"{name}.jsonl", random_chats(300, name)) for name in ("one", "two", "three")]


def mixed(tmp_path, sources, **settings) -> mix.Mix:
    data = DataConfig(train=sources, **({"workers": 1} | settings))
    work = tmp_path / f"work-{time.monotonic_ns()}"
    return mix.mix(data, work)


def questions(chats) -> list[str]:
    return [read_chat(path, offset).messages[0]["content"] for path, offset in chats]


def test_shares_of_the_reference_recipe(three, tmp_path):
    sources = [Source(path=str(path), share=share) for path, share in zip(three, (45, 35, 20))]
    result = mixed(tmp_path, sources, conversations=200, heldout_share=0.1)
    asked = questions(result.train), questions(result.heldout)
    names = [[question.split()[0] for question in part] for part in asked]
    assert [sum(part.count(name) for part in names) for name in ("one", "two", "three")] == [90, 70, 40]
    assert [names[1].count(name) for name in ("one", "two", "three")] == [9, 7, 4]
    assert len(set(asked[0]) | set(asked[1])) == 200  # no conversation twice, none in both
    assert names[0][:20] != sorted(names[0][:20])  # shuffled over the sources

    again, other = (questions(mixed(tmp_path, sources, conversations=200, seed=seed).train) for seed in (0, 1))
    assert again == questions(mixed(tmp_path, sources, conversations=200).train)
    assert set(again) != set(other)


def test_the_shipped_reference_recipe_has_the_mix():
    data = load_recipe("qwen2.5-7b-v4-32", []).data
    assert [(source.path, source.share) for source in data.train] == [
        ("sharegpt", 45),
        ("ultrachat", 35),
        ("perfectblend", 20),
    ]
    assert data.conversations == 54_000 and mix._wanted(data) == [24_300, 18_900, 10_800]


def test_caps_and_what_is_missing(three, tmp_path):
    sources = [Source(path=str(three[0]), cap=50), Source(path=str(three[1]))]
    names = [q.split()[0] for q in questions(mixed(tmp_path, sources, heldout_share=0).train)]
    assert (names.count("one"), names.count("two")) == (50, 300)
    shared = [Source(path=str(three[0]), share=80), Source(path=str(three[1]), share=20, read=30)]
    result = mixed(tmp_path, shared, conversations=500, heldout_share=0)
    assert result.warnings == [
        "one has 300 usable conversations of the 400 of its share",
        "two has 30 usable conversations of the 100 of its share",
    ]


def test_duplicates(tmp_path):
    base = text("base", 200)
    near, far = list(base), list(base)
    near[100] = "other"  # 5 of 196 five-word shingles change
    for i in range(0, 200, 20):
        far[i] = "other"  # about a quarter: Jaccard 0.6
    rows = [
        chat("q", " ".join(base)),
        chat("q", " ".join(base)),
        chat("q", " ".join(near)),
        chat("q", " ".join(far)),
        chat("q", " ".join(base).upper()),
        {"messages": [{"role": "system", "content": "Be kind."}, *chat("q", " ".join(base))["messages"]]},
        chat("Hi", "Hello."),
        chat("Hi", "Hello."),
        chat("Hi", "Hello!"),
    ]
    path = write(tmp_path / "a.jsonl", rows)
    expected = {
        "near": (4, {"duplicate": 3, "near_duplicate": 2}),
        "exact": (6, {"duplicate": 3}),
        "none": (9, {}),
    }
    for how, (kept, dropped) in expected.items():
        result = mixed(tmp_path, [Source(path=str(path))], deduplicate=how, heldout_share=0)
        [report] = result.sources.values()
        assert {reason: entry["rows"] for reason, entry in report["dropped"].items()} == dropped, how
        assert report["kept"] == kept == len(result.train)
    calls = []
    for place in ("Oslo", "Rome", "Oslo"):
        call = {"type": "function", "function": {"name": "weather", "arguments": {"place": text(place, 30)}}}
        calls.append(chat("How is the weather there now?", ""))
        calls[-1]["messages"][1]["tool_calls"] = [call]
    path = write(tmp_path / "calls.jsonl", calls)
    for how in ("near", "exact"):
        made = mixed(tmp_path, [Source(path=str(path))], tool_turns="keep", deduplicate=how, heldout_share=0)
        assert len(made.train) == 2
    # What a row may hold is compared, not only its first 2,000 words.
    beginning = " ".join(text("document", 2_000))
    long = [chat(beginning, " ".join(text(f"answer{i}", 4_000))) for i in range(3)]
    path = write(tmp_path / "long.jsonl", long)
    for row_length, kept in ((16_384, 3), (1_024, 1)):
        result = mixed(tmp_path, [Source(path=str(path))], row_length=row_length, heldout_share=0)
        assert len(result.train) == kept
    path = tmp_path / "a.jsonl"
    # A duplicate in another source, or in the held-out file, goes from the later source.
    other = write(tmp_path / "b.jsonl", [rows[0], chat("new", "New one.")])
    result = mixed(tmp_path, [Source(path=str(path)), Source(path=str(other))], heldout_share=0)
    assert [report["kept"] for report in result.sources.values()] == [4, 1]
    result = mixed(tmp_path, [Source(path=str(path))], heldout=[Source(path=str(other))])
    assert [report["kept"] for report in result.sources.values()] == [2, 3] and len(result.heldout) == 2


PROMPT = "Compose an engaging travel blog post about a recent trip to Hawaii highlighting cultural experiences"
EVALUATIONS = {
    "mt_bench": {"question_id": 81, "turns": [PROMPT, "Rewrite it."]},
    "mt_bench of the hub": {"prompt_id": 81, "prompt": [PROMPT, "Rewrite it."]},
    "humaneval": {"task_id": "HumanEval/0", "prompt": f"def blog():\n    '''{PROMPT}'''"},
    "gsm8k": {"question": PROMPT, "answer": "#### 1"},
    "math500": {"problem": PROMPT, "solution": "x"},
    "alpaca": {"instruction": PROMPT, "input": "", "output": "x"},
    "chats": {"conversations": [{"from": "human", "value": PROMPT}, {"from": "gpt", "value": "x"}]},
}


@pytest.mark.parametrize("form", sorted(EVALUATIONS))
def test_evaluation_prompts_are_kept_out(form, tmp_path):
    short = {"turns": ["Who are you?"]}
    evaluation = write(tmp_path / "eval.jsonl", [EVALUATIONS[form], short])
    rows = [
        chat(f"Please: {PROMPT.lower()}!", "Aloha."),
        chat("Hi", f"You could ask me to {PROMPT}."),
        chat("who are you", "A model."),
        chat("Who are you and what do you do?", "A model."),
        chat("Compose an engaging travel blog post about a trip to Norway highlighting food", "Hei."),
    ]
    path = write(tmp_path / "a.jsonl", rows)
    result = mixed(tmp_path, [Source(path=str(path))], decontaminate=[str(evaluation)], heldout_share=0)
    [report] = result.sources.values()
    assert report["dropped"]["evaluation_prompt"] == {"rows": 3, "first": f"{path}:1"}
    assert sorted(questions(result.train)) == sorted(row["messages"][0]["content"] for row in rows[3:])
    with pytest.raises(UserError, match=r"a.jsonl:1: no evaluation prompt|bad.jsonl:1: no evaluation prompt"):
        Evaluations([str(write(tmp_path / "bad.jsonl", [{"text": "a"}]))])


def settings_of(tmp_path, target, files, **more):
    data = {"prepared": tmp_path / "prepared", "row_length": 128, "draft_vocab_size": 64, "workers": 1} | more
    sources = ",".join(map(str, files))
    return [f"target.path={target}", f"data.train=[{sources}]", *(f"data.{k}={v}" for k, v in data.items())]


def bytes_of(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "run.yaml"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_the_same_bytes_for_any_number_of_workers(three, small_target, tmp_path, monkeypatch):
    for module in (spool, filters):
        monkeypatch.setattr(module, "CHUNK", 100)  # several for each worker
    results = []
    for workers in (1, 2):
        settings = settings_of(tmp_path, small_target, three, workers=workers, prepared=tmp_path / f"p{workers}")
        manifest = prepare.prepare(load_recipe(None, settings))
        results.append(bytes_of(tmp_path / f"p{workers}"))
        assert manifest["train"]["padding"] < 0.03
    assert results[0] == results[1] and len(results[0]) > 5
    other = settings_of(tmp_path, small_target, three, seed=1, prepared=tmp_path / "other")
    prepare.prepare(load_recipe(None, other))
    assert bytes_of(tmp_path / "other")["manifest.json"] != results[0]["manifest.json"]


def test_an_interrupted_prepare_continues(three, small_target, tmp_path, monkeypatch, forks):
    """Killed after some chunks of tokens: what is done is not done again, and the result is that of one go."""
    settings = settings_of(tmp_path, small_target, three)
    killed = forks.run_code(KILLED_HALF_WAY, *settings)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    out = tmp_path / "prepared"
    [work] = (out / ".work").iterdir()
    chunks = {file: file.stat().st_mtime_ns for file in (work / "train").glob("chunk-*")}
    assert len(chunks) == 2 and not (out / "manifest.json").exists()
    spools = {file: file.stat().st_mtime_ns for file in work.glob("train-*/chats.jsonl")}
    assert len(spools) == 3
    again = []
    real = documents._Tokenizer.__call__
    monkeypatch.setattr(
        documents._Tokenizer, "__call__", lambda self, chunk: (again.append(chunk[0]), real(self, chunk))
    )
    monkeypatch.setattr(spool._Cleaner, "__call__", None)  # no source is read again
    monkeypatch.chdir(tmp_path)  # the same folder by another name
    prepare.prepare(load_recipe(None, [*settings, "data.prepared=prepared"]))
    assert again and not {Path(file).resolve() for file in again} & set(chunks)
    monkeypatch.undo()
    whole = settings_of(tmp_path, small_target, three, prepared=tmp_path / "whole")
    prepare.prepare(load_recipe(None, whole))
    assert bytes_of(out) == bytes_of(tmp_path / "whole")
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (out, tmp_path / "whole")]
    assert manifests[0] == manifests[1]


KILLED_HALF_WAY = """
import os, signal, sys
from eagle3_xla.config import load_recipe
from eagle3_xla.data import documents, prepare

real, done = documents._Tokenizer.__call__, []

def call(self, chunk):
    if len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, chunk)
    done.append(chunk)

documents._Tokenizer.__call__ = call
prepare.prepare(load_recipe(None, sys.argv[1:]))
"""


def test_stale_caches_are_never_reused(small_target, tmp_path, tokenizer):
    """Each thing that shapes the rows changes the key: data, template, tokenizer, length, vocabulary, code."""
    source = write(tmp_path / "a.jsonl", random_chats(20, "a"))
    evaluation = write(tmp_path / "eval.jsonl", [{"prompt": "a b c"}])
    target = shutil.copytree(small_target, tmp_path / "target")

    def inputs(**more):
        return prepare.prepare(load_recipe(None, settings_of(tmp_path, target, [source], **more)))["inputs"]

    seen = [inputs()]
    assert inputs(workers=2) == inputs() == seen[0]
    changes = [{"row_length": 96}, {"draft_vocab_size": 65}, {"seed": 1}, {"last_turn_only": True}, {"max_tokens": 500}]
    seen += [inputs(**change) for change in [*changes, {"decontaminate": f"[{evaluation}]"}]]
    write(evaluation, [{"prompt": "a b d"}])
    seen.append(inputs(decontaminate=f"[{evaluation}]"))
    with source.open("a") as file:
        file.write(json.dumps(chat("one more?", "Yes, one more.")) + "\n")
    seen.append(inputs())
    stat = source.stat()
    content = source.read_text().replace("one more.", "two more.")
    source.write_text(content)
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time, other words
    seen.append(inputs())
    template = target / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>", "<|im_end|> "))
    seen.append(inputs())
    tokens = json.loads((target / "tokenizer.json").read_text())
    tokens["normalizer"] = {"type": "NFC"}
    (target / "tokenizer.json").write_text(json.dumps(tokens))
    seen.append(inputs())
    assert len(set(seen)) == len(seen)


GSM8K = {
    "question": "Natalia sold clips to 48 of her friends in April, and half as many in May. How many in all?",
    "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips in May. Natalia sold 48+24 = <<48+24=72>>72 clips.\n#### 72",
}
CHINESE = {"turns": ["请写一首关于秋天落叶的短诗", "长" * 30]}
# (evaluation row, what somebody says, whether it is found)
FOUND = [
    (
        {"prompt": "What is the tallest mountain on Mars?"},
        "I wonder: what is the TALLEST mountain on Mars? Thanks",
        True,
    ),
    ({"prompt": "What is the tallest mountain on Mars?"}, "What is the tallest mountain on Earth?", False),
    ({"prompt": "Who are you?"}, "who are YOU", True),
    ({"prompt": "Who are you?"}, "Who are you to say so?", False),
    ({"prompt": "ｗｈｏ ａｒｅ ｙｏｕ"}, "Who are you?", True),
    (CHINESE, "请问，你能不能请写一首关于秋天落叶的短诗？谢谢", True),
    (CHINESE, "请写一首关于春天花开的短诗", False),
    (CHINESE, "长" * 26, True),
    (CHINESE, "长" * 24, False),
    ({"prompt": "กรุณาเขียนบทกวีสั้นเกี่ยวกับฤดูฝน"}, "สวัสดี กรุณาเขียนบทกวีสั้นเกี่ยวกับฤดูฝน ขอบคุณ", True),
    (GSM8K, "Let me see. Natalia sold 48/2 = 24 clips in May. Natalia sold 48+24 = 72 clips. So 72.", True),
    (GSM8K, "Natalia sold 48/2 = <<48/2=24>>24 clips in May. Natalia sold 48+24 = <<48+24=72>>72 clips.", True),
    (GSM8K, "72", False),
    (
        {"problem": "Find x.", "solution": "We add one to two and we take three away from it, so x is none."},
        "x is none",
        False,
    ),
    ({"prompt": "a?", "canonical_solution": " ".join(map(str, range(20)))}, " ".join(map(str, range(3, 18))), True),
]


@pytest.mark.parametrize("row, said, expected", FOUND, ids=[said[:30] for _, said, _ in FOUND])
def test_evaluation_texts_are_found(row, said, expected, tmp_path):
    evaluations = Evaluations([str(write(tmp_path / "eval.jsonl", [{"prompt": "Something else entirely."}, row]))])
    assert evaluations.find(["Hello there.", said]) == ({1} if expected else set())


def test_the_manifest_says_how_many_were_found(small_target, tmp_path):
    first = write(tmp_path / "one.jsonl", [{"prompt": f"What is the square of the number {n}?"} for n in range(5)])
    second = write(tmp_path / "two.jsonl", [GSM8K, {"prompt": "unseen in any chat at all"}])
    third = write(tmp_path / "three.jsonl", [{"prompt": "What is the square of the number 3?"}])  # as in one.jsonl
    rows = [chat("I ask: what is the square of the number 3?", f"{n * n} it is.") for n in range(4)]
    rows += [chat("What is the square of the number 4?", GSM8K["answer"]), *random_chats(5, "other")]
    source = write(tmp_path / "chats.jsonl", rows)
    settings = settings_of(
        tmp_path, small_target, [source], decontaminate=f"[{first},{second},{third}]", heldout_share=0
    )
    manifest = prepare.prepare(load_recipe(None, settings))
    assert manifest["evaluations"] == [
        {"name": "one.jsonl", "rows": 5, "found": 2, "conversations": 5},
        {"name": "two.jsonl", "rows": 2, "found": 1, "conversations": 1},
        {"name": "three.jsonl", "rows": 1, "found": 1, "conversations": 4},
    ]
    assert manifest["sources"][0]["dropped"]["evaluation_prompt"]["rows"] == 5 and manifest["train"]["chats"] == 5
