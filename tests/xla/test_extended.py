"""A plan from few layers says what one of all layers says; the disk that a plan asks for is what a run writes."""

import json
from pathlib import Path

import pytest

from eagle3_xla.config import load_recipe
from eagle3_xla.data.prepare import prepare
from eagle3_xla.plan import compiled
from eagle3_xla.plan.compiled import extended_memory
from eagle3_xla.plan.depth import layer_period, with_layers
from eagle3_xla.plan.disk import checkpoint_bytes, disk_bytes
from eagle3_xla.target.known import plan_config
from eagle3_xla.train.loop import train
from eagle3_xla.xla.aot import Argument, LoweredStep
from eagle3_xla.xla.tpu import GIB, DoesNotFit, Memory, find_topology

# Verdicts of a recipe with the settings after the first argument and, one after the other, each of the first's.
PLANS = """
import json, os, sys
from eagle3_xla.config import load_recipe
from eagle3_xla.errors import UserError
from eagle3_xla.plan.verdict import compile_verdict
for change in sys.argv[1].split("; "):
    try:
        print(json.dumps(compile_verdict(load_recipe("qwen2.5-7b-v4-32", [*sys.argv[2:], change]))))
    except UserError as error:
        print(error)
sys.stdout.flush()
os._exit(0)
"""


def small_config(folder, **changes):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = (
        plan_config("Qwen/Qwen2.5-7B-Instruct").to_dict()
        | sizes
        | {"vocab_size": 1024, "num_hidden_layers": 12, "layer_types": ["full_attention"] * 12}
    )
    (folder / "config.json").write_text(json.dumps(config | changes))
    return f"target.path={folder}"


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["split over tp", "rows over all chips"])
def test_few_layers_extended_are_all_layers(forks, tmp_path, draft):
    # 13: with 12 the larger of the few that are compiled, 8 and 12, would be all of them.
    target = small_config(tmp_path, num_hidden_layers=13, layer_types=["full_attention"] * 13)
    settings = [target, "plan.topology=v4-8", "xla.dp=2", "xla.tp=2", "data.row_length=128"]
    settings += ["data.draft_vocab_size=512", "train.batch_size=2", "loss.ttt_length=1"]
    settings += [f"xla.draft_data_parallel={str(draft == 'rows over all chips').lower()}"]
    done = forks.run_code(PLANS, "plan.layers=0; plan.layers=8", *settings)
    every, few = map(json.loads, done.stdout.splitlines())
    assert not every["extrapolated"] and few["extrapolated"] and (few["layers"], few["compiled_layers"]) == (13, 8)
    for key in ("flops_per_chip", "modelled_step_seconds", "mfu", "host_step_seconds"):
        assert few[key] == pytest.approx(every[key], rel=0.01), key
    for part in ("arguments", "outputs", "aliased", "code"):  # temporaries: such small weights move onto the chip
        assert few["hbm"][part] == pytest.approx(every["hbm"][part], rel=0.01), part
    assert few["collectives"] == every["collectives"] and few["state_donated"]
    assert every["host_is_the_limit"] and 0.005 < every["host_step_seconds"] < 0.02


def test_memory_never_shrinks_with_depth():
    """The compiler found less code and fewer temporaries for 12 layers than for 8: 20 more have no less than 8."""
    step, low, high = Memory(70, 20, 10, 400, 40), Memory(60, 2, 0, 300, 40), Memory(80, 2, 0, 200, 20)
    assert extended_memory(step, low, high, 5) == Memory(170, 20, 10, 400, 40)
    assert extended_memory(step, low, high._replace(temporaries=310, code=42), 5) == Memory(170, 20, 10, 450, 50)


