"""Bad input: one line on stderr, exit code 2, no traceback. What every verb prints."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import asdict

import pytest

from eagle3_xla.arguments import parser
from eagle3_xla.cli import VERBS, _overrides, main
from eagle3_xla.config import Recipe, load_recipe
from eagle3_xla.guide import EXAMPLES, _here, next_step
from eagle3_xla.target.families import SGLANG, VLLM


def refused(done, *parts):
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("eagle3-xla ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["train", "--trian.lr=1"], "unknown setting trian; the nearest known one is train"),
        (["train", "--config", "nonsense"], "no recipe 'nonsense'"),
        (["train", "--oops"], "unknown argument --oops"),
        (
            ["eval", "--target", "t", "--draft", "d", "--promts", "p"],
            "unknown argument --promts; did you mean --prompts?",
        ),
        (["prepare", "--overwirte"], "unknown argument --overwirte; did you mean --overwrite?"),
        (["config", "--diff", "base", "base"], "--diff base base: two recipes are expected"),
        (["train"], "train.out is empty"),
        (["prepare", "--target.path=/nowhere/at/all"], "no target at '/nowhere/at/all'"),
        (["eval", "--target", "x", "--draft", "/nowhere", "--prompts", "p"], "no head at /nowhere"),
        (["export", "--checkpoint", "/nowhere", "--out", "o"], "/nowhere is not a checkpoint"),
        (["quickstart", "--out", "gs://bucket/q"], "--out gs://bucket/q: a folder of this machine is expected"),
    ],
)
def test_refused(forks, arguments, part):
    refused(forks.run(*arguments), part)


def refused_here(capsys, arguments: list[str], *parts: str) -> None:
    """In this process: another one's imports cost more than the refusal."""
    assert main(arguments) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eagle3-xla")]
    assert len(said) == 1 and all(part in said[0] for part in parts), said


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--json", "config"], "eagle3-xla config: --json comes after the verb"),
        (["--config", "base", "plan"], "eagle3-xla: --config comes after the verb"),
        (
            ["regenerate", "--out", "o", "--api-key", "KEY"],
            "eagle3-xla regenerate: unknown argument --api-key; did you mean --api-key-env?",
        ),
        (
            ["regenerate", "--target.path=t", "--server", "http://a"],
            "eagle3-xla regenerate: the following arguments are required: --out",
        ),
        (
            ["regenerate", "--target.path=t", "--ou=o"],
            "eagle3-xla regenerate: unknown argument --ou; did you mean --out?",
        ),
        (
            [],
            "eagle3-xla: no verb; one of quickstart, prepare, regenerate, train, plan, export, doctor, eval, patch, "
            "bench, gap, push, config",
        ),
    ],
)
def test_refused_in_words(capsys, arguments, line):
    assert main(arguments) == 2 and capsys.readouterr().err.splitlines()[-1] == line


@pytest.mark.parametrize(
    "verb, kept", [("eval", False), ("plan", False), ("plan --search", True), ("train", True), ("prepare", True)]
)
def test_an_interrupted_verb_says_whether_it_continues(verb, kept, monkeypatch, capsys):
    def interrupted(options, overrides):
        raise KeyboardInterrupt

    name, *arguments = verb.split()
    monkeypatch.setitem(VERBS, name, interrupted)
    assert main([name, *arguments, *["--target=t", "--draft=d", "--prompts=p"] * (name == "eval")]) == 1
    expected = f"eagle3-xla {name}: interrupted" + "; start it again to continue" * kept
    assert capsys.readouterr().err == f"{expected}\n"


