"""The quickstart as a user gets it, on the embedded target."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from eagle3_xla import quickstart as module
from eagle3_xla.config import load_recipe
from eagle3_xla.data.prompts import read_prompts
from eagle3_xla.errors import UserError
from eagle3_xla.evaluate.decode import Generation
from eagle3_xla.evaluate.options import EvalOptions
from eagle3_xla.evaluate.run import evaluate
from eagle3_xla.live import Screen, Stage
from eagle3_xla.machine import REFERENCE_GFLOPS, Machine
from eagle3_xla.outputs import WRITTEN_BY
from eagle3_xla.quickstart import ALL_TOKENS, LEAST_TOKENS, USEFUL_TOKENS
from eagle3_xla.serve.push import PushOptions, push


@pytest.mark.slow
def test_quickstart(quickstart_run, installed_wheel, tmp_path, monkeypatch):
    done, out = quickstart_run
    assert done.returncode == 0, done.stderr[-3000:]
    assert (installed_wheel / "eagle3_xla" / "recipes" / "smollm2-cpu.yaml").is_file()
    assert (installed_wheel / "share" / "eagle3-xla" / "patches").is_dir()
    for part in ("acceptance length tau", "same tokens as the target alone: yes", "Serve it", "launch_server"):
        assert part in done.stdout
    assert "1/5 target" in done.stderr and "this machine: " in done.stderr and "\033" not in done.stdout + done.stderr
    result = json.loads((out / "result.json").read_text())
    assert any(words.strip() for words, _ in result["answer"]["pieces"]) and result["answer"]["prompt"] in done.stdout
    assert result["eval"]["identical"] and result["tree"]["tau"] > 1.0
    assert "as a tree of 7" in done.stdout and "--speculative-num-draft-tokens 8 --dtype bfloat16" in done.stdout
    assert result["continued"] and "an earlier start had begun it" in done.stdout
    machine = Machine(**result["machine"])
    assert machine.gflops > 0.1 and machine.cores > 0 and 0 < machine.free_gib < 100_000
    assert machine.gflops == json.loads((out / "budget.json").read_text())["gflops"]  # measured by the first start
    assert result["training"]["tau"] > 1.05  # held-out rows; a few steps on 2,000 tokens
    assert load_file(out / "head" / "model.safetensors")["lm_head.weight"].shape == (8192, 576)
    assert "before training" in (out / "report.html").read_text() and result["eval"]["by_source"]
    assert list((out / "run" / "tensorboard").rglob("events.out.tfevents.*"))
    rows = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    # The step and the held-out evaluation: nothing compiles after the first steps, and nothing at all in bfloat16.
    assert {row["compilations"] for row in rows if "compilations" in row} == {0 if machine.bfloat16 else 2}

    # The card of this head has every section, each from a file of the run.
    head = shutil.copytree(out / "head", tmp_path / "head")
    monkeypatch.chdir(out.parent)  # the run's own paths are relative
    options = PushOptions([str(out / "result.json")], str(out / "run"), report=str(out / "report.html"), dry_run=True)
    left_out = push(head, str(out / "target"), "me/head", options)["left_out"]
    assert [missing.split(" (")[0] for missing in left_out] == [
        "plan figures",
        "licence of the head",
        "licence of the data",
        "the target's hub id",
        ".eval_results/acceptance_length.yaml",
    ]
    card = (head / "README.md").read_text()
    for how in ("greedy, chain of 5", "8 at once, greedy, tree of 7"):
        assert card.count(f"| own decoding, 2 prompts of heldout.jsonl, {how} drafts |") == 1
    for part in ("| train.jsonl of eagle3-xla |", "The target: apache-2.0", "| hours of training |", "(report.html)"):
        assert part in card


@pytest.mark.parametrize("bfloat16", [False, True])
def test_minutes_become_tokens_then_epochs(bfloat16):
    reference = Machine(2, REFERENCE_GFLOPS[bfloat16], True, bfloat16, 16.0)
    default, short, long = (module._budget(asked, reference) for asked in (None, 2, 300))
    assert LEAST_TOKENS < short.tokens < default.tokens < ALL_TOKENS and short.epochs == default.epochs
    assert long.tokens == 0 and long.epochs > short.epochs and module._budget(0.1, reference).epochs == 1
    assert load_recipe(module.RECIPE, []).data.max_tokens == 0  # somebody's own chats are not cut
    assert default.train_seconds + module.SECONDS[bfloat16].beside() == pytest.approx(8 * 60, rel=0.01)
    assert short.train_seconds == pytest.approx(120, rel=0.01)


def test_a_slow_machine_gets_less_and_is_told(tmp_path):
    slow = Machine(2, 41.25, False, False, 3.5)
    assert slow.slowness > 3
    budget = module._budget(None, slow)
    assert budget.tokens == USEFUL_TOKENS  # the eight minutes are not enough for more
    assert LEAST_TOKENS <= module._budget(0.1, slow).tokens < USEFUL_TOKENS
    heading = module._heading(slow, budget)
    assert "4.0 times slower" in heading and "no AVX-512" in heading and "with 3.5 GiB free it may be killed" in heading
    # Continued on the same machine, busier or not: the recipe stays; other minutes are another recipe.
    (tmp_path / "run.yaml").write_text(f"{WRITTEN_BY}quickstart\n")
    (tmp_path / "budget.json").write_text(json.dumps(budget._asdict()))
    assert module._earlier(tmp_path, None) == budget and module._earlier(tmp_path, 5.0) is None
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000100"
    checkpoint.mkdir(parents=True)
    with pytest.raises(UserError, match=r"holds a head of other --minutes; .* as before \(no --minutes\)"):
        module.quickstart(tmp_path, 5.0)
    for damaged in ('{"tok', "[1]", json.dumps(budget._asdict() | {"tokens": "many"})):
        (tmp_path / "budget.json").write_text(damaged)
        with pytest.raises(UserError, match="an earlier version began, or its budget.json is damaged"):
            module.quickstart(tmp_path, None)
    checkpoint.rmdir()
    assert module._earlier(tmp_path, None) is None


def test_pieces_of_an_answer(tokenizer):
    ids = tokenizer("The capital of that country is old.")["input_ids"]
    stop = tokenizer.eos_token_id
    # The prefill's token; a call with two accepted drafts; one with none; one that ends.
    generation = Generation([*ids, stop], 1.0, [2, 0, len(ids)])
    pieces = module.drafted_pieces(tokenizer, generation, {stop})
    assert "".join(words for words, _ in pieces) == "The capital of that country is old."
    assert pieces[:3] == [("The", False), (" capital of", True), (" that country", False)]


def test_the_first_answer_is_shown_while_it_is_measured(small_target, exported_head, tokenizer, tmp_path):
    screen, answers, shown = Screen([], tmp_path / "metrics.jsonl", "", tmp_path / "log.txt"), {}, []
    first = module._FirstAnswer(small_target, screen)

    def watch(prompt, generation):
        first(prompt, generation)
        answers[prompt] = generation
        shown.append("".join(words for words, _ in screen.spoken))

    options = EvalOptions(limit=2, max_new_tokens=6, batch_size=1, baseline=False)
    evaluate(str(small_target), str(exported_head), module.HELDOUT, options, watch=watch)
    assert len(answers) == 2 and shown[0] and len(set(shown)) > 3 and shown == sorted(shown, key=len)
    assert shown[-1] == tokenizer.decode(answers[0].tokens, skip_special_tokens=True)  # the first one's, to the end
    assert first.result()["prompt"] == read_prompts(module.HELDOUT, 1)[0].messages[-1]["content"]


def test_the_time_left_of_a_continued_stage_is_of_what_this_start_does(tmp_path, capsys):
    fresh = Stage("train", 100.0, started=0.0)
    assert fresh.left(30.0) == 70.0 and fresh.left(130.0) == 0.0
    fresh.share = 0.25
    assert fresh.left(30.0) == 90.0
    continued = Stage("train", 100.0, started=0.0, share=0.5, at_start=0.5)
    assert continued.left(0.0) == 50.0 and continued.left(10.0) == 40.0
    continued.share = 0.75
    assert continued.left(20.0) == 20.0

    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 6, "loss": 1.0}\n')
    screen = Screen([("train", 100.0), ("export", 10.0)], metrics, "", tmp_path / "log.txt")
    screen.steps, stage = 8, screen.stages[0]
    with screen.stage(0):
        assert capsys.readouterr().out == "1/2 train (all that is left: 35 s)\n" and stage.at_start == 0.75
        metrics.write_text('{"step": 4, "loss": 1.0, "tokens_per_second": 9}\n')  # from a checkpoint before it
        screen._picture()
        assert stage.share == stage.at_start == 0.5


def test_the_screen_on_a_terminal(tmp_path):
    """A pseudo-terminal shows stages, tau and the answer; what the stages print goes to the log."""
    code = (
        "from pathlib import Path; from eagle3_xla.live import Screen\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "screen = Screen([('train', 4.0)], folder / 'metrics.jsonl', 'here', folder / 'log.txt')\n"
        "screen.steps = 4\n"
        "with screen.shown(), screen.stage(0):\n"
        "    print('noise')\n"
        '    (folder / \'metrics.jsonl\').write_text(\'{"step": 2, "heldout_tau": 1.25}\\n{"half a li\')\n'
        "    screen.spoken = [('Paris', True)]\n"
    )
    command = ["script", "-qec", f"{sys.executable} -c {shlex.quote(code)}", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
    assert done.returncode == 0, done.stdout
    assert "held-out expected tau  1.25" in done.stdout and "\033[1;32mParis" in done.stdout
    assert "noise" not in done.stdout and (tmp_path / "log.txt").read_text() == "noise\n"
