"""`plan` with the real TPU compiler, on Qwen2.5-7B with 8 of its 28 layers and rows of 128 tokens."""

import contextlib
import fcntl
import json
import os
import re
from importlib import resources
from pathlib import Path

import pytest
import torch_xla

from eagle3_xla.config import load_recipe
from eagle3_xla.data.prepare import load_prepared, prepare
from eagle3_xla.plan.rows import as_the_run, planned_tokens, run_graphs
from eagle3_xla.plan.verdict import advice, loaded_graphs
from eagle3_xla.target.known import plan_config
from eagle3_xla.xla.tpu import V5E, Memory, find_topology, libtpu_flags

RECIPE = "qwen2.5-7b-v4-32"


def write_config(folder, **changes):
    """A folder with a config.json alone: Qwen2.5-7B, 8 layers and `changes`."""
    shipped = resources.files("eagle3_xla.target") / "configs" / "Qwen--Qwen2.5-7B-Instruct" / "config.json"
    config = json.loads(shipped.read_text()) | {"num_hidden_layers": 8} | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("shallow"))


@pytest.mark.slow
def test_the_reference_recipe_fits_and_moves_what_it_should(forks, shallow):
    done = forks.run(
        "plan", "--config", RECIPE, "--json", f"--target.path={shallow}", "--loss.ttt_length=1", "--data.row_length=128"
    )
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout)
    assert verdict["topology"] == "v4-32" and verdict["chips"] == 16 and verdict["fits"]
    assert verdict["hbm_bytes_per_chip"] < 0.25 * verdict["hbm_limit_bytes"]
    # Not donated: the metrics and the gradients' norm, and the table of outputs.
    assert verdict["state_donated"] and verdict["hbm"]["aliased"] == verdict["hbm"]["outputs"] - 1536
    assert verdict["collectives"] == {"all-gather": 34, "all-reduce": 20, "collective-permute": 60}
    assert 0.1 < verdict["mfu"] < 1


def test_what_cannot_fit_is_said_before_compiling(forks, small_run, tmp_path):
    """Weights of 26 GB on a chip of 16. Rows and draft vocabulary are those of the prepared data, as in a run."""
    recipe = load_recipe(None, small_run)
    rows, words = (prepare(recipe)[name] for name in ("row_length", "draft_vocab_size"))
    wide = f"--target.path={write_config(tmp_path, intermediate_size=151552)}"
    more = [f"--data.prepared={recipe.data.prepared}", "--train.reuse_states=true"]
    done = forks.run("plan", "--config", RECIPE, wide, "--topology", "v5e-16", "--xla.dp=16", "--xla.tp=1", *more)
    assert done.returncode == 1, done.stderr
    for part in (
        "does not fit v5e-16: 16 chips, dp=16 x tp=1",
        "of 15.75 GiB",
        "bfloat16[152064,3584]  model.model.embed_tokens.weight",
        "larger xla.tp",
        f"data.row_length is {rows}, that of the prepared data, not 1024",
        f"data.draft_vocab_size is {words}, that of the prepared data, not 32000",
        "train.reuse_states spares the target's forward",
    ):
        assert part in done.stdout
    assert "xla.remat" not in done.stdout  # no activation is the reason


@pytest.mark.parametrize(
    "settings, advised",
    [
        (["xla.dp=16", "xla.tp=1"], ["batch_size=8 gradient_accumulation=2", "tp=2 dp=8 gradient_accumulation=2"]),
        ([], ["batch_size=8 gradient_accumulation=2"]),  # tp is 4, as many as the target's key-value heads
        (["train.batch_size=12"], ["batch_size=4 gradient_accumulation=3"]),  # the draft phase deals them to 4 devices
        (["train.batch_size=4"], []),
        (
            ["xla.dp=8", "xla.tp=2", "train.batch_size=6"],
            ["batch_size=2 gradient_accumulation=3"],  # 4 devices of a replica can't deal 6 rows
        ),
        (
            ["xla.dp=8", "xla.tp=2", "train.batch_size=5", "xla.draft_data_parallel=false"],
            ["batch_size=1 gradient_accumulation=5", "tp=4 dp=4 gradient_accumulation=2"],
        ),
    ],
)
def test_what_helps_is_accepted_and_the_same_update(settings, advised):
    recipe = load_recipe(RECIPE, settings)
    ways = [way for way in advice(recipe, plan_config(recipe.target.path), at_rest=False).split("; ") if "=" in way]
    found = [re.findall(r"(\w+\.\w+=\w+)", way) for way in ways]
    assert found.pop(0) == ["xla.remat=true"]
    assert [" ".join(each).replace("train.", "").replace("xla.", "") for each in found] == advised

    def rows(recipe):
        return recipe.xla.dp * recipe.train.batch_size * recipe.train.gradient_accumulation

    changed = [load_recipe(RECIPE, settings + each) for each in found]
    assert {rows(each) for each in changed} <= {rows(recipe)}
    assert {each.xla.dp * each.xla.tp for each in changed} <= {16}


