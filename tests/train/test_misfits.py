"""A run on data, targets and checkpoints that don't fit: one line each, and what it does without held-out rows."""

import json

import numpy as np
import pytest
import torch

from eagle3_xla import checkpoint as checkpoints
from eagle3_xla.config import load_recipe
from eagle3_xla.data.prepare import prepare
from eagle3_xla.errors import UserError
from eagle3_xla.target.model import TargetStates
from eagle3_xla.target.states import StatesStore
from eagle3_xla.train.loop import train
from eagle3_xla.xla.backend import make_backend
from eagle3_xla.xla.config import XlaConfig


def test_without_held_out_rows(small_run, capsys, tmp_path):
    own = [setting for setting in small_run if not setting.startswith("data.heldout")] + ["data.heldout_share=0"]
    assert prepare(load_recipe(None, own))["heldout"]["rows"] == 0
    result = train(load_recipe(None, own), max_steps=1)
    assert result["micro_steps"] == 1 and result["tau"] is None
    said = "no held-out rows, so no tau is measured: `export` takes the newest checkpoint, not the best"
    assert said in capsys.readouterr().err
    with pytest.raises(UserError, match="train.patience counts evaluations, and there are no held-out rows"):
        train(load_recipe(None, [*own, "train.patience=2", f"train.out={tmp_path / 'other'}"]))

    # The same folder, for a target of another vocabulary.
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    size = manifest["vocab_size"]
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest | {"vocab_size": size + 1}))
    with pytest.raises(UserError, match=rf"was prepared for a target of {size + 1} tokens .*; this one has {size}\."):
        train(load_recipe(None, own))

    # A checkpoint with whole checksums and a meta.json of another kind.
    path = tmp_path / "run" / "checkpoints" / "step-00000001"
    meta = json.loads((path / "meta.json").read_text())
    for change, message in (
        ({"micro_step": "one"}, "meta.json: micro_step is 'one'; a whole number from 0"),
        ({"tau": [1]}, r"meta.json: tau is \[1\]; a number"),
        ({"recipe": None}, "meta.json: recipe is null; a mapping"),
        ({"data_key": 1}, "meta.json: data_key is 1; a text"),
        ({"draft_config": []}, r"meta.json: draft_config is \[\]; a mapping"),
        ({"more": 1}, "meta.json: more is no field of a checkpoint"),
    ):
        (path / "meta.json").write_text(json.dumps(meta | change))
        sums = [f"{checkpoints._sha256(path / name)}  {name}\n" for name in ("state.safetensors", "meta.json")]
        (path / "SHA256SUMS").write_text("".join(sums))
        with pytest.raises(UserError, match=message):
            checkpoints.load(path)


class Rows(list):
    def __getitem__(self, indices):
        return {
            name: np.zeros((len(indices), 4), bool if name == "loss_mask" else np.int32)
            for name in ("input_ids", "position_ids", "document_ids", "loss_mask")
        }


def test_damaged_states_are_computed_again(tmp_path):
    """Of 40 rows in three files: each file that a power loss cut or emptied, and an index that is none."""
    asked = []

    def states_of(batch):
        asked.append(len(batch["input_ids"]))
        shape = batch["input_ids"].shape
        return TargetStates(torch.ones(*shape, 6), torch.ones(*shape, 2), torch.ones(shape), torch.ones(shape))

    def fill():
        asked.clear()
        StatesStore(tmp_path, Rows(range(40)), "key").fill(states_of, 8, make_backend(XlaConfig(device="cpu")))
        return sum(asked)

    assert (fill(), fill()) == (40, 0)
    first, second, third = sorted(tmp_path.glob("*.safetensors"))
    first.write_bytes(b"")
    second.write_bytes(second.read_bytes()[:-20])
    assert (fill(), fill()) == (32, 0)
    third.write_bytes(first.read_bytes())  # of more rows
    assert (fill(), fill()) == (8, 0)
    (tmp_path / "states.json").write_text("[" * 10)
    assert (fill(), fill()) == (40, 0)
