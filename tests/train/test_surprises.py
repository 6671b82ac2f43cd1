"""A run on data, targets and checkpoints that don't fit: one line each, and what it does without held-out rows."""

import json

import pytest

from eagle3_xla import checkpoint as checkpoints
from eagle3_xla.config import UserError, load_recipe
from eagle3_xla.data.prepare import prepare
from eagle3_xla.train.loop import train


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
