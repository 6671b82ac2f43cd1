"""Recipes, overrides, and what is said when they are wrong."""

import pytest

from eagle3_xla.config import UserError, load_recipe, recipe_names, write_run_file


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load(name, tmp_path):
    recipe = load_recipe(name, ["train.lr=0.5"])
    assert recipe.train.lr == 0.5
    write_run_file(recipe, tmp_path)
    assert load_recipe(str(tmp_path / "run.yaml"), []) == recipe


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.learning_rate=1", r"unknown setting train.learning_rate; the nearest known one is train\."),
        ("train.warmupp=0.1", "nearest known one is train.warmup"),
        ("trian.lr=1", "unknown setting trian; the nearest known one is train"),
        ("train.epochs=many", "train.epochs"),
        ("train.epochs=0", "train.epochs is 0; it must be at least 1"),
        ("loss.objective=mse", "choose one of kl, lk_alpha, lk_lambda"),
        ("train=3", "setting train is a section"),
        ("loss.decay=2", "must be in"),
        ("xla.draft_data_parallel=true xla.tp=3", "train.batch_size is 4, no multiple of xla.tp"),
    ],
)
def test_bad_settings(override, message):
    with pytest.raises(UserError, match=message):
        load_recipe(None, override.split())


def test_bad_recipe_files(tmp_path):
    with pytest.raises(UserError, match="no recipe 'nonsense'; a YAML file or one of: .*smollm2-cpu"):
        load_recipe("nonsense", [])
    file = tmp_path / "broken.yaml"
    file.write_text("train: [1,")
    with pytest.raises(UserError, match="broken.yaml: not valid YAML"):
        load_recipe(str(file), [])
    file.write_text("train:\n  lrr: 1\n")
    with pytest.raises(UserError, match="unknown setting train.lrr; the nearest known one is train.lr"):
        load_recipe(str(file), [])
    file.write_text("- 1\n")
    with pytest.raises(UserError, match="a mapping of sections"):
        load_recipe(str(file), [])
