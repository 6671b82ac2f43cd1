"""The public sets in their own schemas and with their own oddities; local files of every kind."""

import gzip
import json
from collections import Counter
from dataclasses import replace

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from eagle3_xla.config import load_recipe
from eagle3_xla.data import sources
from eagle3_xla.data.clean import Chat, Unusable, clean
from eagle3_xla.data.config import DataConfig, Source
from eagle3_xla.data.files import read_rows
from eagle3_xla.data.prepare import load_prepared, prepare
from eagle3_xla.errors import UserError


def share(*turns, **more):
    return {"id": "QWJhYvA_0", "conversations": [{"from": role, "value": value} for role, value in turns]} | more


def openai(*turns, **more):
    return {"messages": [{"role": role, "content": content} for role, content in turns]} | more


# What ShareGPT's cleaned split file holds besides plain chats -> the turns that are used, or why it is left out.
SHAREGPT = [
    (share(("human", "Hi"), ("gpt", "Hello.")), "user assistant"),
    (share(("human", "Hi"), ("gpt", "Hello."), ("human", "Bye"), ("gpt", "Bye.")), "user assistant user assistant"),
    (share(("gpt", "...continued"), ("human", "Hi"), ("gpt", "Hello.")), "user assistant"),  # a split in the middle
    (share(("gpt", "only an answer")), "no_answer"),
    (share(), "no_turns"),
    (share(("human", "Hi"), ("human", "there"), ("gpt", "Hello.")), "user assistant"),
    (share(("human", "Hi"), ("gpt", "Hel"), ("gpt", "lo.")), "user assistant"),
    (share(("human", "Hi"), ("gpt", "Hello."), ("human", "And?")), "user assistant"),  # no answer to the last
    (share(("human", "Hi"), ("gpt", "Hello."), ("human", ""), ("gpt", "What?")), "user assistant"),
    (share(("human", "Hi"), ("gpt", "")), "no_answer"),
    (share(("human", "Hi"), ("gpt", None)), "no_answer"),
    (share(("human", "Hi"), ("gpt", '<div class="markdown">Hello</div>')), "html"),
    (share(("human", "Hi"), ("gpt", '```html\n<div class="a">Hello</div>\n```')), "user assistant"),  # asked for
    (share(("human", "Hi"), ("gpt", "pythonCopy code`print()`")), "html"),
    (share(("human", "x" * 200_001), ("gpt", "Long.")), "huge_turn"),
    (share(("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello.")), "system user assistant"),
    (share(("system", ""), ("human", "Hi"), ("gpt", "Hello.")), "user assistant"),
    (share(("user", "Hi"), ("chatgpt", "Hello.")), "user assistant"),
    (share(("human", "Hi"), ("bing", "Hello.")), "user assistant"),
    (share(("human", "Hi"), ("gpt", "Hello."), markdown=None, text=None), "user assistant"),
]
# train_sft of UltraChat-200K: the first question again as `prompt`, with its id.
ULTRACHAT = [
    (openai(("user", "Hi"), ("assistant", "Hello."), prompt="Hi", prompt_id="f0e3"), "user assistant"),
    (openai(("user", "Hi"), ("assistant", "Hello."), ("user", ""), ("assistant", "?"), prompt="Hi", prompt_id="a"),
     "user assistant"),
    (openai(("user", ""), ("assistant", "Hello."), prompt="", prompt_id="b"), "no_answer"),
]  # fmt: skip
# Open-PerfectBlend: ShareGPT form with the set that each row comes from.
PERFECTBLEND = [
    (share(("human", "1+1?"), ("gpt", "2"), source="meta-math/MetaMathQA"), "user assistant"),
    (share(("system", "You solve."), ("human", "2+2?"), ("gpt", "4"), source="openbmb/UltraInteract_sft"),
     "system user assistant"),
]  # fmt: skip


@pytest.mark.parametrize("row, expected", SHAREGPT + ULTRACHAT + PERFECTBLEND)
def test_oddities(row, expected):
    repairs = Counter()
    try:
        chat = clean(row, "here:1", "set", DataConfig(), repairs)
    except Unusable as reason:
        assert reason.reason == expected
        return
    assert " ".join(message["role"] for message in chat.messages) == expected
    assert all(message["content"].strip() for message in chat.messages)


