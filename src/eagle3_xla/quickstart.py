"""`quickstart`: a real target, its data, a head, its acceptance and the report, on this machine, in a given time.

It measures the machine first and sizes data and epochs to the time; a second start keeps the first one's
sizes and measurement.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from eagle3_xla.checks import in_colour, number, printable, read_json
from eagle3_xla.config import Recipe, load_recipe
from eagle3_xla.data.prepare import prepare
from eagle3_xla.data.prompts import read_prompts
from eagle3_xla.data.tokenizer import load_tokenizer, stop_token_ids
from eagle3_xla.errors import UserError
from eagle3_xla.evaluate.decode import Generation
from eagle3_xla.evaluate.options import EvalOptions
from eagle3_xla.evaluate.run import evaluate
from eagle3_xla.export import export
from eagle3_xla.live import Screen, minutes
from eagle3_xla.machine import Machine, measure
from eagle3_xla.outputs import claim_output, write_run_file
from eagle3_xla.target.embedded import write_embedded_target
from eagle3_xla.train.loop import train

RECIPE = "smollm2-cpu"
HELDOUT = "package:heldout.jsonl"
WORK_MINUTES = 8.0  # of everything after the installation, where --minutes says nothing
LEAST_TOKENS, ALL_TOKENS = 2_000, 520_000  # to train on: a few rows; what the shipped chats have
USEFUL_TOKENS = 30_000  # where --minutes says nothing, no fewer, however long it takes: 4,000 made no head better
LEAST_GIB = 5  # of free memory: what the training takes, 4 GB, and some air
EVALUATION = EvalOptions(limit=8, max_new_tokens=48, batch_size=1)
# Prompts, where no tokens/s are asked for: the same figures in half of the time (`eval --batch-size`).
AT_ONCE = 8
# As the last screen asks SGLang for it, which counts the root too.
TREE = replace(EVALUATION, topk=4, steps=5, draft_tokens=7, batch_size=AT_ONCE, baseline=False)
GREEN, PLAIN = "\033[1;32m", "\033[0m"

# Where the processor multiplies bfloat16 itself: a step of torch's in it takes two thirds of XLA's time in float32, and
# nothing has to be compiled (benchmarks/README.md).
IN_BFLOAT16 = ["xla.device=cpu", "xla.autocast=true", "target.dtype=bfloat16"]
START_TOKENS = 61_000  # of the recipe's init_rows: the start is fitted to no more


class Seconds(NamedTuple):
    """On the machine that machine.py names as the reference. states, start, epoch: per 1,000 tokens; compile: and the
    held-out evaluations."""

    target: float
    prepare: float
    compile: float
    export: float
    evaluation: float
    states: float
    start: float
    epoch: float

    def beside(self) -> float:
        """All that the number of tokens doesn't change."""
        return self.target + self.prepare + self.compile + self.export + self.evaluation


# By Machine.bfloat16, from `eagle3-xla quickstart`. Those of float32 were measured without AVX-512, at 77 to 136
# GFLOP/s, and divided by that machine's slowness.
SECONDS = {
    False: Seconds(12, 10, 45, 3, 115, states=3.7, start=1.5, epoch=3.8),
    True: Seconds(5, 13, 8, 2, 56, states=1.3, start=1.1, epoch=1.4),
}

# Acceptance lengths that heads for real models reach, by their own pages.
FIELD = """  1.8 to 2.2  Qwen3 1.7B to 32B, short chains   (angelslim.readthedocs.io, speculative decoding benchmarks)
  3.0 to 3.5  Qwen3.5-397B-A17B, MT-Bench, GSM8K (huggingface.co/AQ-MedAI/Qwen3.5-397B-A17B-eagle3)
  Those have hundreds of thousands of chats, a stronger target and hours on accelerators."""


class Budget(NamedTuple):
    """tokens: of the training chats, 0 for all; train_seconds: what the training should take here; gflops, bfloat16: of
    the machine (machine.py)."""

    tokens: int
    epochs: int
    train_seconds: float
    asked: float | None
    gflops: float
    bfloat16: bool