def test_a_reader_that_has_seen_enough_and_a_full_disk():
    command = [sys.executable, "-m", "eagle3_xla", "config", "--quiet"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
    with open("/dev/full", "w") as full:
        done = subprocess.run([*command, "--json"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "eagle3-xla config: the result could not be written: [Errno 28] No space left on device\n"


def test_refused_data_and_folders(small_run, tmp_path, chat_file, capsys):
    settings = [f"--{setting}" for setting in small_run]
    none = f"--data.train=[{tmp_path / 'none.jsonl'}]"
    refused_here(capsys, ["prepare", *settings, none], "none.jsonl: no such file")
    lines = chat_file.read_text().splitlines()
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join([*lines[:3], "{not json", *lines[3:]]) + "\n")
    refused_here(capsys, ["prepare", *settings, f"--data.train=[{broken}]"], "broken.jsonl:4: not valid JSON")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letter.txt").write_text("mine")
    assert main(["prepare", *settings]) == 0
    refused_here(capsys, ["train", *settings], "not ours")


def test_a_target_with_few_layers_is_refused(small_run, small_target, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(small_target)
    model.model.layers = model.model.layers[:6]
    model.config.num_hidden_layers = 6
    model.config.layer_types = model.config.layer_types[:6]
    folder = tmp_path / "shallow"
    model.save_pretrained(folder)
    settings = [f"--{setting}" for setting in small_run]
    assert main(["prepare", *settings]) == 0
    refused_here(capsys, ["train", *settings, f"--target.path={folder}"], "6 decoder layers", "at least 8")


def test_json_is_one_object(forks, small_run):
    done = forks.run("prepare", "--json", *[f"--{setting}" for setting in small_run])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["train"]["chats"] == 32


def test_config_shows_recipes_that_load_again(tmp_path, capsys):
    assert main(["config"]) == 0 and "smollm2-cpu" in capsys.readouterr().out
    assert main(["config", "--show", "smollm2-cpu", "--train.lr=3e-4"]) == 0
    shown = capsys.readouterr()
    assert "  # at its highest; cosine decay to 0; in (0, 1000]; default: 0.0008\n  lr: 0.0003\n" in shown.out
    (tmp_path / "again.yaml").write_text(shown.out)
    assert load_recipe(str(tmp_path / "again.yaml"), []) == load_recipe("smollm2-cpu", ["train.lr=3e-4"])
    asked = "--config smollm2-cpu --train.lr=3e-4 --target.path=TARGET --data.prepared=DATA"
    assert shown.err == f"next: eagle3-xla prepare {asked}\n"  # one chip is no slice
    assert main(["config", "--show", "qwen2.5-7b-v4-32", "--train.lr=3e-4"]) == 0
    assert capsys.readouterr().err == "next: eagle3-xla plan --config qwen2.5-7b-v4-32 --train.lr=3e-4\n"
    assert main(["config", "--diff", "qwen2.5-7b-v4-32", "qwen2.5-7b-v4-32-fast", "--json", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["differences"]["xla.dp"] == [4, 16] and not printed.err


def test_quiet_and_the_next_step(small_run, capsys):
    settings = [f"--{setting}" for setting in small_run]
    assert main(["prepare", *settings]) == 0
    loud = capsys.readouterr()
    assert loud.err.splitlines()[-1].startswith("next: eagle3-xla train --target.path=")
    assert "\033" not in loud.err  # no terminal, no colours
    assert main(["prepare", "--quiet", *settings]) == 0
    assert capsys.readouterr() == (loud.out, "")
    assert main(["prepare", "--quiet", *settings, "--data.train=[none.jsonl]"]) == 2
    assert capsys.readouterr().err == "eagle3-xla prepare: none.jsonl: no such file\n"


@pytest.mark.parametrize(
    "arguments, target, prepared",
    [
        (["--config", "qwen2.5-7b-v4-32", "--server", "http://a"], "Qwen/Qwen2.5-7B-Instruct", "DATA"),
        (["--config", "smollm2-cpu", "--target", "my t", "--data.prepared=work/data"], "my t", "work/data"),
        (["--target", "t", "--chats", "c.jsonl"], "t", "DATA"),
        (["--server", "http://a", "--chats", "c.jsonl"], "TARGET", "DATA"),
    ],
)
def test_what_follows_on_regenerate_can_be_prepared(arguments, target, prepared):
    options, rest = parser().parse_known_args(["regenerate", *arguments, "--out", "work/chats"])
    recipe = recipe_of(shlex.split(next_step(options, _overrides(rest, options), {})))
    assert [source.path for source in recipe.data.train] == ["work/chats/chats.jsonl"]
    assert (recipe.target.path, recipe.data.prepared) == (target, prepared)


def test_what_follows_on_eval_serves_the_pair():
    asked = ("eval", "--target", "a t", "--draft", "h", "--prompts", "p")
    served = following({"served_by": {SGLANG: {"--context-length": 4096}, VLLM: {}}}, *asked)
    assert served.startswith("bash launch/serve_sglang.sh --target 'a t' --head h --context-length 4096, then ")
    words = shlex.split(following({"served_by": {VLLM: {"--max-model-len": 4096}}}, *asked).partition(", then")[0])
    assert words[:4] == ["vllm", "serve", "a t", "--speculative-config"] and words[5:] == ["--max-model-len", "4096"]
    assert json.loads(words[4]) == {"method": "eagle3", "model": "h", "num_speculative_tokens": 5}
    assert "no released engine" in following({"served_by": {}}, *asked)


def following(result: dict, *arguments: str) -> str:
    options, rest = parser().parse_known_args(arguments)
    return next_step(options, _overrides(rest, options), result)


def recipe_of(command: list[str]) -> Recipe:
    """What a printed command trains or prepares."""
    options, rest = parser().parse_known_args(command[1:])
    return load_recipe(options.config, _overrides(rest, options))


def test_what_follows_on_plan_has_data_and_the_best_layout():
    asked = ("plan", "--config", "qwen2.5-7b-v4-32", "--plan.layers=8")
    prepare, train = map(shlex.split, following({"fits": True, "tokens_of": "plan.tokens"}, *asked).split(", then "))
    assert prepare[:2] == ["eagle3-xla", "prepare"] and train[:3] == ["bash", "launch/train_torchrun.sh", "--slice"]
    assert recipe_of(prepare).data.prepared == recipe_of(["eagle3-xla", "train", *train[3:]]).data.prepared != ""
    asked += ("--data.prepared=gs://b/a data", "--train.out=gs://b/run")
    given = shlex.join(("--config", *asked[2:]))
    train = f"bash launch/train_torchrun.sh --slice {given}"
    assert following({"fits": True, "tokens_of": "data.prepared"}, *asked) == train
    unprepared = following({"fits": True, "tokens_of": None}, *asked)
    assert unprepared == f"eagle3-xla prepare {given}, then {train}"
    assert following({"fits": False}, *asked) == f"eagle3-xla plan {given} --search"

    layout = {"dp": 16, "tp": 1, "draft_data_parallel": False, "remat": True, "batch_size": 2}
    best = layout | {"gradient_accumulation": 2, "fits": True, "tokens_of": "data.prepared"}
    found = shlex.split(following({"topology": "v4-32", "best": best}, *asked, "--search"))
    recipe = recipe_of(["eagle3-xla", "train", *found[3:]])
    now = asdict(recipe.xla) | asdict(recipe.train)
    assert now | best == now | {"fits": True, "tokens_of": "data.prepared"}
    for name, larger in (("v4-32", "--topology v4-64"), ("v5e-8", "--topology v5e-16"), ("v4-64", "no known slice")):
        none = following({"topology": name, "best": None}, *asked, "--search")
        assert none.startswith(f"nothing fits {name}") and larger in none and "train_torchrun" not in none


def test_what_follows_keeps_the_recipes_own_places(tmp_path):
    own, rest = tmp_path / "run.yaml", {"data": {"prepared": "work/a data"}, "target": {"path": "t"}}
    own.write_text(json.dumps(rest | {"train": {"out": "work/a run"}}))
    assert following({}, "prepare", "--config", str(own)) == f"eagle3-xla train --config {own}"
    assert following({}, "train", "--config", str(own)) == "eagle3-xla export --checkpoint 'work/a run' --out HEAD"
    regenerated = following({}, "regenerate", "--config", str(own), "--server=s", "--out=a, #1")
    recipe = recipe_of(shlex.split(regenerated))
    assert (recipe.data.prepared, recipe.data.train[0].path) == ("work/a data", "a, #1/chats.jsonl")
    own.write_text(json.dumps({"target": {"path": "t"}}))
    assert following({}, "prepare", "--config", str(own)) == f"eagle3-xla train --config {own} --train.out=RUN"


def test_what_follows_on_doctor():
    asked = ("doctor", "a head", "--target", "t")
    assert following({"ok": False, "fixable": True}, *asked) == "eagle3-xla doctor 'a head' --target t --fix"
    for arguments, fixable in (([*asked, "--fix"], True), (asked, False)):
        assert "export again" in following({"ok": False, "fixable": fixable}, *arguments)
    away = following({"ok": False, "fixable": True}, "doctor", "gs://b/a/head", "--target", "t")
    assert away == "copy gs://b/a/head to this machine, then eagle3-xla doctor head --target t --fix"


def test_what_follows_on_gap_can_be_pushed():
    gap = ["gap", "--server", "http://a", "--prompts", "p q", "--target", "t", "--draft", "a head"]
    bench, push = (shlex.split(command) for command in following({"ok": True}, *gap).split(", then "))
    options, rest = parser().parse_known_args(bench[1 : bench.index(">")])
    assert (options.server, options.prompts, options.draft, options.json) == ("http://a", "p q", "a head", True)
    assert not rest and bench[-1] == "bench.json" == push[push.index("--results") + 1]
    assert push[:3] == ["eagle3-xla", "push", "a head"] and "--dry-run" in push
    gap[-1] = "gs://b/head"
    assert following({"ok": True}, *gap).startswith("copy gs://b/head to this machine, then eagle3-xla bench ")
    assert _here("gs://b/a/x", "gs://b/x")[1:] == ("target", "head")


def test_a_tilde_is_the_home_folder(monkeypatch):
    """After `=` a shell leaves it."""
    monkeypatch.setenv("HOME", "/home/me")
    asked = ["eval", "--target=~/t", "--draft=~/h", "--prompts=~/p.jsonl", "--report=~/r", "--run=a~/b"]
    options = parser().parse_args(asked)
    assert (options.target, options.draft, options.prompts) == ("/home/me/t", "/home/me/h", "/home/me/p.jsonl")
    assert (options.report, options.run) == ("/home/me/r", "a~/b")
    options = parser().parse_args(["push", "~/h", "--target=me/t", "--repo=~/x", "--results=~/a", "--results=~/b"])
    assert (options.head, options.target, options.repo) == ("/home/me/h", "me/t", "~/x")
    assert options.results == ["/home/me/a", "/home/me/b"]
    assert parser().parse_args(["quickstart", "--out=~/x"]).out == "/home/me/x"


def test_every_verb_teaches(capsys):
    assert EXAMPLES.keys() == VERBS.keys()
    for verb in VERBS:
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        assert f"examples:{EXAMPLES[verb]}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--print-completion", "bash"])
    script = capsys.readouterr().out
    asked = "COMP_WORDS=(eagle3-xla eval --pro) COMP_CWORD=2; _shtab_eagle3_xla; echo ${COMPREPLY[@]}"
    done = subprocess.run(["bash", "-c", f"{script}\n{asked}"], capture_output=True, text=True)
    assert done.stdout == "--prompts\n", done.stderr