def test_repairs_keep_the_texts():
    repairs = Counter()
    chat = clean(SHAREGPT[5][0], "here:1", "set", DataConfig(), repairs)
    assert chat == Chat(openai(("user", "Hi\n\nthere"), ("assistant", "Hello."))["messages"], True, "set", "here:1")
    clean(SHAREGPT[2][0], "here:1", "set", DataConfig(), repairs)
    clean(SHAREGPT[8][0], "here:1", "set", DataConfig(), repairs)
    assert repairs == {"same_role_twice": 1, "answer_before_any_question": 1, "cut_at_an_empty_turn": 1}


TOOLS = [
    share(("system", "add"), ("human", "1+1?"), ("function_call", "add(1, 1)"), ("observation", "2"), ("gpt", "2")),
    openai(("user", "1+1?"), ("assistant", "add"), ("tool", "2"), ("assistant", "It is 2.")),
    {"messages": [{"role": "user", "content": "1+1?"},
                  {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]},
                  {"role": "tool", "content": "2"}, {"role": "assistant", "content": "It is 2."}],
     "tools": [{"type": "function"}]},
]  # fmt: skip


@pytest.mark.parametrize("row", TOOLS)
def test_tool_turns_are_refused_or_kept(row):
    with pytest.raises(Unusable, match="tool turn"):
        clean(row, "here:1", "set", DataConfig(), Counter())
    chat = clean(row, "here:1", "set", DataConfig(tool_turns="keep"), Counter())
    assert [m["role"] for m in chat.messages if m["role"] != "system"] == ["user", "assistant", "tool", "assistant"]
    assert chat.tools == row.get("tools")


def test_a_tables_nulls_are_no_arguments(tmp_path):
    """Parquet gives the objects of a column the fields of all of them."""
    rows = []
    for arguments in ({"a": 1}, {"city": "Rome"}):
        call = {"function": {"name": "f", "arguments": arguments}}
        turns = [{"role": "user", "content": "?", "tool_calls": None}]
        turns += [{"role": "assistant", "content": None, "tool_calls": [call]}]
        rows.append({"messages": turns, "tools": None})
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    keep, read = DataConfig(tool_turns="keep"), []
    for where, row in read_rows(tmp_path / "a.parquet"):
        message = clean(row, where, "set", keep, Counter()).messages[-1]
        read.append(message["tool_calls"][0]["function"]["arguments"])
    assert read == [{"a": 1}, {"city": "Rome"}]


def test_files_and_hub_ids_are_told_apart(tmp_path):
    for name in ("teknium/OpenHermes-2.5", "own/Llama-3.1-Pro-300K-Filtered", "mlabonne/open-perfectblend"):
        assert not sources.is_file(Source(path=name)) and sources.label(Source(path=name)) == name.partition("/")[2]
    for name, label in (("chats.jsonl", "chats"), ("data/v1.2.json.gz", "v1.2"), ("package:train.jsonl", "train")):
        assert sources.is_file(Source(path=name)) and sources.label(Source(path=name)) == label
    (tmp_path / "a.jsonl").write_text("{}")
    first = sources.fingerprint(Source(path=str(tmp_path)))
    (tmp_path / "a.jsonl").write_text("[]")  # as long as before
    assert first != sources.fingerprint(Source(path=str(tmp_path)))


def test_languages_and_truncated_answers():
    german = openai(("user", "Wie ist das Wetter heute in Berlin?"), ("assistant", "Es regnet heute den ganzen Tag."))
    english = openai(("user", "What is the weather like today?"), ("assistant", "It is raining all day long today."))
    only = DataConfig(languages=["en"])
    assert clean(english, "here:1", "set", only, Counter())
    with pytest.raises(Unusable, match="its language is de"):
        clean(german, "here:1", "set", only, Counter())
    cut = english | {"finish": "length"}
    assert not clean(cut, "here:1", "set", DataConfig(), Counter()).complete
    with pytest.raises(Unusable, match="finish"):
        clean(cut, "here:1", "set", DataConfig(truncated_answers="drop"), Counter())


def chats(count, form=share, **more):
    names = ("human", "gpt") if form is share else ("user", "assistant")
    return [form((names[0], f"Question {i}?"), (names[1], f"Answer {i}."), **more) for i in range(count)]