def quickstart(out: Path, asked: float | None) -> dict:
    """Run the whole pipeline into `out`; what is done already is reused. asked: minutes of training, None for what fits
    WORK_MINUTES in all."""
    started = time.perf_counter()
    claim_output(out, "quickstart")
    earlier = _earlier(out, asked)
    machine = measure(earlier and earlier.gflops, earlier and earlier.bfloat16)
    budget = earlier or _budget(asked, machine)
    target, head, untrained = out / "target", out / "head", out / "head-untrained"
    sizes, options = [f"data.max_tokens={budget.tokens}", f"train.epochs={budget.epochs}"], EVALUATION
    if asked is not None and asked < 1:  # a look at whether all of it runs
        sizes, options = [*sizes, "train.heldout_rows=4"], replace(options, limit=2, max_new_tokens=16)
    elif asked is not None and asked < 3:
        options = replace(options, limit=3)
    places = [f"target.path={target}", f"data.prepared={out / 'data'}", f"train.out={out / 'run'}"]
    recipe = load_recipe(RECIPE, [*places, *sizes, *(IN_BFLOAT16 if machine.bfloat16 else [])])
    write_run_file(recipe, out, "quickstart")
    (out / "budget.json").write_text(json.dumps(budget._asdict()) + "\n")

    slow, seconds, heading = machine.slowness, SECONDS[machine.bfloat16], _heading(machine, budget)
    stages = [
        (f"target: SmolLM2-135M-Instruct as a Qwen2 model -> {target}", seconds.target * slow),
        (f"data: chats that this target wrote -> {out / 'data'}", seconds.prepare * slow),
        (f"train -> {out / 'run'}", seconds.compile * slow + budget.train_seconds),
        (f"export -> {head}", seconds.export * slow),
        ("evaluate on held-out chats: real decoding, with and without the head", seconds.evaluation * slow),
    ]
    screen = Screen(stages, out / "run" / "metrics.jsonl", heading, out / "log.txt")
    with screen.shown():
        with screen.stage(0):
            write_embedded_target(target)
        with screen.stage(1):
            manifest = prepare(recipe)
        screen.steps = manifest["train"]["rows"] // recipe.train.batch_size * recipe.train.epochs
        with screen.stage(2):
            training = train(recipe)
            if training["ended"] in ("SIGTERM", "SIGINT"):
                raise KeyboardInterrupt
        with screen.stage(3):
            export(out / "run", head)
            export(out / "run" / "initial" / "step-00000000", untrained)
        with screen.stage(4):
            first = _FirstAnswer(target, screen)
            together = replace(options, batch_size=AT_ONCE, baseline=False)
            before = evaluate(str(target), str(untrained), HELDOUT, together)
            trained = evaluate(str(target), str(head), HELDOUT, options, out, out / "run", before, first)
            as_tree = replace(TREE, limit=options.limit, max_new_tokens=options.max_new_tokens)
            tree = evaluate(str(target), str(head), HELDOUT, as_tree)
    result = {
        "target": str(target),
        "head": str(head),
        "report": trained["report"],
        "machine": machine._asdict(),
        "data": manifest,
        "training": training,
        "heldout_taus": screen.taus(),
        "untrained": before,
        "eval": trained,
        "tree": tree,
        "answer": first.result(),
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "continued": earlier is not None,  # then these are the minutes of this start alone
    }
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    green = in_colour(sys.__stdout__)
    last = last_screen(result, recipe, (GREEN, PLAIN) if green else ("[", "]"))
    return result | {"coloured" if green else "screen": last}


def _budget(asked: float | None, machine: Machine) -> Budget:
    """More time: first more of the chats, then more epochs over all of them."""
    slow, per = machine.slowness, SECONDS[machine.bfloat16]
    left = asked * 60 if asked is not None else WORK_MINUTES * 60 - per.beside() * slow
    left, start = left / slow, per.start * START_TOKENS / 1000  # on the reference, as all below
    epochs, per_token = 1, (per.states + per.epoch) / 1000
    tokens = int(max(left / (per_token + per.start / 1000), (left - start) / per_token))
    tokens = max(tokens, USEFUL_TOKENS if asked is None else LEAST_TOKENS)
    if tokens > ALL_TOKENS:
        states, epoch = (cost * ALL_TOKENS / 1000 for cost in (per.states, per.epoch))
        epochs, tokens = max(epochs, int((left - states - start) / epoch)), 0
    learned = tokens or ALL_TOKENS
    train_seconds = (per.states + per.epoch * epochs) * learned + per.start * min(learned, START_TOKENS)
    return Budget(tokens, epochs, train_seconds / 1000 * slow, asked, machine.gflops, machine.bfloat16)


