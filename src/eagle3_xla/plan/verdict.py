"""`plan`: does a recipe fit a slice, how long does it take, what does it cost."""

import dataclasses
import os
import time
from typing import Any

from eagle3_xla.config import Recipe
from eagle3_xla.data.manifest import prepared_manifest
from eagle3_xla.errors import UserError
from eagle3_xla.plan.disk import disk_bytes
from eagle3_xla.plan.report import verdict_screen
from eagle3_xla.plan.rows import as_the_run, planned_tokens, run_graphs
from eagle3_xla.target.families import refuse_longer_rows
from eagle3_xla.target.known import plan_config
from eagle3_xla.train.flops import flops_per_token
from eagle3_xla.xla.time_model import STATED_ERROR, host_seconds
from eagle3_xla.xla.tpu import GIB, DoesNotFit, Memory, compiler_flags, find_topology


def plan(recipe: Recipe) -> dict:
    """The verdict with its `screen`, and `ok`: whether the recipe fits."""
    verdict = compile_verdict(recipe)
    return {"ok": verdict["fits"], **verdict, "screen": verdict_screen(verdict)}


def compile_verdict(recipe: Recipe) -> dict:
    """Compile the recipe's step for `plan.topology` and report on it; the keys are those of --json.

    Raises UserError for a topology, mesh or target that can't be planned.
    """
    # The step is lowered for virtual CPU devices, one for each chip.
    os.environ.update(PJRT_DEVICE="CPU", CPU_NUM_DEVICES=str(recipe.xla.dp * recipe.xla.tp))
    topology = find_topology(recipe.plan.topology)
    if recipe.xla.dp * recipe.xla.tp != topology.chips:
        raise UserError(
            f"xla.dp * xla.tp = {recipe.xla.dp} * {recipe.xla.tp} = {recipe.xla.dp * recipe.xla.tp}, but "
            f"{topology.name} has {topology.chips} chips"
        )
    if recipe.xla.device != "xla":
        raise UserError(f"xla.device is {recipe.xla.device}; only device xla is compiled for a TPU")
    compiler_flags(recipe.plan.xla_flags)
    target = plan_config(recipe.target.path)
    if size := _indivisible(recipe, target, recipe.xla.tp):
        raise UserError(f"xla.tp is {recipe.xla.tp}, which does not divide {size}")
    recipe, notes = as_the_run(recipe)
    prepared = prepared_manifest(recipe.data.prepared)
    refuse_longer_rows(target, recipe.data.row_length, recipe.data.prepared if prepared else "setting data.row_length")

    from eagle3_xla.plan.compiled import compile_step

    started = time.perf_counter()
    limit = topology.chip.hbm_bytes
    mesh = {"dp": recipe.xla.dp, "tp": recipe.xla.tp, "draft_data_parallel": recipe.xla.draft_data_parallel}
    layers: dict[str, int] = {"extrapolated": recipe.plan.layers not in (0, target.num_hidden_layers)}
    layers |= {"layers": target.num_hidden_layers, "compiled_layers": recipe.plan.layers or target.num_hidden_layers}
    (total, of), graphs = planned_tokens(recipe), run_graphs(recipe)
    disk = disk_bytes(recipe, target, total)
    verdict = {"topology": topology.name, "chips": topology.chips, "mesh": mesh, **layers, "disk_bytes": disk}
    verdict |= {"notes": notes} if notes else {}
    try:
        compiled = compile_step(recipe, target, topology)
    except DoesNotFit as refusal:
        buffers = [{"bytes": size, "shape": shape, "name": name} for size, shape, name in refusal.largest]
        refused = {"fits": False, "hbm_bytes_per_chip": refusal.needed, "hbm_limit_bytes": limit}
        return verdict | refused | {"largest_buffers": buffers, "advice": advice(recipe, target, refusal.at_rest)}
    step, memory = compiled.time, compiled.memory
    notes += loaded_graphs(graphs, memory, limit)
    tokens = recipe.train.batch_size * recipe.xla.dp * recipe.data.row_length
    rate = tokens / step.total
    hours = total / rate / 3600 if total else None
    forward = dataclasses.replace(recipe.train, reuse_states=False)  # it is in what was compiled
    model_flops = flops_per_token(target, dataclasses.replace(recipe, train=forward))
    price = recipe.plan.price_per_chip_hour
    host = host_seconds(compiled.arguments)
    verdict |= {"notes": notes} if notes else {}
    return verdict | {
        "fits": True,
        "hbm_bytes_per_chip": memory.total,
        "hbm_limit_bytes": limit,
        "hbm": memory._asdict(),
        "state_donated": compiled.donated,
        "flops_per_chip": compiled.flops,
        "model_flops_per_chip": model_flops * tokens / topology.chips,
        "mfu": model_flops * rate / (topology.chips * topology.chip.peak_flops),
        "collectives": dict(step.counts),
        "collective_bytes": dict(step.bytes),
        "modelled_step_seconds": step.total,
        "modelled_parts": {
            "matmul": step.matmul,
            "memory": step.memory,
            "collectives": step.collectives,
            "hidden_collectives": step.hidden_collectives,
        },
        "modelled_error": STATED_ERROR,
        "host_step_seconds": host,
        "host_is_the_limit": host > step.total,
        "tokens_per_step": tokens,
        "tokens_per_second": rate,
        "tokens": total,
        "tokens_of": of,
        "modelled_hours": hours,
        "chip_hours": hours and hours * topology.chips,
        "dollars": hours * topology.chips * price if hours and price else None,
        "seconds": time.perf_counter() - started,
    }


