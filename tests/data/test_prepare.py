"""Packing, batches, draft vocabulary, and the prepared folder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from eagle3_xla.cli import main
from eagle3_xla.config import load_recipe
from eagle3_xla.data import prepare as prepare_module
from eagle3_xla.data.batches import Batches
from eagle3_xla.data.files import data_file, read_rows
from eagle3_xla.data.packing import pack, row_arrays
from eagle3_xla.data.prepare import load_prepared, prepare
from eagle3_xla.data.show import marked
from eagle3_xla.data.vocab import coverage, d2t_t2d, draft_ids_of, draft_vocabulary
from eagle3_xla.errors import UserError


def test_packing_keeps_every_document_once_and_fits():
    lengths = np.random.default_rng(0).integers(4, 257, 500).tolist()
    rows = pack(lengths, 512)
    assert sorted(i for row in rows for i in row) == list(range(500))
    assert max(sum(lengths[i] for i in row) for row in rows) <= 512
    assert sum(lengths) / (len(rows) * 512) > 0.97


def test_row_arrays():
    rows = row_arrays([[([5, 6, 7], [0, 1, 1]), ([8, 9], [0, 1])], [([4], [1])]], 7, pad_id=2)
    assert rows["input_ids"].tolist() == [[5, 6, 7, 8, 9, 2, 2], [4, 2, 2, 2, 2, 2, 2]]
    assert rows["loss_mask"][0].tolist() == [False, True, True, False, True, False, False]
    assert rows["document_ids"].tolist() == [[1, 1, 1, 2, 2, 0, 0], [1, 0, 0, 0, 0, 0, 0]]
    assert rows["position_ids"][0].tolist() == [0, 1, 2, 0, 1, 0, 0]


def test_every_epoch_sees_every_row_in_another_order_and_fills_its_lists_evenly():
    drafted = np.random.default_rng(0).integers(1, 512, 24)
    buckets = [(512, 0, 16), (1024, 16, 8)]
    batches = Batches(drafted, buckets, group=2, replicas=2, seed=1)
    assert batches.steps_per_epoch == 6
    epochs = [np.stack([batches.indices(e * 6 + i) for i in range(6)]) for e in range(2)]
    for epoch in epochs:
        assert sorted(epoch.ravel()) == list(range(24))
        assert all((batch < 16).all() or (batch >= 16).all() for batch in epoch)  # rows of one length in a batch
    assert (epochs[0] != epochs[1]).any()
    assert (Batches(drafted, buckets, 2, 2, seed=2).indices(3) != batches.indices(3)).any()

    # A bucket that fills no batch counts for nothing, graphs included.
    with_few = Batches(np.append(drafted, [7] * 3), [*buckets, (2048, 24, 3)], 2, 2, seed=1)
    assert (with_few.buckets, with_few.unfilled) == (buckets, [(2048, 24, 3)]) and with_few.steps_per_epoch == 6
    assert all((with_few.indices(i) == batches.indices(i)).all() for i in range(12))
    assert with_few.capacities(epochs=2) == batches.capacities(epochs=2)

    groups = np.concatenate(epochs).reshape(-1, 2)
    most = {512: 0, 1024: 0}
    for group in groups:
        most[512 if group[0] < 16 else 1024] = max(most[512 if group[0] < 16 else 1024], drafted[group].sum())
    capacities = batches.capacities(epochs=2)
    assert all(most[n] <= capacities[n] < most[n] + 64 for n in most)


def test_draft_vocabulary_is_the_most_frequent_and_the_stop_token():
    counts = np.array([0, 9, 0, 5, 7, 0, 1, 0])
    ids = draft_vocabulary(counts, 4, always={7})
    assert ids.tolist() == [1, 3, 4, 7]
    assert coverage(counts, ids) == 21 / 22
    d2t, t2d = d2t_t2d(torch.from_numpy(ids), 8)
    assert d2t.tolist() == [1, 2, 2, 4]
    assert draft_ids_of(d2t).tolist() == t2d.nonzero()[:, 0].tolist() == ids.tolist()


def test_prepare_is_reused_until_something_changes(small_run, chat_file):
    recipe = load_recipe(None, small_run)
    first = prepare(recipe)
    train, heldout, draft_ids, manifest = load_prepared(recipe.data.prepared)
    assert manifest == first == prepare(recipe)
    assert manifest["sources"][1]["read"] == 32 and manifest["coverage_train"] == 1.0
    assert len(draft_ids) == 128 and train[0]["input_ids"].shape == (64,)
    recipe.data.row_length = 96
    assert prepare(recipe)["row_length"] == 96
    chat_file.write_text(chat_file.read_text().replace("Paris", "Lyon"))
    assert prepare(recipe)["key"] not in (first["key"], manifest["key"])


def test_a_change_of_this_packages_code_is_prepared_anew(small_run, tmp_path, monkeypatch):
    recipe = load_recipe(None, small_run)
    first = prepare(recipe)
    code = tmp_path / "code"
    shutil.copytree(Path(prepare_module.__file__).parent, code, ignore=shutil.ignore_patterns("chats", "__pycache__"))
    monkeypatch.setattr(prepare_module, "__file__", str(code / "prepare.py"))
    assert prepare(recipe)["inputs"] == first["inputs"]  # the same code elsewhere
    with (code / "chat.py").open("a") as file:
        file.write("# another mask\n")
    again = prepare(recipe)
    assert again["inputs"] != first["inputs"] and again["key"] == first["key"]


def test_vocabulary_counts_answers_that_the_token_budget_leaves_out(small_run):
    whole = prepare(load_recipe(None, small_run))
    ids = load_prepared(load_recipe(None, small_run).data.prepared)[2]
    part = prepare(load_recipe(None, [*small_run, "data.max_tokens=100"]))
    assert part["train"]["tokens"] < whole["train"]["tokens"]
    chats, left = whole["train"]["chats"], part["train"]["chats"]
    assert f"data.max_tokens 100 leaves out {chats - left} of {chats} conversations" in part["warnings"]
    assert torch.equal(ids, load_prepared(load_recipe(None, small_run).data.prepared)[2])


def test_what_is_left_out_of_both_splits_is_counted(small_run, chat_file, small_target, tmp_path):
    target = tmp_path / "target"
    shutil.copytree(small_target, target)
    template = target / "chat_template.jinja"
    template.write_text("{{ 'x' if messages[-1].content == 'Hidden.' else '' }}" + template.read_text())
    rows = [json.loads(line)["conversations"] for line in chat_file.read_text().splitlines()]
    for question, _ in rows[::4]:
        question["value"] += " word" * 100
    for _, answer in rows[1::4]:
        answer["value"] = "Hidden."
    chat_file.write_text("".join(json.dumps({"conversations": row}) + "\n" for row in rows))
    settings = [f"target.path={target}", "data.heldout=[]", "data.heldout_share=0.5"]
    manifest = prepare(load_recipe(None, [*small_run, *settings]))
    [source] = manifest["sources"]
    counted = {reason: entry["rows"] for reason, entry in source["dropped"].items()}
    assert counted == {"answer_after_row_length": 8, "no_answer_in_template": 8}
    assert source["train"]["chats"] + source["heldout"]["chats"] == 16
    warned = "chats: 8 of 32 conversations are left out (no_answer_in_template; the first: "
    assert any(line.startswith(warned) and "chats.jsonl:" in line for line in manifest["warnings"])


def test_prepared_folder_of_somebody_else_is_refused(small_run, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not ours"):
        prepare(load_recipe(None, small_run))
    assert (tmp_path / "data" / "thesis.txt").read_text() == "mine"


def test_shipped_chats_are_readable():
    chats = {name: [row for _, row in read_rows(data_file(f"package:{name}.jsonl"))] for name in ("train", "heldout")}
    assert {name: len(rows) for name, rows in chats.items()} == {"train": 2563, "heldout": 83}
    asked = {name: {json.dumps(row["conversations"][0]) for row in rows} for name, rows in chats.items()}
    assert not asked["train"] & asked["heldout"]


def test_show_marks_what_is_trained_on(small_run, capsys):
    settings = [f"--{setting}" for setting in small_run]
    assert main(["prepare", "--show", "2", *settings]) == 0
    shown = capsys.readouterr().out
    assert "\033" not in shown and shown.startswith("row 0 of ")
    assert "row 1 of " in shown and "row 2 of " not in shown
    assert "<|im_start|>assistant\n    ⟦" in shown and shown.count("<|im_end|>⟧") >= 2
    assert shown.count("⟦") == shown.count("⟧")
    for form, told in (["--show=1"], 2), (["--json"], 2), ([], 0), (["--show=1", "--quiet"], 0):
        assert main(["prepare", *form, *settings, "--data.row_length=40"]) == 0
        printed = capsys.readouterr()
        said = [line for line in printed.err.splitlines() if line.startswith("warning: ")]
        assert len(said) == told and (not told or "longer than data.row_length 40" in said[1]), printed.err
        assert ("longer than data.row_length 40" in printed.out) == ("--show=1" not in form)
    assert main(["prepare", "--show", "0", *settings]) == 2
    assert "--show 0: a whole number from 1" in capsys.readouterr().err


def test_shown_text_is_coloured_line_by_line_and_drives_no_terminal(tokenizer):
    ids = np.array(tokenizer("a\033[2J b\nc")["input_ids"])
    mask = np.arange(len(ids)) >= len(ids) - 3
    text = marked(tokenizer, ids, mask, ("<", ">"))
    assert text == "a\\x1b[2J< b>\n<c>"
