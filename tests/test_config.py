"""Recipes, overrides, and what is said when they are wrong."""

from dataclasses import asdict

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle3_xla.config import Recipe, load_recipe, recipe_names
from eagle3_xla.errors import UserError
from eagle3_xla.outputs import claim_output, write_run_file


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load(name, tmp_path):
    recipe = load_recipe(name, ["train.lr=0.5"])
    assert recipe.train.lr == 0.5
    write_run_file(recipe, tmp_path, "train")
    assert load_recipe(str(tmp_path / "run.yaml"), []) == recipe


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.learning_rate=1", r"unknown setting train.learning_rate; the nearest known one is train\."),
        ("train.warmupp=0.1", "nearest known one is train.warmup"),
        ("trian.lr=1", "unknown setting trian; the nearest known one is train"),
        ("train.epochs=many", "train.epochs"),
        ("xla.device=tpu", "setting xla.device is 'tpu'; choose one of xla, cpu, cuda"),
        ("train.epochs=0", "train.epochs is 0; it must be in \\[1, 1000000\\]"),
        ("loss.objective=mse", "choose one of kl, reverse_kl, tv, lk_alpha, lk_lambda, or a sum of them"),
        ("loss.objective=kl+kl", "each once"),
        ("loss.objective=kl+0*tv", "weights above 0"),
        ("loss.objective=kl-tv", "such as kl"),
        ("train=3", "setting train is a section"),
        ("loss.decay=2", "must be in"),
        ("train.lr=nan", "train.lr is nan; a finite number"),
        ("train.lr=0", r"train.lr is 0.0; it must be in \(0, 1000\]"),
        ("xla.peak_tflops=inf", "xla.peak_tflops is inf; a finite number"),
        ("train.max_grad_norm=1e400", "train.max_grad_norm is inf; a finite number"),
        ("train.beta1=1", r"train.beta1 is 1.0; it must be in \[0, 1\)"),
        ("train.weight_decay=-1", "train.weight_decay is -1.0; it must be at least 0"),
        ('data.train=[{"path":"a","share":nan}]', r"data.train\[0\].share is nan"),
        ('data.train=[{"path":"a","cap":-1}]', r"data.train\[0\].cap is -1; it must be at least 0"),
        ("data.train=[a] data.conversations=9", r"is 9 \(perhaps the recipe's\), but no source has a share: give each"),
        ('data.train=[{"path":"a","share":1}]', "its sources have shares; of how many, say in data.conversations"),
        ('data.heldout=[{"path":"a","share":1}]', r"data.heldout\[0\].share is 1; .* give a held-out source a cap"),
        ('data.train=[{"path":"a","config":"b","file":"c"}]', r"train\[0\] has config 'b' and file 'c'; .* leave one"),
        ("data.seed=-1", "data.seed is -1; it must be at least 0"),
        ("train.epochs=99999999999999999999", "train.epochs is 9+; a finite number is expected, whole ones below"),
        ("data.train=[unclosed", r"setting data.train=\[unclosed: not valid YAML"),
        ("data.train={a:1}", "setting data.train is a list"),
        ("data.train=my.jsonl", r"setting data.train is a list; give it as \[my.jsonl\]"),
        ("data.buckets=64", r"setting data.buckets is a list; give it as \[64\]"),
        ("data.buckets=[64]", r"setting data.buckets is \[64\], which data.packing=packed has no use for"),
        ("data.languages=null", r"setting data.languages is a list; give it as \[...\]"),
        ("data.train.0=a", "setting data.train is a list"),
        ("target.path=a\0b", r"setting target.path is 'a\\x00b'; text in UTF-8 without NUL is expected"),
        ("target.path=a\udcff", r"setting target.path is 'a\\udcff'; text in UTF-8"),
        ("data.languages=[a\0b]", "setting data.languages=.*not valid YAML"),
        ('data.languages=["\\ud800"]', "not valid YAML"),
        ("xla.draft_data_parallel=true xla.tp=3", "train.batch_size is 4, no multiple of xla.tp"),
    ],
)
def test_bad_settings(override, message):
    with pytest.raises(UserError, match=message):
        load_recipe(None, override.split())


