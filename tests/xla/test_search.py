"""What `plan --search` compares, and that it does: the real compiler on a tiny target."""

import json
from importlib import metadata

import pytest

from eagle3_xla.config import load_recipe
from eagle3_xla.errors import UserError
from eagle3_xla.plan.search import _key as search_key
from eagle3_xla.plan.search import candidates, search


def test_every_candidate_has_the_rows_of_an_update():
    recipe = load_recipe("qwen2.5-7b-v4-32", [])
    meshes = candidates(recipe, 16, 4)
    layouts = [(c[0].xla.dp, c[0].xla.tp, c[0].xla.draft_data_parallel) for c in meshes]
    assert layouts == [(16, 1, False), (8, 2, False), (8, 2, True), (4, 4, False), (4, 4, True)]
    for candidate in sum(meshes, []):
        assert candidate.xla.dp * candidate.train.batch_size * candidate.train.gradient_accumulation == 64
    batches = [[c.train.batch_size for c in mesh] for mesh in meshes]
    assert batches == [[1, 2, 4], [1, 2, 4, 8], [2, 4, 8], [1, 2, 4, 8, 16], [4, 8, 16]]


def test_rows_that_no_mesh_takes_are_refused():
    recipe = load_recipe("qwen2.5-7b-v4-32", ["train.batch_size=6", "xla.dp=1", "xla.tp=1"])
    line = r"^6 rows of an update .* can't be dealt to the 16 chips of a v4-32; a multiple of 4 can, for 4 key"
    with pytest.raises(UserError, match=line):
        search(recipe)
    recipe.train.batch_size = 4
    assert [mesh[0].xla.tp for mesh in candidates(recipe, 16, 4) if mesh] == [4]


def test_the_key_of_a_verdict_is_of_all_that_shapes_it(tmp_path, monkeypatch):
    def key():
        return search_key(load_recipe("qwen2.5-7b-v4-32", [f"train.warm_start={tmp_path}"]))

    keys = [key()]
    for words in (32000, 16000):
        (tmp_path / "config.json").write_text(json.dumps({"draft_vocab_size": words}))
        keys.append(key())
    assert keys[-1] == key()
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0" if name == "transformers" else version(name))
    keys.append(key())
    assert len({*keys}) == 4
    monkeypatch.setattr("eagle3_xla.plan.search.COMPILER", ("torch_xla", "no-such-package"))
    with pytest.raises(UserError, match=r"^the TPU compiler is not installed \(.*no-such-package\): pip install"):
        key()


@pytest.mark.slow
def test_search_compiles_each_once(forks, small_target, tmp_path):
    config = json.loads((small_target / "config.json").read_text()) | {"num_key_value_heads": 2}  # tp is 1 or 2
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "config.json").write_text(json.dumps(config))
    arguments = ["plan", "--search", "--json", "--topology", "v4-8", "--config", "qwen2.5-7b-v4-32"]
    arguments += [f"--target.path={tmp_path / 'target'}", "--data.draft_vocab_size=256", "--data.row_length=64"]
    arguments += ["--loss.ttt_length=1", "--xla.dp=4", "--xla.tp=1", "--train.batch_size=1"]
    arguments += ["--train.gradient_accumulation=1"]
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = forks.run(*arguments, environment=cache)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    shapes = {(p["dp"], p["tp"], p["batch_size"]) for p in found["plans"] if not p["draft_data_parallel"]}
    assert shapes == {(4, 1, 1), (2, 2, 1), (2, 2, 2)}
    split = {(p["dp"], p["tp"], p["batch_size"]) for p in found["plans"] if p["draft_data_parallel"]}
    assert split == {(2, 2, 2)}
    rates = [plan["tokens_per_second"] for plan in found["plans"]]
    assert rates == sorted(rates, reverse=True) and found["best"] == found["plans"][0]
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.json")}
    assert len(kept) == len(shapes) + len(split)
    again = forks.run(*arguments, environment=cache)
    assert json.loads(again.stdout) == found
    assert kept == {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.json")}
