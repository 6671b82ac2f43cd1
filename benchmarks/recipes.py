"""What a change of the recipe brings: acceptance lengths of heads trained at an equal budget, several seeds of each.

    python benchmarks/recipes.py --set NAME [--target DIR] [--work DIR] [--device DEVICE] [--jobs N] [--seeds 0,1,2]

Each run is the product's own: prepare, train, export, eval, in a folder of its own below --work; a run that is done is
not done again while its recipe, chats, target and code are the same, one that was interrupted goes on. The figures go
to benchmarks/recipes/NAME.json (with --out: there), to those of other recipes and seeds that it has, their plot beside
it, their table to stdout. A set's first recipe is what the others are compared with.

The sets are in recipe_sets.py. Variants that the product does not have are patches of it, in variants.py: what helps
moves into the product.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import metadata
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch
import variants
from recipe_sets import COMMON, DEVICE, SETS
from variants import KEPT_IN_MEMORY, PATCHES, shared_starts, write_averages

import eagle3_xla
from eagle3_xla.config import load_recipe
from eagle3_xla.data import prompts, sources
from eagle3_xla.data.config import Source
from eagle3_xla.data.prepare import prepare
from eagle3_xla.data.tokenizer import load_tokenizer, stop_token_ids
from eagle3_xla.evaluate.decode import Decoder
from eagle3_xla.evaluate.fingerprint import target_fingerprint
from eagle3_xla.evaluate.forced import teacher_forced
from eagle3_xla.evaluate.options import EvalOptions
from eagle3_xla.evaluate.run import decode_prompts, evaluate, load_pair, prompt_ids
from eagle3_xla.export import export
from eagle3_xla.loss.metrics import add_up, expected_tau, rates
from eagle3_xla.processes import end_with_parent
from eagle3_xla.target.embedded import write_embedded_target
from eagle3_xla.target.model import Target, load_target
from eagle3_xla.train.loop import train

FOLDER = Path(__file__).parent / "recipes"
RECIPE, HELDOUT = "smollm2-cpu", "package:heldout.jsonl"
PROMPTS, TOKENS, SAMPLED_TOKENS = 40, 128, 64  # of an evaluation, and new tokens of an answer (greedy, sampled)
PACKAGES = ("torch", "transformers")


class Where(NamedTuple):
    """What all runs of a call share. train: a file of chats in place of the shipped ones; tokens: of the chats; code:
    `code_key` at its start; sampled_tokens: new tokens of an answer at temperature 1, 0: none is made; expected: see
    `--expected`."""

    device: str
    target: Path
    work: Path
    train: str
    tokens: int
    code: str
    sampled_tokens: int = SAMPLED_TOKENS
    expected: bool = False


def overrides(settings: dict[str, str], seed: int, where: Where) -> list[str]:
    """--section.key=value of a run, but for its folder."""
    values = COMMON | {"data.max_tokens": str(where.tokens)} | DEVICE[where.device] | settings
    values |= {"train.seed": str(seed)}
    if where.train:
        values["data.train"] = f"[{where.train}]"
    values.pop("patch", None)
    of_data = {key: value for key, value in values.items() if key.startswith("data.")}
    data = hashlib.sha256(json.dumps(of_data, sort_keys=True).encode()).hexdigest()[:12]
    values |= {"target.path": str(where.target), "data.prepared": str(where.work / f"data-{data}")}
    return [f"{key}={value}" for key, value in values.items()]


def versions() -> dict[str, str]:
    return {package: metadata.version(package) for package in PACKAGES}


def code_key() -> str:
    """Fingerprint of the code that trains and measures."""
    digest = hashlib.sha256(json.dumps(versions()).encode())
    for file in (*sorted(Path(eagle3_xla.__file__).parent.rglob("*.py")), Path(variants.__file__)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def run_key(settings: dict[str, str], seed: int, where: Where) -> str:
    """Fingerprint of all that a run's figures depend on; where its files lie is no part of it."""
    recipe = load_recipe(RECIPE, overrides(settings, seed, where))
    chats = [sources.resolve(source) for source in [*recipe.data.train, *recipe.data.heldout]]
    chats += [Source(path=name) for name in recipe.data.decontaminate]
    contents = [target_fingerprint(recipe.target.path), *map(sources.fingerprint, chats), prompts.fingerprint(HELDOUT)]
    recipe.target.path = recipe.data.prepared = ""
    for source in (*recipe.data.train, *recipe.data.heldout):
        source.path = ""
    evaluation = [PROMPTS, TOKENS, where.sampled_tokens, where.expected]
    what = [dataclasses.asdict(recipe), contents, settings.get("patch"), evaluation, where.code]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _quiet(log: Path) -> Iterator[None]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield


def _prepare(given: list[str], log: Path) -> dict:
    with _quiet(log):
        return prepare(load_recipe(RECIPE, given))


def _run(name: str, settings: dict[str, str], seed: int, where: Where, key: str) -> dict:
    """One run; its result is kept in its folder. key: `run_key`."""
    out, target = where.work / f"run-{key}", str(where.target)
    file = out / "result.json"
    if file.exists():
        return json.loads(file.read_text())
    recipe = load_recipe(RECIPE, [*overrides(settings, seed, where), f"train.out={out / 'train'}"])
    if settings.get("patch") in KEPT_IN_MEMORY:
        shutil.rmtree(out / "train", ignore_errors=True)
    with contextlib.ExitStack() as until_end:
        until_end.enter_context(_quiet(out / "log.txt"))
        until_end.enter_context(shared_starts(where.work / "starts", where.code))
        if "patch" in settings:
            until_end.enter_context(PATCHES[settings["patch"]]())
        training = train(recipe)
        if training["ended"] != "done":
            raise KeyboardInterrupt  # the next start goes on from its checkpoint
        export(out / "train", out / "head")
        if settings.get("patch") == "ema":
            write_averages(out / "head" / "model.safetensors")
        options = _options(where)
        if where.expected:
            tau = _expected(str(out / "head"), where)
        else:
            tau = evaluate(target, str(out / "head"), HELDOUT, options)["tau"]
        if where.sampled_tokens:
            options = dataclasses.replace(options, max_new_tokens=where.sampled_tokens, temperature=1.0, seed=seed)
            at_1 = evaluate(target, str(out / "head"), HELDOUT, options)["tau"]
    result = {
        "recipe": name,
        "seed": seed,
        "key": key,
        "settings": settings,
        "tau": round(tau, 4),
        "tau_at_temperature_1": round(at_1, 4) if where.sampled_tokens else None,
        "heldout_tau": round(training["tau"], 4),
        "micro_steps": training["micro_steps"],
    }
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(file)
    return result


def _options(where: Where) -> EvalOptions:
    limit = 0 if where.expected else PROMPTS
    options = EvalOptions(limit=limit, max_new_tokens=TOKENS, batch_size=PROMPTS, baseline=False)
    options.device = "cuda" if where.device == "cuda" else "cpu"
    return options


def _answers_of(where: Where) -> Path:
    return where.work / f"answers-{target_fingerprint(str(where.target))[:12]}.json"


def _write_answers(where: Where) -> None:
    """The target's own greedy answers to all held-out prompts, [prompt ids, answer ids] each, unless they are there."""
    file = _answers_of(where)
    if not file.exists():
        options, tokenizer = _options(where), load_tokenizer(str(where.target))
        model = load_target(str(where.target), torch.float32)
        ids = prompt_ids(tokenizer, HELDOUT, options, model.config.max_position_embeddings)
        decoder = Decoder(Target(model, torch.arange(1)).to(options.device), PROMPTS)
        answers = decode_prompts(decoder, ids, stop_token_ids(str(where.target), tokenizer), options)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps([[asked, answer.tokens] for asked, answer in zip(ids, answers)]))
        partial.replace(file)