def test_a_refusal_of_few_layers_is_told_for_all(monkeypatch):
    """The compiler refuses a step of 8 of 80 layers: the others' weights are needed beside what it says."""

    def refuse(*_):
        raise DoesNotFit(110 * GIB, [])

    head, layer = Argument("head", "", GIB), Argument("layer", "", GIB // 100)
    steps = [LoweredStep(b"", arguments, []) for arguments in ([head, *[layer] * 8], [layer] * 8, [layer] * 12)]
    monkeypatch.setattr(compiled, "lowered_steps", lambda *_: steps)
    monkeypatch.setattr(compiled, "compile_for", refuse)
    recipe = load_recipe("qwen2.5-72b-v5p-16", ["plan.layers=8"])
    with pytest.raises(DoesNotFit) as refusal:
        compiled.compile_step(recipe, plan_config(recipe.target.path), find_topology(recipe.plan.topology))
    assert refusal.value.needed == 110 * GIB + 72 * layer.bytes


def test_a_flag_that_the_compiler_lacks(forks, tmp_path):
    settings = [small_config(tmp_path), "plan.topology=v4-8", "xla.dp=2", "xla.tp=2"]
    done = forks.run_code(PLANS, "plan.xla_flags=--xla_nonsense=1", *settings)
    assert done.stdout == "setting plan.xla_flags: No such compile option: 'xla_nonsense'\n"


@pytest.mark.slow
def test_recipes_are_planned_once(forks, tmp_path):
    """The command that plans the shipped recipes, on one of them with a small target, one TTT step, short rows."""
    target = small_config(tmp_path, num_hidden_layers=8, layer_types=["full_attention"] * 8)
    name, script = "qwen2.5-0.5b-v5e-8", Path(__file__).parents[2] / "benchmarks" / "recipes_plan.py"
    arguments = [name, "--out", str(tmp_path / "plans"), f"--{target}", "--data.draft_vocab_size=512"]
    arguments += ["--data.row_length=128", "--loss.ttt_length=1", "--train.batch_size=1"]
    code = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    first = forks.run_code(code, *arguments)
    assert first.returncode == 0, first.stderr
    verdict = json.loads((tmp_path / "plans" / f"{name}.json").read_text())
    assert verdict["fits"] and verdict["topology"] == "v5e-8" and not verdict["extrapolated"]
    assert f"| `{name}` | 8 x 1 | 8 |" in first.stdout
    again = forks.run_code(code, *arguments)
    assert again.returncode == 0 and again.stderr == f"{name} ...\n{name}: planned before\n"


def test_layers_of_several_kinds_are_cut_by_their_period():
    windows, dense = plan_config("openai/gpt-oss-20b"), plan_config("Qwen/Qwen3-8B")
    assert (layer_period(windows), layer_period(dense)) == (2, 1)
    assert with_layers(windows, 4).layer_types == windows.layer_types[:4] and windows.num_hidden_layers == 24


@pytest.mark.parametrize(
    "target, size",
    [("Qwen/Qwen2.5-7B-Instruct", 15_231_233_024), ("openai/gpt-oss-20b", 13_761_264_768)],  # total_size of the index
)
def test_a_target_is_as_large_as_its_checkpoint(target, size):
    assert checkpoint_bytes(plan_config(target)) == pytest.approx(size, rel=1e-6)


def test_a_run_needs_the_disk_that_is_planned(small_run):
    settings = [*small_run, "train.keep=2", "train.save_every=1"]
    recipe = load_recipe(None, settings)
    target, rows = plan_config(recipe.target.path), prepare(recipe)["train"]["rows"]
    train(recipe, max_steps=3)
    held = Path(recipe.train.out).glob("*/step-*")  # the untrained head's and the last two
    sizes = [sum(file.stat().st_size for file in folder.iterdir()) for folder in held]
    assert len(sizes) == 3
    planned = disk_bytes(recipe, target, recipe.train.epochs * rows * 64)
    # Beside them the best one, where it is none of these, and the one that is being written.
    assert planned["checkpoints"] == pytest.approx(sum(sizes) + 2 * max(sizes), rel=0.05)
    assert planned["target_download"] == 0 and planned["prepared_rows"] == rows * 648
    assert planned["total"] == planned["checkpoints"] + planned["prepared_rows"]

    in_bucket = load_recipe(None, [*settings, "target.path=gs://bucket/target", "train.out=gs://bucket/run"])
    planned = disk_bytes(in_bucket, target, None)
    assert planned["target_download"] == 0
    assert planned["checkpoints"] == pytest.approx(max(sizes), rel=0.05)  # on its way