REFUSED = [
    (["--topology", "v9-1"], "unknown topology 'v9-1'; known: v4-8 = v4:2x2x1, 4 chips, "),
    (["--topology", "v4-16"], "xla.dp * xla.tp = 4 * 4 = 16, but v4-16 has 8 chips"),
    (
        ["--train.batch_size=8", "--xla.dp=2", "--xla.tp=8"],
        "xla.tp is 8, which does not divide the target's num_key_value_heads 4",
    ),
    (["--draft.key_value_heads=2"], "xla.tp is 4, which does not divide draft.key_value_heads 2"),
    (["--xla.device=cpu"], "xla.device is cpu"),
    (["--target.path=/nowhere"], "no target at '/nowhere'"),
    (["--xla-flags=--xla_a=1 nonsense"], "setting plan.xla_flags: 'nonsense' is no flag; --xla_NAME=VALUE"),
    (["--data.row_length=65536"], "setting data.row_length: rows of 65536 tokens are longer than the 32768 positions"),
    (["--plan.layers=7"], "plan.layers is 7; the target has 28: give 0 for all of them, or from 8 to 24"),
]


@pytest.mark.parametrize("arguments, line", REFUSED, ids=[arguments[-1] for arguments, _ in REFUSED])
def test_refused(forks, arguments, line):
    done = forks.run("plan", "--config", RECIPE, *arguments)
    assert done.returncode == 2 and line in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_held_compiler_lock_is_no_obstacle(forks):
    code = "import os; from eagle3_xla.xla.tpu import *; print(len(topology_devices(find_topology('v4-32'))))\n"
    code += "print(os.environ['LIBTPU_INIT_ARGS'])"
    with open("/tmp/libtpu_lockfile", "a") as lock:
        with contextlib.suppress(BlockingIOError):  # another test's compiler holds it
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as libtpu takes it
        done = forks.run_code(code)
    assert done.stdout == f"16\n{libtpu_flags(find_topology('v4-32'))}\n", done.stderr


@pytest.mark.parametrize("topology", ["v4-32", "v5e-16", "v5p-16", "v6e-8"])
def test_the_compiler_has_the_flags_of_a_run(monkeypatch, topology):
    """Those that torch_xla gives libtpu on a host with such chips; the user's own stay."""
    monkeypatch.setattr("torch_xla._internal.tpu.version", lambda: int(topology[1]))
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_latency_hiding_scheduler_rerun=2")
    torch_xla._setup_libtpu_flags()
    as_run = os.environ["LIBTPU_INIT_ARGS"]
    monkeypatch.undo()
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_latency_hiding_scheduler_rerun=2")
    before = dict(os.environ)
    assert libtpu_flags(find_topology(topology)) == as_run
    assert before == dict(os.environ)
    assert as_run.startswith("--xla_latency_hiding_scheduler_rerun=2 --xla")
    assert ("xla_enable_async_all_gather" in as_run) == (topology[1] == "5")


def test_a_missing_compiler_is_named(forks, shallow):
    without = "import runpy, sys; sys.modules['libtpu'] = None\n"
    without += "runpy.run_module('eagle3_xla', run_name='__main__', alter_sys=True)"
    done = forks.run_code(without, "plan", "--config", RECIPE, f"--target.path={shallow}")
    assert done.returncode == 2
    assert "the TPU compiler is not installed" in done.stderr and "eagle3-xla[plan]" in done.stderr


