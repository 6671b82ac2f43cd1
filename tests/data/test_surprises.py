"""What others made, cut or mixed up: folders, manifests, tokenizers, work files. One line each, and nothing is lost."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle3_xla.config import load_recipe
from eagle3_xla.data import documents
from eagle3_xla.data.manifest import read_manifest
from eagle3_xla.data.prepare import load_prepared, prepare
from eagle3_xla.data.workfiles import read_work_file, write_work_file
from eagle3_xla.errors import UserError
from eagle3_xla.outputs import write_run_file
from eagle3_xla.quickstart import quickstart
from eagle3_xla.regenerate.run import Options, regenerate


def chats(count: int, start: int = 0, **more) -> list[dict]:
    """Short conversations that no filter takes for duplicates."""
    return [
        {"prompt": f"Question {n}?", "completion": f"The number {n} comes {'very ' * (n % 7)}after {n - 1}."} | more
        for n in range(start, start + count)
    ]


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def recipe(target, folder: Path, train: Path, *more: str):
    data = {"prepared": folder, "row_length": 64, "draft_vocab_size": 64, "workers": 1, "train": f"[{train}]"}
    return load_recipe(None, [f"target.path={target}", *(f"data.{k}={v}" for k, v in data.items()), *more])


@pytest.fixture(scope="module")
def made(small_target, tmp_path_factory):
    """(folder with a prepared folder `data`, its recipe)."""
    folder = tmp_path_factory.mktemp("made")
    made = recipe(small_target, folder / "data", write(folder / "chats.jsonl", chats(30)))
    prepare(made)
    return folder, made


@pytest.fixture
def copied(made, tmp_path):
    """A copy of the prepared folder, and its recipe."""
    folder, original = made
    shutil.copytree(folder / "data", tmp_path / "data")
    overrides = [f"data.prepared={tmp_path / 'data'}"]
    return tmp_path / "data", load_recipe(str(folder / "data" / "run.yaml"), overrides)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_another_verbs_folder_is_left_alone(small_target, tmp_path):
    chosen = recipe(small_target, tmp_path / "run", write(tmp_path / "chats.jsonl", chats(3)))
    (tmp_path / "run" / "train").mkdir(parents=True)
    write_run_file(chosen, tmp_path / "run", "train")
    (tmp_path / "run" / "train" / "notes.txt").write_text("mine")
    before = content(tmp_path / "run")
    with pytest.raises(UserError, match=r"run is not ours to write to: `prepare` did not make it \(`train` wrote it\)"):
        prepare(chosen)
    assert content(tmp_path / "run") == before


def test_no_verb_takes_a_prepared_folder(copied):
    folder, chosen = copied
    before = content(folder)
    starts = {
        "quickstart": lambda: quickstart(folder, 1),
        "regenerate": lambda: regenerate(chosen, folder, Options(["http://127.0.0.1:9"])),
    }
    for verb, start in starts.items():
        with pytest.raises(UserError, match=rf"not ours to write to: `{verb}` did not make it \(`prepare` wrote it\)"):
            start()
    assert content(folder) == before


def test_a_users_file_in_a_prepared_folder_stays(copied):
    folder, chosen = copied
    (folder / "train" / "notes.txt").write_text("mine")
    (folder / "README.md").write_text("mine too")
    chosen.data.seed = 1
    before = content(folder)
    with pytest.raises(UserError, match="train/notes.txt is not ours and would be removed; .*--overwrite"):
        prepare(chosen)
    assert content(folder) == before
    (folder / "train" / "notes.txt").unlink()
    prepare(chosen)
    assert (folder / "README.md").read_text() == "mine too"


DAMAGED = {
    "": "manifest.json is not JSON",
    "[]": r"manifest.json is not a JSON object but \[\]",
    "null": "manifest.json is not a JSON object but null",
    "[" * 100_000: "manifest.json is not readable JSON",
    '{"key": 1}': "manifest.json: key is 1; a text",
    "target": "manifest.json was written by an earlier version; run `eagle3-xla prepare` again",
    "settings": "manifest.json: settings is null; a mapping",
    "row_length": "manifest.json: row_length is null; a whole number from 8",
    "vocab_size": "manifest.json: vocab_size is null",
    "draft_vocab_size": "manifest.json: draft_vocab_size is null",
    "train": "manifest.json: train is null; a mapping",
    "heldout_sources": "manifest.json: heldout_sources is null; a list",
}


@pytest.mark.parametrize("damage", DAMAGED, ids=lambda damage: damage[:20])
def test_a_damaged_manifest_is_named_and_prepared_again(damage, copied):
    folder, chosen = copied
    manifest = json.loads((folder / "manifest.json").read_text())
    text = json.dumps({k: v for k, v in manifest.items() if k != damage}) if damage in manifest else damage
    (folder / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=DAMAGED[damage]):
        load_prepared(str(folder))
    assert prepare(chosen) == manifest == load_prepared(str(folder))[3]


@pytest.mark.parametrize(
    "file, damage, message",
    [
        ("train/state.json", "", r"data/train can't be read \(.*\): it is damaged"),
        ("train/data-00000-of-00001.arrow", "half", r"data/train (can't be read|holds \d+ rows)"),
        ("heldout", None, "data/heldout can't be read"),
        ("draft_ids.json", "", "draft_ids.json is not JSON"),
        ("draft_ids.json", "{}", r"draft_ids.json is \{\}; a list"),
        ("draft_ids.json", "[1]", "draft_ids.json: its length is 1; a number from 64 to 64"),
        ("draft_ids.json", json.dumps([5] * 64), "draft_ids.json: a token id is 5; a whole number from 6"),
        ("draft_ids.json", json.dumps([*range(63), 10**6]), "draft_ids.json: a token id is 1000000"),
        ("draft_ids.json", json.dumps([*range(63), "a"]), "draft_ids.json: a token id is 'a'"),
    ],
)
def test_damaged_rows_are_named_and_prepared_again(file, damage, message, copied):
    folder, chosen = copied
    if damage is None:
        shutil.rmtree(folder / file)
    elif damage == "half":
        (folder / file).write_bytes((folder / file).read_bytes()[:700])
    else:
        (folder / file).write_text(damage)
    with pytest.raises(UserError, match=message):
        load_prepared(str(folder))
    prepare(chosen)
    assert len(load_prepared(str(folder))[0])


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=2),
    max_leaves=5,
)
FIELDS = "key inputs target settings row_length vocab_size draft_vocab_size".split()
FIELDS += "train heldout heldout_sources sources".split()
REPORT_FIELDS = ["rows", "chats", "tokens", "answer_tokens", "buckets"]


@settings(deadline=None, derandomize=True, database=None)
@given(st.dictionaries(st.sampled_from(FIELDS + REPORT_FIELDS), JSON_VALUES, min_size=1, max_size=3))
def test_no_manifest_surprises(made, tmp_path_factory, changes):
    manifest = json.loads((made[0] / "data" / "manifest.json").read_text())
    manifest |= {name: value for name, value in changes.items() if name in FIELDS}
    if isinstance(manifest["train"], dict):
        manifest["train"] |= {name: value for name, value in changes.items() if name in REPORT_FIELDS}
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    try:
        read_manifest(folder)
    except UserError as error:
        assert str(error).startswith(f"{folder / 'manifest.json'}") and "\n" not in str(error)


def test_more_sources_than_a_byte_counts(small_target, tmp_path):
    train = write(tmp_path / "train.jsonl", chats(5, 1000))
    rows = [row | {"source": f"set {number % 200}"} for number, row in enumerate(chats(200))]
    heldout = write(tmp_path / "heldout.jsonl", rows)
    chosen = recipe(small_target, tmp_path / "data", train, f"data.heldout=[{heldout}]", "data.deduplicate=exact")
    manifest = prepare(chosen)
    assert manifest["heldout_sources"] == [f"set {number}" for number in range(200)]
    assert sorted(load_prepared(str(tmp_path / "data"))[1][:]["source"].tolist()) == list(range(200))


def edited(folder: Path, **files) -> None:
    """Change fields of JSON files in a folder; None removes a field or a file, a string is a file's new content."""
    for name, change in files.items():
        file = folder / f"{name}.json"
        if change is None:
            file.unlink()
        elif isinstance(change, str):
            file.write_text(change)
        else:
            fields = json.loads(file.read_text()) if file.exists() else {}
            file.write_text(json.dumps({k: v for k, v in (fields | change).items() if v is not None}))