def _earlier(out: Path, asked: float | None) -> Budget | None:
    """The budget of the run that is continued: the machine may be busier now, the recipe must stay. Raises UserError
    when it has a head of another budget already: preparing its data anew would be the end of that one too."""
    budget, checkpoints = _read_budget(out / "budget.json"), out / "run" / "checkpoints"
    if budget and budget.asked == asked:
        return budget
    if checkpoints.is_dir() and any(checkpoints.iterdir()):
        if not budget:
            raise UserError(
                f"{out} holds a head that an earlier version began, or its budget.json is damaged, so it can't be "
                "continued; give --out DIR for a new one"
            )
        before = "no --minutes" if budget.asked is None else f"--minutes {budget.asked}"
        raise UserError(
            f"{out} holds a head of other --minutes; start it as before ({before}) to continue, or give --out DIR for "
            "a new one"
        )
    return None


def _read_budget(file: Path) -> Budget | None:
    """None: there is none that can be read, after a power loss, say."""
    try:
        written = read_json(file) if file.is_file() else {}
        if written.keys() != {*Budget._fields}:
            return None
        tokens, epochs = (number(written[name], name, 0, whole=True) for name in ("tokens", "epochs"))
        train_seconds = number(written["train_seconds"], "train_seconds", 0)
        gflops = number(written["gflops"], "gflops", 0, above=True)
        return Budget(tokens, epochs, train_seconds, written["asked"], gflops, written["bfloat16"] is True)
    except UserError:
        return None


def _heading(machine: Machine, budget: Budget) -> str:
    """What this machine is, and what its user gets."""
    tokens = budget.tokens or ALL_TOKENS
    lines = [f"this machine: {machine.words()}"]
    if machine.slowness > 1.5:
        lines.append(
            f"  {machine.slowness:.1f} times slower than two cores with AVX-512: the head learns from fewer chats, "
            "its tau will be smaller, and all takes longer; --minutes N gives it more time"
        )
    if machine.free_gib < LEAST_GIB:
        lines.append(
            f"  the training takes 4 GB; with {machine.free_gib:.1f} GiB free it may be killed: close something"
        )
    everything = SECONDS[machine.bfloat16].beside() * machine.slowness + budget.train_seconds
    lines.append(
        f"to train on: {tokens:,} tokens of chats, {budget.epochs} times, about {minutes(budget.train_seconds)}; "
        f"everything about {minutes(everything)}"
    )
    return "\n".join(lines)


class _FirstAnswer:
    """Shows the answer to the first held-out prompt while the evaluation decodes it, and keeps its parts."""

    def __init__(self, target: Path, screen: Screen):
        self.screen, self.tokenizer = screen, load_tokenizer(str(target))
        self.stops = stop_token_ids(str(target), self.tokenizer)

    def __call__(self, prompt: int, generation: Generation) -> None:
        if prompt == 0:
            self.screen.spoken = drafted_pieces(self.tokenizer, generation, self.stops)

    def result(self) -> dict:
        return {"prompt": read_prompts(HELDOUT, 1)[0].messages[-1]["content"], "pieces": self.screen.spoken}


def drafted_pieces(tokenizer: Any, generation: Generation, stops: set[int]) -> list[tuple[str, bool]]:
    """(text, whether the head drafted it) of an answer, in order; without its end-of-turn token.

    The first token is the prefill's; each call then brings its accepted drafts and one token of the target's own.
    """
    drafted = [False]
    for accepted in generation.accepted:
        drafted += [True] * accepted + [False]
    pieces: list[tuple[list[int], bool]] = []
    for token, is_draft in zip(generation.tokens, drafted):
        if token in stops:
            break
        if pieces and pieces[-1][1] == is_draft:
            pieces[-1][0].append(token)
        else:
            pieces.append(([token], is_draft))
    return [(tokenizer.decode(tokens), is_draft) for tokens, is_draft in pieces]