def _expected(draft: str, where: Where) -> float:
    """Expected tau of a chain of 5 on the target's own greedy answers, which decoding with any head gives too."""
    options = _options(where)
    pair = load_pair(str(where.target), draft, options)
    target, head = pair.on(options)
    given = json.loads(_answers_of(where).read_text())
    sums = [teacher_forced(target, head, pair.d2t, *each, options.steps)[1] for each in given]
    return expected_tau(rates(add_up(sums))["acceptance"])


FIGURES = {"tau": "tau, greedy", "tau_at_temperature_1": "tau, temperature 1", "heldout_tau": "held-out rows"}


def table(results: list[dict]) -> str:
    """Of each recipe: mean and standard deviation over its seeds, and the mean of what it has more than the set's first
    recipe with the same seed."""
    figures = {key: head for key, head in FIGURES.items() if all(result[key] is not None for result in results)}
    heads = [f"{head} | against the first" for head in figures.values()]
    lines = [f"| recipe | seeds | {' | '.join(heads)} |", "|---" * (2 + 2 * len(figures)) + "|"]
    by_name: dict[str, dict[int, dict]] = {}
    for result in results:
        by_name.setdefault(result["recipe"], {})[result["seed"]] = result
    first = next(iter(by_name.values()))
    for of_it in by_name.values():
        cells = [next(iter(of_it.values()))["recipe"], str(len(of_it))]
        for key in figures:
            cells.append(_spread([result[key] for result in of_it.values()], ".3f"))
            gains = [100 * (of_it[seed][key] / first[seed][key] - 1) for seed in of_it if seed in first]
            cells.append(f"{_spread(gains, '+.1f')} %" if gains and of_it is not first else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[float], form: str) -> str:
    spread = f" ± {stdev(values):{form.replace('+', '')}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}{spread}"