NO_EOS = {"eos_token": None, "pad_token": None}
TARGETS = [
    (
        {"tokenizer_config": NO_EOS, "generation_config": {"eos_token_id": None}},
        "names no token that ends an answer, neither eos_token_id in generation_config.json nor eos_token",
    ),
    ({"generation_config": {"eos_token_id": 10**6}}, "generation_config.json: eos_token_id is 1000000; a whole"),
    ({"generation_config": {"eos_token_id": "</s>"}}, "generation_config.json.* eos_token_id.*</s>|is '</s>'; a whole"),
    ({"generation_config": {"eos_token_id": [2, -1]}}, "eos_token_id is -1; a whole number from 0"),
    ({"generation_config": {"eos_token_id": [2, None]}}, "eos_token_id is null; a whole number from 0"),
    ({"generation_config": "{"}, "target .*generation_config.json|not a valid JSON file"),
    ({"tokenizer": "{"}, "no tokenizer at "),
    ({"tokenizer": "[]"}, "no tokenizer at "),
    ({"tokenizer": None}, "no tokenizer at .*there is no tokenizer.json"),
    ({"tokenizer_config": "[1]"}, "no tokenizer at "),
    ({"config": {"vocab_size": 60}}, r"vocab_size 60|end-of-turn token's id is|the target has 60 tokens"),
    ({"config": {"vocab_size": 300}}, r"gives token id \d+, but config.json there says vocab_size 300: they don't"),
    ({"config": {"vocab_size": "many"}}, "config.json: vocab_size is 'many'"),
]


