"""Plans of the shipped recipes: one JSON file each in benchmarks/plans, and their table in benchmarks/README.md.

    nice -n 19 python benchmarks/recipes_plan.py [RECIPE ...] [--out DIR] [--section.key=value ...]

Resumable: a recipe is compiled again when its lowered step, slice, compiler or flags are not those that the file has.
Each is planned from 8 of its target's layers, which benchmarks/README.md compares with all, or from as many as
--plan.layers says (0: all). With --out, the files go to DIR, and the table is only printed.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import resource
import sys
import time
from importlib import metadata
from pathlib import Path

from eagle3_xla.config import load_recipe, recipe_names
from eagle3_xla.plan.search import COMPILER
from eagle3_xla.plan.verdict import compile_verdict
from eagle3_xla.processes import end_with_parent
from eagle3_xla.target.known import plan_config

FOLDER, README = Path(__file__).parent / "plans", Path(__file__).parent / "README.md"
FEW = 8  # layers that are compiled of every target
BEGIN, END = "<!-- recipes_plan.py writes from here -->", "<!-- to here -->"
GIB = 1024**3
HEADS = (
    "recipe",
    "dp x tp",
    "rows",
    "HBM per chip, GiB",
    "fits",
    "step ms",
    "host ms",
    "tokens/s",
    "MFU",
    "run",
    "layers",
)


def plan_one(name: str, overrides: list[str], file: Path) -> None:
    """Write the recipe's verdict, unless the file has it. In a process of its own: it has the slice's devices."""
    end_with_parent()
    recipe = load_recipe(name, [f"plan.layers={FEW}", *overrides])
    os.environ.update(PJRT_DEVICE="CPU", CPU_NUM_DEVICES=str(recipe.xla.dp * recipe.xla.tp))
    from eagle3_xla.plan.compiled import lowered_steps
    from eagle3_xla.xla.tpu import find_topology, libtpu_flags

    topology = find_topology(recipe.plan.topology)
    coordinates = topology.coordinates()
    key = hashlib.sha256(" ".join([topology.name, recipe.plan.xla_flags, libtpu_flags(topology)]).encode())
    key.update(" ".join(f"{package} {metadata.version(package)}" for package in COMPILER).encode())
    for lowered in lowered_steps(recipe, plan_config(recipe.target.path), coordinates):
        key.update(lowered.hlo)
    if file.exists() and json.loads(file.read_text())["key"] == key.hexdigest():
        return print(f"{name}: planned before", file=sys.stderr)
    started = time.perf_counter()
    verdict = compile_verdict(recipe)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    shape = {"rows": recipe.train.batch_size * recipe.xla.dp, "remat": recipe.xla.remat}
    cost = {"cpu_seconds": round(usage.ru_utime + usage.ru_stime), "peak_gb": round(usage.ru_maxrss / 1e6, 1)}
    result = {"key": key.hexdigest(), "recipe": name, **shape, **verdict, **cost}
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(file)
    print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)


def table(folder: Path) -> str:
    lines = [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    for name in recipe_names():
        file = folder / f"{name}.json"
        if file.exists():
            lines.append(f"| {' | '.join(_row(json.loads(file.read_text())))} |")
    return "\n".join(lines)


def _row(verdict: dict) -> list[str]:
    mesh, layers = verdict["mesh"], str(verdict["layers"])
    layout = f"{mesh['dp']} x {mesh['tp']}"
    layout += ", draft over all" * mesh["draft_data_parallel"] + ", remat" * verdict["remat"]
    memory = f"{verdict['hbm_bytes_per_chip'] / GIB:.2f} of {verdict['hbm_limit_bytes'] / GIB:.2f}"
    if verdict["extrapolated"]:
        layers = f"{verdict['layers']}, from {verdict['compiled_layers']}"
    start = [f"`{verdict['recipe']}`", layout, str(verdict["rows"]), memory]
    if not verdict["fits"]:
        return [*start, "no", "", "", "", "", "", layers]
    step, host = (f"{verdict[name] * 1e3:.0f}" for name in ("modelled_step_seconds", "host_step_seconds"))
    run = f"{verdict['modelled_hours'] * 60:.0f} minutes, {verdict['chip_hours']:.1f} chip-hours"
    return [*start, "yes", step, host, f"{verdict['tokens_per_second']:,.0f}", f"{verdict['mfu']:.0%}", run, layers]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="default: all that have a target and a slice")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options, overrides = parser.parse_known_args()
    options.out.mkdir(parents=True, exist_ok=True)
    overrides = [override.removeprefix("--") for override in overrides]
    loaded = {name: load_recipe(name, overrides) for name in options.recipes or recipe_names()}
    names = [name for name, recipe in loaded.items() if recipe.target.path and recipe.xla.device == "xla"]
    names.sort(key=lambda name: plan_config(loaded[name].target.path).num_hidden_layers)  # the cheap ones first
    failed = []
    for name in names:
        print(f"{name} ...", file=sys.stderr)
        arguments = (name, overrides, options.out / f"{name}.json")
        process = multiprocessing.get_context("fork").Process(target=plan_one, args=arguments)
        process.start()
        process.join()
        if process.exitcode:
            failed.append(name)
        if options.out == FOLDER:
            before, _, rest = README.read_text().partition(BEGIN)
            README.write_text(f"{before}{BEGIN}\n\n{table(FOLDER)}\n\n{END}{rest.partition(END)[2]}")
    print(table(options.out))
    if failed:
        sys.exit(f"not planned: {', '.join(failed)}")


if __name__ == "__main__":
    main()
