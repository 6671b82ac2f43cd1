"""`quickstart`: a real target, its data, a head, its acceptance and the report, on this machine."""

import json
import time
from dataclasses import replace
from pathlib import Path

from eagle3_xla.config import UserError, load_recipe
from eagle3_xla.data.prepare import prepare
from eagle3_xla.evaluate.report import plot_report
from eagle3_xla.evaluate.run import EvalOptions, evaluate
from eagle3_xla.export import export
from eagle3_xla.outputs import claim_output, write_run_file
from eagle3_xla.target.embedded import write_embedded_target
from eagle3_xla.train.loop import train

RECIPE = "smollm2-cpu"
HELDOUT = "package:heldout.jsonl"
# Measured on two cores of an AMD EPYC: the target's states and one epoch over them, per 1,000 tokens.
STATES_SECONDS, EPOCH_SECONDS = 2.6, 2.0
LEAST_MINUTES, MOST_MINUTES = 0.1, 100_000  # of training
EVALUATION = EvalOptions(limit=12, max_new_tokens=64)


def quickstart(out: Path, minutes: float | None) -> dict:
    """Run the whole pipeline into `out`; what is done already is reused. minutes: about how long to train."""
    started = time.perf_counter()
    if minutes is not None and not LEAST_MINUTES <= minutes <= MOST_MINUTES:
        raise UserError(f"--minutes {minutes:g}: a number from {LEAST_MINUTES:g} to {MOST_MINUTES:g} is expected")
    target, head, untrained = out / "target", out / "head", out / "head-untrained"
    overrides = [f"target.path={target}", f"data.prepared={out / 'data'}", f"train.out={out / 'run'}"]
    overrides += _budget(minutes)
    recipe = load_recipe(RECIPE, overrides)
    claim_output(out, "quickstart")
    write_run_file(recipe, out, "quickstart")

    print(f"1/5 target: SmolLM2-135M-Instruct as a Qwen2 model -> {target}")
    write_embedded_target(target)
    print(f"2/5 data: chats that this target wrote -> {out / 'data'}")
    manifest = prepare(recipe)
    print(f"3/5 train -> {out / 'run'}")
    training = train(recipe)
    print(f"4/5 export -> {head}")
    export(out / "run", head)
    export(out / "run" / "initial" / "step-00000000", untrained)
    # A head of a minute's training is not worth minutes of measuring.
    options = EVALUATION if minutes is None or minutes >= 3 else replace(EVALUATION, limit=3)
    print("5/5 evaluate on held-out chats: real decoding, with and without the head")
    figures = {
        "untrained": evaluate(str(target), str(untrained), HELDOUT, replace(options, baseline=False)),
        "trained": evaluate(str(target), str(head), HELDOUT, options),
    }
    picture = out / "report.png"
    plot_report(out / "run", figures, picture)
    minutes_taken = (time.perf_counter() - started) / 60
    result = {
        "target": str(target),
        "head": str(head),
        "report": str(picture),
        "data": manifest,
        "training": training,
        "untrained": figures["untrained"],
        "eval": figures["trained"],
        "minutes": round(minutes_taken, 1),
    }
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    return result | {"screen": screen(result, recipe)}


def _budget(minutes: float | None) -> list[str]:
    """More minutes: first all of the chats, then more epochs over them."""
    if minutes is None:
        return []
    recipe = load_recipe(RECIPE, [])
    per_token = (STATES_SECONDS + EPOCH_SECONDS * recipe.train.epochs) / 1000
    tokens = int(minutes * 60 / per_token)
    everything = 520_000  # tokens in the shipped chats
    epochs = recipe.train.epochs
    if tokens > everything:
        epochs = max(
            epochs, int((minutes * 60 - everything / 1000 * STATES_SECONDS) / (everything / 1000 * EPOCH_SECONDS))
        )
        tokens = 0
    return [f"data.max_tokens={tokens}", f"train.epochs={epochs}"]


def screen(result: dict, recipe) -> str:
    """The one screen that the quickstart ends with."""
    trained, untrained, data = result["eval"], result["untrained"], result["data"]

    def row(figures):
        return "  ".join(f"{value:6.1%}" for value in figures["acceptance_conditional"])

    return f"""
A draft head for SmolLM2-135M-Instruct (as Qwen2), trained in {result["minutes"]:.1f} minutes in all
  data      {data["train"]["chats"]} chats written by this target, \
{data["train"]["answer_tokens"]:,} answer tokens x {recipe.train.epochs} epochs
            draft vocabulary {data["draft_vocab_size"]:,} of {data["vocab_size"]:,}: \
{data["coverage_heldout"]:.1%} of the held-out answer tokens
  training  {result["training"]["micro_steps"]} steps, {recipe.loss.ttt_length} TTT steps each, \
loss weights {recipe.loss.decay}^k

On {trained["prompts"]} held-out prompts, greedy, chain of {trained["draft_tokens"]} drafts
                       acceptance length tau   acceptance per position, if all before were accepted
  before training      {untrained["tau"]:.2f}                    {row(untrained)}
  trained head         {trained["tau"]:.2f}                    {row(trained)}
  target calls per token  {trained["target_calls_per_token"]:.2f}
  tokens per second       {trained["tokens_per_second"]:.1f} with the head, \
{trained["baseline_tokens_per_second"]:.1f} without
  same tokens as the target alone: {"yes" if trained["identical"] else "NO"}

Where it lies
  head      {result["head"]}          (what an engine loads)
  target    {result["target"]}
  run       {recipe.train.out}           (checkpoints, metrics.jsonl, tensorboard)
  picture   {result["report"]}

Serve it (SGLang, on a GPU)
  python -m sglang.launch_server --model-path {result["target"]} \\
    --speculative-algorithm EAGLE3 --speculative-draft-model-path {result["head"]} \\
    --speculative-num-steps 5 --speculative-eagle-topk 1 --speculative-num-draft-tokens 6
or vLLM
  vllm serve {result["target"]} \\
    --speculative-config '{{"method": "eagle3", "model": "{result["head"]}", "num_speculative_tokens": 5}}'"""