@pytest.mark.parametrize("files, message", TARGETS, ids=[message[:30] for _, message in TARGETS])
def test_odd_targets_are_refused_by_field(files, message, small_target, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    for name in ("config", "generation_config", "tokenizer", "tokenizer_config", "special_tokens_map"):
        if (small_target / f"{name}.json").exists():
            shutil.copy(small_target / f"{name}.json", target)
    shutil.copy(small_target / "chat_template.jinja", target)
    edited(target, **files)
    with pytest.raises(UserError, match=message):
        prepare(recipe(target, tmp_path / "data", write(tmp_path / "chats.jsonl", chats(3)), "data.heldout_share=0"))


def test_a_template_that_raises_costs_its_conversations(small_target, tmp_path):
    target = shutil.copytree(small_target, tmp_path / "target")
    (target / "chat_template.jinja").write_text("{{ messages[0].content[9] + 1 / 0 }}")
    with pytest.raises(UserError, match="has a token to train on .*the target's chat template refuses it"):
        prepare(recipe(target, tmp_path / "data", write(tmp_path / "chats.jsonl", chats(3)), "data.heldout_share=0"))


def test_held_out_equal_to_trained_on(small_target, tmp_path):
    file = write(tmp_path / "chats.jsonl", chats(20))
    same = [f"data.heldout=[{file}]"]
    with pytest.raises(UserError, match="no conversation of data.train is left: duplicate 20 .*held-out conversations"):
        prepare(recipe(small_target, tmp_path / "data", file, *same))
    [warning] = prepare(recipe(small_target, tmp_path / "data", file, *same, "data.deduplicate=none"))["warnings"]
    assert warning.startswith(f"{file} is both trained on and held out")


def test_held_out_of_the_same_set_is_no_warning(small_target, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", chats(20))
    write(folder / "test.jsonl", [{"prompt": f"What is {n} squared?", "completion": f"{n * n}"} for n in range(9)])
    of_set = f"[{{path: {folder}, split: train}}]", f"[{{path: {folder}, split: test}}]"
    given = recipe(small_target, tmp_path / "data", folder, f"data.train={of_set[0]}", f"data.heldout={of_set[1]}")
    assert not prepare(given)["warnings"]
    same = recipe(
        small_target, tmp_path / "data", folder, *(f"data.{split}={of_set[1]}" for split in ("train", "heldout"))
    )
    same.data.deduplicate = "none"
    assert prepare(same)["warnings"][0].startswith(f"{folder} is both trained on and held out")


def test_many_conversations_longer_than_a_row_are_told_of(small_target, tmp_path):
    long = [{"prompt": f"How far is {n}?", "completion": "very " * 80 + f"far, {n} times."} for n in range(3)]
    for rows, said in ([*chats(60), *long], []), ([*chats(20), *long], ["3 of 23 training conversations"]):
        file = write(tmp_path / "chats.jsonl", rows)
        given = recipe(small_target, tmp_path / "data", file, "data.heldout_share=0", "data.deduplicate=none")
        manifest = prepare(given)
        assert manifest["train"]["cut_at_row_length"] == 3
        assert [warning.split(" are longer than data.row_length 64")[0] for warning in manifest["warnings"]] == said


def test_damaged_work_files_are_made_again(small_target, tmp_path, monkeypatch):
    """A power loss after the first chunk, in every way that it may leave a file."""
    monkeypatch.setattr(documents, "CHUNK", 10)
    file = write(tmp_path / "chats.jsonl", chats(60))
    whole = tmp_path / "whole"
    prepare(recipe(small_target, whole, file))
    expected = {name: data for name, data in content(whole).items() if name != "run.yaml"}
    chosen, real = recipe(small_target, tmp_path / "data", file), documents._Tokenizer.__call__
    cuts = [
        ("index", b""),
        ("index", None),
        ("mix", b""),
        ("chats.jsonl", None),
        ("chunk-00000", b""),
        ("chunk-00000", None),
    ]
    for name, left in cuts:
        done = []

        def call(self, chunk):
            if len(done) == 2:  # noqa: B023
                raise KeyboardInterrupt
            done.append(real(self, chunk))  # noqa: B023

        monkeypatch.setattr(documents._Tokenizer, "__call__", call)
        with pytest.raises(KeyboardInterrupt):
            prepare(chosen)
        monkeypatch.setattr(documents._Tokenizer, "__call__", real)
        [damaged] = (tmp_path / "data" / ".work").rglob(name)
        damaged.write_bytes(damaged.read_bytes()[:-40] if left is None else left)
        prepare(chosen)
        assert {name: data for name, data in content(tmp_path / "data").items() if name != "run.yaml"} == expected
        shutil.rmtree(tmp_path / "data")


@settings(deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=40), st.integers(0, 200), st.integers(1, 255))
def test_no_changed_byte_of_a_work_file_is_taken(tmp_path_factory, data, at, change):
    file = tmp_path_factory.getbasetemp() / "work-file"
    write_work_file(file, {"a": [1, "é"]}, data)
    meta, read = read_work_file(file)
    assert meta == {"a": [1, "é"]} and bytes(read) == data
    written = bytearray(file.read_bytes())
    written[at % len(written)] ^= change
    file.write_bytes(written)
    assert read_work_file(file) is None
    file.write_bytes(written[: at % len(written)])
    assert read_work_file(file) is None