TEXTS = ["work/run #2", "2024_05_01", "001", "1e3", "12:30", "on", "null", "", "[a", "a: b", "'quoted'", "a=b"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_setting_is_what_it_says(text, tmp_path):
    recipe = load_recipe(None, [f"train.out={text}", f"plan.xla_flags={text}"])
    assert (recipe.train.out, recipe.plan.xla_flags) == (text, text)
    write_run_file(recipe, tmp_path, "train")
    assert load_recipe(str(tmp_path / "run.yaml"), []) == recipe


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("target: {path: ~/target}\ndata: {heldout: [{path: ~/held.jsonl}]}\n")
    given = ["data.prepared=~/data", "train.out=~/run", "train.warm_start=~/head", "data.train=[~/a, b~/~]"]
    recipe = load_recipe("~/mine.yaml", [*given, "data.decontaminate=[~/c]"])
    assert (recipe.target.path, recipe.data.heldout[0].path) == (f"{tmp_path}/target", f"{tmp_path}/held.jsonl")
    assert (recipe.data.prepared, recipe.train.out) == (f"{tmp_path}/data", f"{tmp_path}/run")
    assert recipe.train.warm_start == f"{tmp_path}/head" and recipe.data.decontaminate == [f"{tmp_path}/c"]
    assert [source.path for source in recipe.data.train] == [f"{tmp_path}/a", "b~/~"]


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
    for text, message in (
        ("- 1\n", "a mapping of sections"),
        ("1\n", "not readable"),
        ("? null\n: 1\n", "Incompatible key type"),
        ("\0", "not valid YAML"),
        ("train: {lr: 2001-99-99}\n", "setting train.lr"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            load_recipe(str(file), [])
    file.write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(UserError, match="broken.yaml: not "):
        load_recipe(str(file), [])


def test_recipes_that_build_on_others(tmp_path):
    """A recipe's own values win over its base's, which may lie beside it or ship; run.yaml holds the resolved one."""
    (tmp_path / "deep").mkdir()
    mine, lower, lowest = tmp_path / "mine.yaml", tmp_path / "deep" / "lower.yaml", tmp_path / "deep" / "lowest.yaml"
    mine.write_text("base: deep/lower.yaml\ntrain: {lr: 1e-3}\ndata: {train: [a.jsonl]}\n")
    lower.write_text("base: lowest.yaml\ntrain: {lr: 2e-3, epochs: 5}\n")
    data = "data: {train: [b, c], conversations: 0}"
    lowest.write_text(f"base: qwen2.5-7b-v4-32\ntrain: {{epochs: 6, batch_size: 4}}\n{data}\n")
    recipe = load_recipe(str(mine), ["train.warmup=0.5"])
    assert (recipe.train.lr, recipe.train.epochs, recipe.train.batch_size, recipe.train.warmup) == (1e-3, 5, 4, 0.5)
    assert recipe.target.path == "Qwen/Qwen2.5-7B-Instruct" and [s.path for s in recipe.data.train] == ["a.jsonl"]
    write_run_file(recipe, tmp_path, "train")
    assert "base" not in yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert load_recipe(str(tmp_path / "run.yaml"), []) == recipe
    for text, message in (
        ("base: nowhere\n", "no recipe 'nowhere', which .*lowest.yaml builds on; a YAML file or one of: .*smollm2-cpu"),
        ("base: ../mine.yaml\n", "mine.yaml: its bases lead back to it: .*mine.yaml -> deep/lower.yaml -> lowest.yaml"),
        ("base: [a, b]\n", r"lowest.yaml: base is \['a', 'b'\]; the name of one recipe is expected"),
        ("base: ..\n", "no recipe '..', which lowest.yaml builds on"),
        ("base: base\ntrain: {lrr: 1}\n", "unknown setting train.lrr"),
    ):
        lowest.write_text(text)
        with pytest.raises(UserError, match=message):
            load_recipe(str(mine), [])


ODD = "nan inf 1e400 -1 null true [] {} [null] [[]] ??? ${data.seed} ${x ${oc.env:NOPE} [unclosed *x | > ~".split()
ODD += ["\0", "\ud800", "&a [*a]", "!!python/object:os.system", "2001-99-99", "- a", ": ", "9" * 40]
SETTINGS = [f"{section}.{key}" for section, settings in asdict(Recipe()).items() for key in settings]
VALUES = st.one_of(st.sampled_from(ODD), st.text(max_size=12), st.integers().map(str), st.floats().map(str))
KEYS = st.sampled_from([name for setting in SETTINGS for name in setting.split(".")])
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(ODD))
TREES = st.recursive(LEAVES, lambda t: st.lists(t, max_size=3) | st.dictionaries(KEYS | LEAVES, t, max_size=3))


def one_line_or_none(*arguments):
    try:
        load_recipe(*arguments)
    except UserError as error:
        assert str(error).isprintable()


@settings(deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.builds("{}{}={}".format, st.sampled_from(SETTINGS) | st.text(), st.sampled_from(["", "[0].path"]), VALUES)
    )
)
def test_no_value_surprises(overrides):
    one_line_or_none(None, overrides)


@settings(deadline=None, derandomize=True, database=None)
@given(TREES.map(lambda tree: yaml.safe_dump(tree).encode()) | st.binary(max_size=20))
def test_no_recipe_file_surprises(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    file.write_bytes(content)
    one_line_or_none(str(file), [])


def test_whose_an_output_folder_is(tmp_path):
    """New, empty and its own folders are the verb's; everything else stays as it is."""
    mine = tmp_path / "deep" / "mine"
    for _ in range(2):
        assert claim_output(mine, "prepare") == mine
    (mine / ".partial-run.yaml").write_text("cut off by a kill")
    claim_output(mine, "prepare")
    write_run_file(load_recipe(None, []), mine, "prepare")
    (mine / "manifest.json").write_text("{}")
    claim_output(mine, "prepare")
    message = r"not ours to write to: `train` did not make it \(`prepare` wrote it\); choose another folder$"
    with pytest.raises(UserError, match=message):
        claim_output(mine, "train")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "run.yaml").write_text("my: own\n")
    with pytest.raises(UserError, match=r"it holds run.yaml\); choose another folder, or give --overwrite"):
        claim_output(foreign, "prepare", overwrite=False)
    claim_output(foreign, "prepare", overwrite=True)
    claim_output(foreign, "export", ours=lambda folder: (folder / "run.yaml").exists())
    with pytest.raises(UserError, match="is a file, or lies in one"):
        claim_output(foreign / "run.yaml" / "a", "prepare")
    assert [file.name for file in foreign.iterdir()] == ["run.yaml"]