def test_prepared_data_says_how_long_a_run_is(small_run, tmp_path):
    """And the recipe's own assumption only while there is none."""
    assumed = load_recipe(RECIPE, []).plan.tokens
    for packing in ("packed", "bucketed"):
        own = ["data.conversations=0", f"data.packing={packing}", "train.batch_size=4"]
        own += ["data.buckets=[52]"] if packing == "bucketed" else []
        recipe = load_recipe(RECIPE, [*small_run, *own, "xla.dp=1", "xla.tp=1", f"data.prepared={tmp_path / packing}"])
        assert planned_tokens(recipe) == (assumed, "plan.tokens") and assumed > 1e8
        buckets = prepare(recipe)["train"].get("buckets")
        rows = load_prepared(recipe.data.prepared)[0]
        lengths = [len(row["input_ids"]) for row in rows]
        assert (len(set(lengths)) == 1) == (packing == "packed")
        assert planned_tokens(recipe) == (sum(lengths) * 2, "data.prepared")  # two epochs
    (short, _, many), (long, _, few) = buckets
    recipe.train.batch_size = few + 1  # rows of a length that fills no batch are none of the run's
    assert planned_tokens(recipe) == (short * many * 2, "data.prepared")
    planned, notes = as_the_run(recipe)
    assert planned.data.row_length == short
    assert notes == [
        f"data.row_length is {short}, that of the longest prepared rows that fill a batch of {few + 1}, not {long}"
    ]
    recipe.train.batch_size = many + few  # what no length fills, train refuses
    planned, notes = as_the_run(recipe)
    assert planned.data.row_length == long
    assert notes == [f"the {many + few} prepared rows fill no batch of {many + few}, so a run refuses them"]


def test_a_plan_is_of_the_rows_and_the_vocabulary_of_its_run(small_run, exported_head):
    asked = [*small_run, "data.row_length=48", "data.draft_vocab_size=64"]
    warm = [*asked, f"train.warm_start={exported_head}"]
    recipe, notes = as_the_run(load_recipe(None, warm))  # before anything is prepared
    assert (recipe.data.row_length, recipe.data.draft_vocab_size) == (48, 128)
    assert notes == ["data.draft_vocab_size is 128, that of the head of train.warm_start, not 64"]
    prepare(load_recipe(None, [*small_run, "data.draft_vocab_size=96"]))
    recipe, notes = as_the_run(load_recipe(None, asked))
    assert (recipe.data.row_length, recipe.data.draft_vocab_size) == (64, 96)
    assert "data.row_length is 64, that of the prepared data, not 48" in notes[0] and len(notes) == 2
    recipe, _ = as_the_run(load_recipe(None, warm))
    assert (recipe.data.row_length, recipe.data.draft_vocab_size) == (64, 128)  # the head keeps its own


def test_the_code_of_more_graphs_than_usual_is_said():
    """A run keeps its graphs loaded; what is compiled is one step."""
    name, memory = "qwen2.5-3b-v5e-8", Memory(6624456704, 321021952, 321020416, 7234632704, 456700928)

    def said(*settings):
        graphs = run_graphs(load_recipe(name, settings))
        return sum(graphs.values()), loaded_graphs(graphs, memory, V5E.hbm_bytes)

    assert said() == (3, []) and said("train.gradient_accumulation=1") == (2, [])
    count, (note,) = said("loss.ttt_warmup=0.3")
    assert count == 9 and "9 graphs loaded (gradients, TTT 1 1, gradients, TTT 2 1, " in note
    assert note.endswith("may need up to 2.98 GiB; with that it does not fit: 16.31 of 15.75 GiB")
    count, (note,) = said("data.packing=bucketed", "data.buckets=[512]")
    assert count == 5 and note.endswith("may need up to 1.28 GiB")


# Verdicts of a recipe with each of two folders of prepared data.
PLANS = """
import json, os, sys
from eagle3_xla.config import load_recipe
from eagle3_xla.plan.verdict import compile_verdict
for folder in sys.argv[1:3]:
    print(json.dumps(compile_verdict(load_recipe(None, [*sys.argv[3:], "data.prepared=" + folder]))))
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.slow
def test_prepared_data_says_how_much_is_drafted(forks, small_run, tmp_path):
    """The run computes an answer's positions alone, and so does its plan once the rows are there."""
    settings = [*small_run, "xla.device=xla", "xla.dp=4", "train.batch_size=4", "plan.topology=v4-8"]
    settings += ["loss.ttt_length=1"]
    folder = load_recipe(None, small_run).data.prepared
    prepare(load_recipe(None, small_run))
    done = forks.run_code(PLANS, tmp_path / "none", folder, *settings)
    assert done.returncode == 0, done.stderr
    verdicts = [json.loads(line) for line in done.stdout.splitlines()]
    assert verdicts[1]["flops_per_chip"] < 0.95 * verdicts[0]["flops_per_chip"]
    assert verdicts[1]["collectives"] == verdicts[0]["collectives"]  # what is listed stays on its device
    assert verdicts[0]["tokens"] is None and verdicts[1]["tokens"] > 0
    rows = sum(file.stat().st_size for file in Path(folder).glob("train/*.arrow"))
    assert verdicts[1]["disk_bytes"]["prepared_rows"] == pytest.approx(rows, rel=0.1)