def plot(results: list[dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [*dict.fromkeys(result["recipe"] for result in results)][::-1]
    figure, axes = pyplot.subplots(figsize=(7, 0.9 + 0.33 * len(names)), layout="constrained")
    for key, marker, label in (("tau", "o", "greedy"), ("tau_at_temperature_1", "x", "temperature 1")):
        with_it = [result for result in results if result[key] is not None]
        places = [names.index(result["recipe"]) for result in with_it]
        if with_it:
            axes.plot([result[key] for result in with_it], places, marker, label=label, alpha=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("acceptance length tau, held-out prompts, chain of 5")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="best")
    figure.savefig(file)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", required=True, choices=[*SETS], dest="sets")
    parser.add_argument("--target", type=Path, default=Path("quickstart/target"), help="made when it is not there")
    parser.add_argument("--work", type=Path, default=Path("recipes-work"))
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--train", default="", help="a file of chats instead of the shipped ones")
    parser.add_argument("--tokens", type=int, default=0, help="to train on, of the chats (default: all)")
    parser.add_argument("--device", default="cpu", choices=[*DEVICE])
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--sampled-tokens", type=int, default=SAMPLED_TOKENS, help="0: no evaluation at temperature 1")
    parser.add_argument(
        "--expected",
        action="store_true",
        help="tau by one pass over the target's greedy answers to all held-out prompts, not by decoding with the head: "
        "docs/concepts.md; none at temperature 1",
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="", help="recipes of the set, separated by ;")
    arguments = parser.parse_args()
    write_embedded_target(arguments.target)
    arguments.out.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    only = [name for name in arguments.only.split(";") if name]
    wanted = [
        (of, name, settings, seed)
        for seed in seeds
        for of in arguments.sets
        for name, settings in SETS[of].items()
        if not only or name in only
    ]
    of_chats = arguments.train, arguments.tokens
    if arguments.expected:
        arguments.sampled_tokens = 0
    evaluation = arguments.sampled_tokens, arguments.expected
    where = Where(arguments.device, arguments.target, arguments.work, *of_chats, code_key(), *evaluation)
    results = {
        of: kept_runs(arguments.out / f"{of}.json", of, {(run[1], run[3]) for run in wanted if run[0] == of}, where)
        for of in arguments.sets
    }
    processes = ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn"), end_with_parent)
    with processes as pool:
        # The data first: runs share it.
        given = [overrides(settings, 0, where) for _, _, settings, _ in wanted]
        datasets = {next(x for x in each if x.startswith("data.prepared=")): each for each in given}
        for number, _ in enumerate(
            pool.map(_prepare, datasets.values(), [arguments.work / f"{i}.log" for i in range(len(datasets))])
        ):
            print(f"data {number + 1} of {len(datasets)}", file=sys.stderr)
        if where.expected:
            pool.submit(_write_answers, where).result()
        # A recipe that several sets have runs once for each seed.
        runs: dict[str, list[tuple]] = {}
        for run in wanted:
            runs.setdefault(run_key(*run[2:], where), []).append(run)
        futures = {pool.submit(_run, *of_it[0][1:], where, key): of_it for key, of_it in runs.items()}
        failed = []
        for future in as_completed(futures):
            if error := future.exception():  # the other runs go on
                failed.append(f"{futures[future][0][:2]}: {type(error).__name__} {error}")
                print(failed[-1], file=sys.stderr)
                continue
            result = future.result()
            for of, name, _, seed in futures[future]:
                order = [*SETS[of]]
                results[of] = [run for run in results[of] if (run["recipe"], run["seed"]) != (name, seed)]
                results[of].append(result | {"recipe": name})
                results[of].sort(key=lambda result: (order.index(result["recipe"]), result["seed"]))
                write(arguments, of, results[of])
                print(f"{of}: {name}, seed {seed}: tau {result['tau']}", file=sys.stderr, flush=True)
    for of in arguments.sets:
        if results[of]:
            plot(results[of], arguments.out / f"{of}.svg")
            print(f"\n{of}\n\n{table(results[of])}")
    if failed:
        sys.exit(f"{len(failed)} runs failed, the first: {failed[0]}")


def kept_runs(file: Path, of: str, wanted: set[tuple[str, int]], where: Where) -> list[dict]:
    """The runs of `file`, but for those that would be other ones today: of these the wanted ones are replaced.

    wanted: (recipe, seed) of set `of` that this call runs. Exits when others than these would be other ones today.
    """
    runs = json.loads(file.read_text())["runs"] if file.exists() else []
    settings = SETS[of]
    kept = [
        run
        for run in runs
        if run["recipe"] in settings and run.get("key") == run_key(settings[run["recipe"]], run["seed"], where)
    ]
    for run in runs:
        if run not in kept and (run["recipe"], run["seed"]) not in wanted:
            sys.exit(
                f"{file}: {run['recipe']!r}, seed {run['seed']}, is of another recipe, target, code or other chats "
                "than this call's, and not one of its runs; remove the file, or name another folder with --out"
            )
    return kept


def write(arguments: argparse.Namespace, of: str, results: list[dict]) -> None:
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or platform.machine()
    seeds = ",".join(str(seed) for seed in sorted({result["seed"] for result in results}))
    command = f"python benchmarks/recipes.py --set {of} --device {arguments.device} --seeds {seeds}"
    names = [*dict.fromkeys(result["recipe"] for result in results)]
    command += f" --only {shlex.quote(';'.join(names))}" if names != [*SETS[of]] else ""
    command += f" --tokens {arguments.tokens}" if arguments.tokens else ""
    sampled, expected = arguments.sampled_tokens, arguments.expected
    command += " --expected" if expected else ""
    command += f" --sampled-tokens {sampled}" if sampled != SAMPLED_TOKENS and not expected else ""
    command += f" --train {Path(arguments.train).name}" if arguments.train else ""
    about = {
        "command": command,
        "device": f"{device}, {os.cpu_count()} cores",
        "versions": versions(),
        "evaluation": f"{'all' if expected else f'first {PROMPTS}'} of {HELDOUT}, chain of 5, {TOKENS} new tokens"
        + (", expected from the target's own answers" if expected else "")
        + (f" ({sampled} sampled)" if sampled else ""),
        "common": COMMON | DEVICE[arguments.device],
    }
    file = arguments.out / f"{of}.json"
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(about | {"runs": results}, indent=1) + "\n")
    partial.replace(file)


if __name__ == "__main__":
    main()
