"""benchmarks/: which of its results a benchmark takes for those of today."""

import inspect
import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def recipes(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import recipes

    return recipes


@pytest.fixture
def where(recipes, tmp_path, chat_file):
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text("{}")
    save_file({"weight": torch.zeros(2, 2)}, target / "model.safetensors")
    return recipes.Where("cpu", target, tmp_path / "work", str(chat_file), 0, "code")


def test_the_key_of_a_run_is_of_all_that_shapes_it(recipes, where, chat_file, tmp_path, monkeypatch):
    def with_lr(lr):
        recipe = tmp_path / f"{lr}.yaml"
        recipe.write_text(f"base: smollm2-cpu\ntrain:\n  lr: {lr}\n")
        with monkeypatch.context() as patches:
            patches.setattr(recipes, "RECIPE", str(recipe))
            return recipes.run_key({}, 0, where)

    plain = recipes.run_key({}, 0, where)
    keys = [plain, recipes.run_key({}, 1, where), recipes.run_key({"patch": "ema"}, 0, where), with_lr("2.0e-4")]
    keys.append(recipes.run_key({}, 0, where._replace(code="changed")))
    moved, chats = tmp_path / "moved", tmp_path / "moved.jsonl"
    chats.write_text(chat_file.read_text())
    where.target.rename(moved)
    elsewhere = where._replace(target=moved, work=tmp_path / "other", train=str(chats))
    assert plain == recipes.run_key({}, 0, elsewhere)
    chats.write_text(chat_file.read_text() * 2)
    keys.append(recipes.run_key({}, 0, elsewhere))
    save_file({"weight": torch.ones(2, 2)}, moved / "model.safetensors")
    keys.append(recipes.run_key({}, 0, elsewhere))
    assert len({*keys}) == len(keys) == 7


def test_a_further_call_keeps_the_other_runs(recipes, where, tmp_path, capsys):
    arguments = Namespace(device="cpu", tokens=0, train="", out=tmp_path, sampled_tokens=0, expected=False)
    file, reference = tmp_path / "default.json", recipes.SETS["default"]["reference"]
    of_reference = {"recipe": "reference", "seed": 0, "key": recipes.run_key(reference, 0, where)}
    of_default = {"recipe": "default", "seed": 1, "key": recipes.run_key({}, 1, where)}
    recipes.write(arguments, "default", [of_reference])
    kept = recipes.kept_runs(file, "default", {("default", 1)}, where)
    recipes.write(arguments, "default", [*kept, of_default])
    written = json.loads(file.read_text())
    assert written["runs"] == [of_reference, of_default]
    what = "--set default --device cpu --seeds 0,1 --only 'reference;default' --sampled-tokens 0"
    assert written["command"].endswith(what)

    today = where._replace(code="changed")
    with pytest.raises(SystemExit, match="'reference', seed 0, is of another recipe, target, code or other chats"):
        recipes.kept_runs(file, "default", {("default", 1)}, today)
    assert not recipes.kept_runs(file, "default", {("reference", 0), ("default", 1)}, today)


def test_a_recipe_is_compared_with_the_first_of_the_same_seed(recipes):
    def run(recipe, seed, tau):
        return {"recipe": recipe, "seed": seed, "tau": tau, "tau_at_temperature_1": None, "heldout_tau": 1.5}

    runs = [run("first", 0, 1.0), run("first", 1, 2.0), run("second", 1, 2.2), run("second", 2, 5.0)]
    assert recipes.table(runs).splitlines()[2:] == [
        "| first | 2 | 1.500 ± 0.707 |  | 1.500 ± 0.000 |  |",
        "| second | 2 | 3.600 ± 1.980 | +10.0 % | 1.500 ± 0.000 | +0.0 % |",
    ]


def test_variants_take_what_they_replace_takes(recipes):
    def of(function):
        return [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]

    for name, make in recipes.PATCHES.items():
        patched = make()
        replaced, new = getattr(patched.getter(), patched.attribute), patched.new
        assert of(new) == of(replaced), name
        methods = [each for each in vars(new) if inspect.isclass(new) and inspect.isfunction(vars(new)[each])]
        assert all(of(getattr(new, each)) == of(getattr(replaced, each)) for each in methods), name


@pytest.mark.parametrize("patch, goes_on", [("ema", False), ("frozen_lm_head", True)])
def test_a_run_goes_on_only_when_its_checkpoint_holds_all_of_it(patch, goes_on, recipes, where, tmp_path, monkeypatch):
    def train(recipe):
        assert (Path(recipe.train.out) / "checkpoints").exists() == goes_on
        return {"ended": "SIGTERM"}

    monkeypatch.setattr(recipes, "train", train)
    (where.work / "run-key" / "train" / "checkpoints").mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt):
        recipes._run("a", {"patch": patch}, 0, where, "key")