def last_screen(result: dict, recipe: Recipe, colours: tuple[str, str]) -> str:
    """The one screen that the quickstart ends with. colours: what stands before and after an accepted draft."""
    trained, untrained, tree, data = (result[part] for part in ("eval", "untrained", "tree", "data"))

    def row(figures: dict) -> str:
        return "  ".join(f"{value:6.1%}" for value in figures["acceptance_conditional"])

    def on_one_line(words: str) -> str:
        return printable(words.replace("\n", " "))

    answer = "".join(
        f"{colours[0]}{on_one_line(words)}{colours[1]}" if drafted else on_one_line(words)
        for words, drafted in result["answer"]["pieces"]
    )
    slower = trained["tokens_per_second"] <= trained["baseline_tokens_per_second"]
    no_gain = "; `eval --draft-tokens auto` finds the chain that pays here" if slower else ""
    took = f"trained in {result['minutes']:.1f} minutes in all"
    if result["continued"]:
        took = f"finished in {result['minutes']:.1f} minutes; an earlier start had begun it"
    grown = " -> ".join(f"{tau:.2f}" for tau in result["heldout_taus"])
    return f"""
A draft head for SmolLM2-135M-Instruct (as Qwen2), {took}
  data      {data["train"]["chats"]} chats written by this target, \
{data["train"]["answer_tokens"]:,} answer tokens x {recipe.train.epochs} epochs
            draft vocabulary {data["draft_vocab_size"]:,} of {data["vocab_size"]:,}: \
{data["coverage_heldout"]:.1%} of the held-out answer tokens
  training  {result["training"]["micro_steps"]} steps, {recipe.loss.ttt_length} TTT steps each, \
loss weights {recipe.loss.decay}^k; held-out expected tau {grown}

On {trained["prompts"]} held-out prompts, greedy, chain of {trained["draft_tokens"]} drafts
                       acceptance length tau   acceptance per position, if all before were accepted
  before training      {untrained["tau"]:.2f}                    {row(untrained)}
  trained head         {trained["tau"]:.2f}                    {row(trained)}
  target calls per token  {trained["target_calls_per_token"]:.2f}
  tokens per second       {trained["tokens_per_second"]:.1f} with the head, \
{trained["baseline_tokens_per_second"]:.1f} without{no_gain}
  same tokens as the target alone: {"yes" if trained["identical"] else "NO"}
  as a tree of {tree["draft_tokens"]} drafts, {tree["topk"]} a node, {tree["steps"]} deep: \
acceptance length tau {tree["tau"]:.2f}

One answer; what the head drafted and the target kept is {"green" if colours[0] == GREEN else "in brackets"}
  {on_one_line(result["answer"]["prompt"])}
  {answer}

What heads reach elsewhere (acceptance length)
{FIELD}

Where it lies
  head      {result["head"]}          (what an engine loads)
  target    {result["target"]}
  run       {recipe.train.out}           (checkpoints, metrics.jsonl, tensorboard)
  page      {result["report"]}   (open it: figures, curves, answers with their drafts)

Serve it (SGLang, on a GPU; on this CPU: bash launch/serve_sglang.sh --cpu)
  python -m sglang.launch_server --model-path {result["target"]} \\
    --speculative-algorithm EAGLE3 --speculative-draft-model-path {result["head"]} \\
    --speculative-num-steps {tree["steps"]} --speculative-eagle-topk {tree["topk"]} \\
    --speculative-num-draft-tokens {tree["draft_tokens"] + 1} --dtype bfloat16
or vLLM, a chain
  vllm serve {result["target"]} \\
    --speculative-config '{{"method": "eagle3", "model": "{result["head"]}", "num_speculative_tokens": 5}}'

More: --minutes 60 --out quickstart-60 trains on more of the chats; your own chats and target: docs/first-hour.md"""
