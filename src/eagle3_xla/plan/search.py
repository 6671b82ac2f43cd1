"""`plan --search`: the same maths on other meshes and batch shapes, each compiled in a process of its own."""

import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from pathlib import Path

from tqdm import tqdm

import eagle3_xla
from eagle3_xla import storage
from eagle3_xla.config import Recipe
from eagle3_xla.data.manifest import prepared_manifest
from eagle3_xla.errors import UserError
from eagle3_xla.plan.verdict import plan
from eagle3_xla.processes import end_with_parent
from eagle3_xla.target.known import plan_config
from eagle3_xla.xla.tpu import GIB, find_topology, not_installed

COMPILER = ("torch_xla", "jaxlib", "libtpu")


def candidates(recipe: Recipe, chips: int, kv_heads: int) -> list[list[Recipe]]:
    """Recipes with the rows per update of `recipe`; in each list the mesh and the draft phase's layout are one and the
    batch per replica grows.
    """
    train, rows = recipe.train, _rows(recipe)
    meshes = []
    splits = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and chips % n == 0]
    for tp, split_draft in [(tp, split) for tp in splits for split in (False, True) if tp > 1 or not split]:
        dp = chips // tp
        xla = dataclasses.replace(recipe.xla, dp=dp, tp=tp, draft_data_parallel=split_draft)
        batches = [2**i for i in range(rows.bit_length()) if rows % (dp * 2**i) == 0]
        batches = [batch for batch in batches if not split_draft or batch % tp == 0]
        shapes = [dataclasses.replace(train, batch_size=b, gradient_accumulation=rows // (dp * b)) for b in batches]
        meshes.append([dataclasses.replace(recipe, xla=xla, train=shape) for shape in shapes])
    return meshes


def _rows(recipe: Recipe) -> int:
    """Of an update."""
    return recipe.xla.dp * recipe.train.batch_size * recipe.train.gradient_accumulation


def search(recipe: Recipe) -> dict:
    """Verdicts of all candidates, the fastest that fits first.

    A batch that doesn't fit is tried again with xla.remat, as are the larger ones of its mesh; one that still doesn't
    fit ends the mesh's list.

    Verdicts are kept in the user's cache folder, by recipe, the target's config, prepared data, a warm start's config,
    LIBTPU_INIT_ARGS, this package's code, and versions of transformers and the compiler.

    Raises UserError when there is no candidate or no compiler.
    """
    topology = find_topology(recipe.plan.topology)
    heads = math.gcd(plan_config(recipe.target.path).num_key_value_heads, recipe.draft.key_value_heads)
    meshes = candidates(recipe, topology.chips, heads)
    if not any(meshes):
        raise UserError(
            f"{_rows(recipe)} rows of an update (xla.dp * train.batch_size * train.gradient_accumulation) can't be "
            f"dealt to the {topology.chips} chips of a {topology.name}; a multiple of "
            f"{topology.chips // math.gcd(topology.chips, heads)} can, for {heads} key-value heads"
        )
    rows, bar = [], tqdm(total=sum(map(len, meshes)), desc=f"plans for {topology.name}", unit="plan")
    forks = multiprocessing.get_context("forkserver")  # of a process that has imported everything, once
    forks.set_forkserver_preload(["eagle3_xla.plan.compiled"])
    with ProcessPoolExecutor(1, forks, initializer=end_with_parent, max_tasks_per_child=1) as compilers:
        for mesh in meshes:
            rows += _verdicts_of(mesh, compilers, bar)
    bar.close()
    rows.sort(key=lambda row: row.get("tokens_per_second", 0), reverse=True)
    best = next((row for row in rows if row["fits"]), None)
    return {"ok": best is not None, "topology": topology.name, "best": best, "plans": rows, "screen": _table(rows)}


def _verdicts_of(mesh: list[Recipe], compilers: Executor, bar: tqdm) -> list[dict]:
    rows, remats = [], [False, True]
    for candidate in mesh:
        while remats:
            xla = dataclasses.replace(candidate.xla, remat=remats[0])
            bar.set_postfix(_shape(candidate) | {"remat": xla.remat})
            verdict = _verdict(dataclasses.replace(candidate, xla=xla), compilers)
            rows.append(_shape(candidate) | {"remat": xla.remat} | verdict)
            if verdict["fits"]:
                break
            remats.pop(0)
        bar.update()
    return rows


def _shape(recipe: Recipe) -> dict:
    shape = {"dp": recipe.xla.dp, "tp": recipe.xla.tp, "draft_data_parallel": recipe.xla.draft_data_parallel}
    return shape | {name: getattr(recipe.train, name) for name in ("batch_size", "gradient_accumulation")}


def _verdict(recipe: Recipe, compilers: Executor) -> dict:
    cached = storage.cached("plans", _key(recipe)).with_suffix(".json")
    cached.parent.mkdir(parents=True, exist_ok=True)
    if cached.exists():
        return json.loads(cached.read_text())
    try:
        verdict = compilers.submit(plan, recipe).result()
    except BrokenProcessPool:
        raise UserError(f"a plan failed: the compiler's process died at {_shape(recipe)}") from None
    partial = cached.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(verdict))
    os.replace(partial, cached)
    return verdict


def _key(recipe: Recipe) -> str:
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(recipe), sort_keys=True).encode())
    digest.update(plan_config(recipe.target.path).to_json_string().encode())
    try:
        digest.update(" ".join(metadata.version(name) for name in (*COMPILER, "transformers")).encode())
    except metadata.PackageNotFoundError as error:
        raise not_installed(error) from None
    digest.update(os.environ.get("LIBTPU_INIT_ARGS", "").encode())  # torch_xla's defaults add to it (xla/tpu.py)
    if manifest := prepared_manifest(recipe.data.prepared):
        digest.update(storage.read(manifest))
    if recipe.train.warm_start and storage.exists(head := storage.join(recipe.train.warm_start, "config.json")):
        digest.update(storage.read(head))  # its draft vocabulary is the run's
    for file in sorted(Path(eagle3_xla.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]


def _table(rows: list[dict]) -> str:
    heads = ("dp x tp", "draft", "remat", "batch", "accum.", "HBM GiB", "step ms", "tokens/s", "MFU", "hours")
    lines = ["{:>8} {:>6} {:>5} {:>5} {:>6} {:>7} {:>7} {:>8} {:>4} {:>5}".format(*heads)]
    for row in rows:
        hbm = row["hbm_bytes_per_chip"] / GIB
        draft = f"dp {row['dp'] * row['tp']}" if row["draft_data_parallel"] or row["tp"] == 1 else f"tp {row['tp']}"
        line = f"{row['dp']:>4} x {row['tp']:<1} {draft:>6} {'yes' if row['remat'] else 'no':>5}"
        line += f" {row['batch_size']:>5} {row['gradient_accumulation']:>6} {hbm:>7.2f}"
        if not row["fits"]:
            lines.append(f"{line} does not fit")
            continue
        hours = f"{row['modelled_hours']:.2f}" if row["modelled_hours"] else "-"
        line += f" {row['modelled_step_seconds'] * 1e3:>7.0f} {row['tokens_per_second']:>8,.0f} {row['mfu']:>4.0%}"
        lines.append(f"{line} {hours:>5}")
    return "\n".join([*lines, "modelled, not measured on a chip"])