def _indivisible(recipe: Recipe, target: Any, tp: int) -> str | None:
    """The size of the target or of the head, with its value, that tp devices can't share."""
    names = ("num_key_value_heads", "num_attention_heads", "intermediate_size", "moe_intermediate_size")
    sizes = {f"the target's {name}": getattr(target, name, 0) for name in names}
    sizes |= {f"draft.{name}": getattr(recipe.draft, name) for name in ("key_value_heads", "attention_heads")}
    return next((f"{name} {size}" for name, size in sizes.items() if size % tp), None)


def loaded_graphs(graphs: dict[str, int], memory: Memory, limit: int) -> list[str]:
    """What is to be said of a run with more graphs than one of a step and one of the evaluation: it keeps the code of
    all in HBM, and `memory` is of one step. graphs: `run_graphs`'.
    """
    others = sum(graphs.values()) - 1 - graphs.get("update", 0)  # the compiled step has the update's code
    if others <= graphs["evaluation"] <= 1:
        return []
    most = memory.total + others * memory.code
    counts = ", ".join(f"{name} {count}" for name, count in graphs.items())
    note = f"the run keeps {sum(graphs.values())} graphs loaded ({counts}): beside this step, the code of the others "
    note += f"may need up to {others * memory.code / GIB:.2f} GiB"
    return [note + f"; with that it does not fit: {most / GIB:.2f} of {limit / GIB:.2f} GiB" * (most > limit)]


def advice(recipe: Recipe, target: Any, at_rest: bool) -> str:
    """Settings that help; at_rest: weights and optimizer alone are too large, before any activation."""
    ways, xla, train = [], recipe.xla, recipe.train
    if not at_rest and not xla.remat:
        ways.append("xla.remat=true (TTT steps computed again in the backward pass)")

    def dealt(batch: int, tp: int) -> bool:  # as load_recipe wants it
        return not xla.draft_data_parallel or batch % tp == 0

    rows = train.batch_size * train.gradient_accumulation  # of a replica in an update
    smaller = [b for b in range(1, train.batch_size // 2 + 1) if rows % b == 0 and dealt(b, xla.tp)]
    if not at_rest and smaller:
        ways.append(
            f"train.batch_size={smaller[-1]} with train.gradient_accumulation={rows // smaller[-1]} (the same update)"
        )
    chips, steps = xla.dp * xla.tp, xla.dp * train.gradient_accumulation
    for tp in range(xla.tp + 1, chips + 1):
        dp = chips // tp
        if chips % tp == 0 and not _indivisible(recipe, target, tp) and steps % dp == 0 and dealt(train.batch_size, tp):
            ways.append(
                f"a larger xla.tp: xla.tp={tp} with xla.dp={dp} and train.gradient_accumulation={steps // dp} (fewer "
                "copies of the weights, the same update)"
            )
            break
    shorter = "" if at_rest else "a shorter data.row_length, "
    ways.append(f"{shorter}a smaller data.draft_vocab_size, or a larger slice")
    return "; ".join(ways)