def write(path, rows):
    """The rows as the file's name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if ".parquet" in path.name:
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    if ".json" in path.suffixes:
        text = json.dumps(rows, indent=1).encode()
    packers = {".gz": gzip.compress, ".zst": zstandard.compress}
    path.write_bytes(packers.get(path.suffix, bytes)(text))
    return path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.parquet", "a.jsonl.gz", "a.json.gz", "a.jsonl.zst", "a.json.zst"]
)
def test_local_files(name, tmp_path):
    rows = chats(1200, openai if "parquet" in name else share)
    read = list(read_rows(write(tmp_path / name, rows)))
    assert [row for _, row in read] == rows
    lines = [int(where.rpartition(":")[2]) for where, _ in read]
    assert lines == sorted(set(lines)) and read[0][0].startswith(str(tmp_path / name))
    if "jsonl" in name:
        assert lines == list(range(1, 1201))
    if "json." in f"{name}." and "jsonl" not in name:  # the line of each element in the file as it is written
        text = json.dumps(rows, indent=1).splitlines()
        assert all(text[line - 1].strip() == "{" for line in lines)


def test_zstandard_in_several_frames(tmp_path):
    parts = [json.dumps(row).encode() + b"\n" for row in chats(6)]
    (tmp_path / "a.jsonl.zst").write_bytes(
        zstandard.compress(b"".join(parts[:3])) + zstandard.compress(b"".join(parts[3:]))
    )
    assert len(list(read_rows(tmp_path / "a.jsonl.zst"))) == 6


def test_known_sets():
    known = {name: sources.resolve(Source(path=name, share=1.0)) for name in ("sharegpt", "ultrachat", "perfectblend")}
    assert known["sharegpt"].path == "anon8231489123/ShareGPT_Vicuna_unfiltered"
    assert known["sharegpt"].file == "ShareGPT_V3_unfiltered_cleaned_split.json"
    assert (known["ultrachat"].path, known["ultrachat"].split) == ("HuggingFaceH4/ultrachat_200k", "train_sft")
    assert known["perfectblend"].path == "mlabonne/open-perfectblend"
    assert all(source.share == 1.0 and source.name == name for name, source in known.items())
    assert sources.resolve(Source(path="ultrachat", split="test_sft")).split == "test_sft"


@pytest.mark.parametrize("packed", ["packed", "bucketed"])
def test_prepare_from_folders_like_the_hubs(packed, tmp_path, small_target):
    """The three sets as they lie on the hub, in folders, with oddities: prepared in one go, every row accounted for."""
    sharegpt = [row for row, _ in SHAREGPT] + chats(60)
    write(tmp_path / "sharegpt" / "ShareGPT_V3_unfiltered_cleaned_split.json", sharegpt)
    write(tmp_path / "sharegpt" / "HTML_cleaned_raw_dataset" / "other.json", chats(5))
    ultrachat = [row for row, _ in ULTRACHAT] + chats(50, openai, prompt="q", prompt_id="i")
    write(tmp_path / "ultrachat" / "data" / "train_sft-00000-of-00001.parquet", ultrachat)
    write(
        tmp_path / "ultrachat" / "data" / "test_sft-00000-of-00001.parquet", chats(5, openai, prompt="q", prompt_id="i")
    )
    blend = [row for row, _ in PERFECTBLEND] + chats(40, source="synthetic")
    write(tmp_path / "blend" / "data" / "train-00000-of-00001.parquet", blend)
    split = "ShareGPT_V3_unfiltered_cleaned_split.json"
    settings = [
        f"data.train=[{{path: {tmp_path}/sharegpt, file: {split}, share: 45}}, "
        f"{{path: {tmp_path}/ultrachat, split: train_sft, share: 35}}, {{path: {tmp_path}/blend, share: 20}}]",
        "data.conversations=100",
        f"target.path={small_target}",
        f"data.prepared={tmp_path}/prepared",
        "data.row_length=64",
        f"data.packing={packed}",
        f"data.buckets={[32] if packed == 'bucketed' else []}",
        "data.draft_vocab_size=64",
        "data.deduplicate=none",
        "data.workers=1",
    ]
    manifest = prepare(load_recipe(None, settings))
    reports = {report["name"]: report for report in manifest["sources"]}
    assert {name: report["read"] for name, report in reports.items()} == {"sharegpt": 80, "ultrachat": 53, "blend": 42}
    assert {name: report["kept"] for name, report in reports.items()} == {"sharegpt": 45, "ultrachat": 35, "blend": 20}
    dropped = {reason: entry["rows"] for reason, entry in reports["sharegpt"]["dropped"].items()}
    assert dropped == {"no_answer": 3, "no_turns": 1, "html": 2, "huge_turn": 1}
    for report in reports.values():
        assert sum(report[split]["chats"] for split in ("train", "heldout")) == report["kept"]
        assert len(report["fingerprint"]) == 64 and report["train"]["tokens"] > report["train"]["answer_tokens"] > 0
    assert manifest["train"]["chats"] == sum(report["train"]["chats"] for report in reports.values()) == 97
    assert manifest["train"]["tokens"] == sum(report["train"]["tokens"] for report in reports.values())
    train, heldout, _, _ = load_prepared(str(tmp_path / "prepared"))
    assert sum(len(row["input_ids"]) for row in train) <= 64 * len(train)
    assert sum((row["document_ids"] > 0).sum() for row in train) == manifest["train"]["tokens"]
    assert len(heldout) and {"sharegpt", "ultrachat", "synthetic"} <= set(manifest["heldout_sources"])


def test_an_unreachable_hub_set_says_what_to_do():
    with pytest.raises(UserError, match="neither a file nor a folder here, and the hub did not answer .* download it"):
        sources.fingerprint(Source(path="mlabonne/open-perfectblend"))


def test_a_folder_that_datasets_has_no_package_for(tmp_path):
    traced = openai(("user", "Hi"), ("assistant", "Hello."), id="a", source="s", model="m", system_prompt="p")
    write(tmp_path / "traces" / "a.jsonl", [traced])
    with pytest.raises(UserError, match=r"traces\[train\]:1: can't be read as a dataset .*install 'teich'"):
        list(sources.rows(Source(path=str(tmp_path / "traces")), 0))
    assert [row for _, row in sources.rows(Source(path=str(tmp_path / "traces"), file="a.jsonl"), 0)] == [traced]


def test_a_configuration_of_a_set(tmp_path):
    rows = {name: chats(2, source=name) for name in ("short", "long")}
    for name in rows:
        write(tmp_path / name / "a.jsonl", rows[name])
    configs = [{"config_name": name, "data_files": f"{name}/*"} for name in rows]
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    with pytest.raises(UserError, match=r"can't be read as a dataset \(Config name is missing.*\['short', 'long'\]"):
        list(sources.rows(Source(path=str(tmp_path)), 0))
    of_each = {name: Source(path=str(tmp_path), config=name) for name in rows}
    for name, source in of_each.items():
        assert [row for _, row in sources.rows(source, 0)] == rows[name]
    assert len({sources.fingerprint(source) for source in of_each.values()}) == 2


@pytest.mark.parametrize("name", ["a.json", "main/a.parquet", "a.jsonl.gz"])
def test_one_file_of_a_set_is_read_here(name, tmp_path, monkeypatch):
    """datasets would read an array whole into memory; and `split` is no matter."""
    monkeypatch.setattr("datasets.load_dataset", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    rows, commit = chats(3), "0" * 40
    folder = tmp_path / "datasets--org--set" / "snapshots" / commit
    write(folder / name, rows)
    of_hub = Source(path="org/set", file=name, revision=commit, split="test")
    lines = [2, 15, 28] if name == "a.json" else [1, 2, 3]
    assert list(sources.rows(of_hub, 0)) == [(f"org/set/{name}:{n}", row) for n, row in zip(lines, rows, strict=True)]
    assert len(list(sources.rows(replace(of_hub, read=2), 0))) == 2
    of_folder = sources.rows(Source(path=str(folder), file=name), 0)
    assert list(of_folder) == [(f"{folder / name}:{n}", row) for n, row in zip(lines, rows, strict=True)]
    with pytest.raises(UserError, match=r"org/set/b.json can't be downloaded \(.* cannot find"):
        list(sources.rows(replace(of_hub, file="b.json"), 0))
