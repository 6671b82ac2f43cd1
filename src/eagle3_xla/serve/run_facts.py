"""What a run's own files say about a head's training, for its card: run.yaml, metrics.jsonl, manifest.json, and the
verdict of `plan --json` where one lies in the run or beside it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from eagle3_xla import checkpoint as checkpoints
from eagle3_xla.checks import escaped, mapping, number, read_json, text
from eagle3_xla.config import Recipe, load_recipe
from eagle3_xla.data.files import PACKAGED
from eagle3_xla.draft.saved import SavedHead
from eagle3_xla.errors import UserError
from eagle3_xla.evaluate.curves import read_metrics
from eagle3_xla.outputs import RUN_FILE

PLAN = "plan.json"
GIB = 1024**3


class RunFacts(NamedTuple):
    """sections: of the card, about training and plan; limits: sentences on what the head has not seen; left_out: what
    they lack for want of a file."""

    sections: str
    limits: list[str]
    left_out: list[str]


def run_facts(run: Path, head: SavedHead) -> RunFacts:
    """Raises UserError when the head is none of this run's, or its plan.json is no verdict of `plan --json`."""
    if not (run / RUN_FILE).is_file():
        raise UserError(f"--run {run}: no {RUN_FILE}; the folder that `train` wrote is expected")
    recipe = load_recipe(str(run / RUN_FILE), [])
    saved = _checkpoint_of(run, head)
    step, manifest, other_data = saved.micro_step, *_manifest(recipe, saved.data_key)
    if "row_length" in manifest:  # training takes the rows as they were prepared, whatever the setting is
        recipe.data.row_length = number(manifest["row_length"], "manifest.json: row_length", 1, whole=True)
    rows, left_out = _rows(recipe, step, manifest), []
    metrics = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    taus = [row["heldout_tau"] for row in metrics if row.get("step") == step and "heldout_tau" in row]
    devices = {row["device"] for row in metrics if isinstance(row.get("device"), str)}
    seconds = [row["seconds"] for row in metrics if row.get("step", 0) <= step and "seconds" in row]
    known = {
        "held-out expected tau": f"{taus[-1]:.3f}" if taus else "",
        "hardware": ", ".join(devices),
        "hours of training": f"{sum(seconds) / 3600:.2g}" if seconds else "",
    }
    for name, value in known.items():
        rows += [(name, value)] if value else []
        left_out += [] if value else [name]
    data, sources = _mix(manifest)
    left_out += [] if data else [f"the data mix ({other_data or 'manifest.json of data.prepared'})"]
    plan, without = _plan(run, recipe)
    left_out += [without] if without else []
    languages = ", ".join(recipe.data.languages)
    limits = [
        f"Trained on rows of {recipe.data.row_length:,} tokens: a longer context is new to it.",
        f"Languages kept in the data: {escaped(languages)}." if languages else "Its data was not chosen by language.",
    ]
    limits += [f"Its domains are those of its data: {', '.join(sources)}."] if sources else []
    return RunFacts(f"\n## Training\n\n{_table(rows)}\n{data}{plan}", limits, left_out)


def _table(rows: Sequence[tuple[str, object]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {escaped(str(value))} |" for name, value in rows)])


def _manifest(recipe: Recipe, data_key: str) -> tuple[dict, str]:
    """(the manifest of the data that the checkpoint of that data_key was trained on, {} without one; why not)."""
    file = Path(recipe.data.prepared) / "manifest.json"
    manifest = read_json(file) if recipe.data.prepared and file.is_file() else {}
    if manifest and manifest.get("key") != data_key.partition(" ")[0]:
        return {}, "data.prepared holds other data than the head was trained on"
    return manifest, ""


def _checkpoint_of(run: Path, head: SavedHead) -> checkpoints.Checkpoint:
    """The checkpoint that the head was exported from; a damaged one is passed over."""
    damaged = ""
    for folder in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        try:
            saved = checkpoints.load(folder)
        except UserError as error:
            damaged = f" ({error})"
            continue
        if saved.head.keys() <= head.tensors.keys() and all(
            torch.equal(value.to(head.tensors[name].dtype), head.tensors[name]) for name, value in saved.head.items()
        ):
            return saved
    raise UserError(f"--run {run}: none of its checkpoints holds the weights of {head.folder}{damaged}")


def _rows(recipe: Recipe, step: int, manifest: dict) -> list[tuple[str, object]]:
    train, loss, xla = recipe.train, recipe.loss, recipe.xla
    in_a_step = train.batch_size * xla.dp
    batch = in_a_step * train.gradient_accumulation
    report = manifest.get("train")
    there = report.get("rows") if isinstance(report, dict) else None
    passes = f"{step * in_a_step / there:.1f} of " if isinstance(there, int) and there > 0 else ""
    drawn = "" if loss.anchors == 1 else f", after the first at {loss.anchors:.0%} of the rows"
    inner = "Muon for fc and the layer's matrices, else " if train.optimizer == "muon" else ""
    return [
        ("framework", "eagle3-xla, PyTorch/XLA" if xla.device == "xla" else f"eagle3-xla, PyTorch on {xla.device}"),
        ("mesh", f"dp={xla.dp} x tp={xla.tp}"),
        ("epochs", f"{passes}at most {train.epochs}"),
        ("micro-steps", f"{step}, {train.gradient_accumulation} for each step of the optimizer"),
        ("batch", f"{batch} rows of {recipe.data.row_length} tokens"),
        ("optimizer", f"{inner}AdamW, betas {train.beta1:g} and {train.beta2:g}, weight decay {train.weight_decay:g}"),
        ("lr", f"{train.lr:g}, warm-up over {train.warmup:.0%} of the steps, cosine decay"),
        ("gradients", f"at most of norm {train.max_grad_norm:g}"),
        ("TTT", f"{loss.ttt_length} steps{drawn}, step k weighs {loss.decay:g}^k, loss {loss.objective}"),
        ("longest context trained on", f"{recipe.data.row_length} tokens"),
        ("languages", ", ".join(recipe.data.languages) or "those of the data, none was left out"),
        ("precision", "bfloat16 over float32 weights" if xla.autocast else "float32"),
    ]


def _source(source: dict) -> str:
    """Its name; a path may say more of its owner than a card should, but for one in this package."""
    path, name = str(source.get("path")), str(source.get("name", "unnamed"))
    return f"{path.removeprefix(PACKAGED)} of eagle3-xla" if path.startswith(PACKAGED) else name


def _mix(manifest: dict) -> tuple[str, list[str]]:
    """(the table of the sources, their names)."""
    sources = manifest.get("sources")
    named = [s for s in sources if isinstance(s, dict)] if isinstance(sources, list) else []
    chats = [(_source(s), s.get("train")) for s in named]
    counts = [
        (name, t["chats"], t.get("answer_tokens", 0)) for name, t in chats if isinstance(t, dict) and "chats" in t
    ]
    total = sum(chats for _, chats, _ in counts)
    if not total:
        return "", []
    lines = [f"| {escaped(name)} | {n:,} | {n / total:.1%} | {tokens:,} |" for name, n, tokens in counts if n]
    table = "\n".join(["", "| data | conversations | share | answer tokens |", "|---|---|---|---|", *lines, ""])
    return table, [escaped(name) for name, n, _ in counts if n]


def _plan(run: Path, recipe: Recipe) -> tuple[str, str]:
    """(the card's section, why there is none): what `plan --json` wrote to plan.json in the run or beside it."""
    file = next((file for file in (run / PLAN, run.absolute().parent / PLAN) if file.is_file()), None)
    if file is None:
        return "", f"plan figures ({PLAN} in the run or beside it, written by `plan --json`)"
    verdict = read_json(file)

    def positive(name: str, whole: bool = False) -> float:
        return number(verdict.get(name), f"{file}: {name}", 0, whole=whole, above=True)

    topology = text(verdict.get("topology"), f"{file}: topology")
    mesh = mapping(verdict.get("mesh"), f"{file}: mesh")
    xla, tokens = recipe.xla, recipe.train.batch_size * recipe.xla.dp * recipe.data.row_length
    trained = {"dp": xla.dp, "tp": xla.tp, "draft_data_parallel": xla.draft_data_parallel}
    if mesh != trained or verdict.get("tokens_per_step", tokens) != tokens:
        return "", f"plan figures ({file.name} is of another mesh or batch than the run)"
    memory = f"{positive('hbm_bytes_per_chip') / GIB:.2f} of {positive('hbm_limit_bytes') / GIB:.2f} GiB"
    rows = [("slice", f"{topology}, {positive('chips', whole=True)} chips"), ("memory per chip", memory)]
    if verdict.get("fits") is not True:
        rows.append(("fits", "no"))
    else:
        rows += [
            ("modelled step", f"{1000 * positive('modelled_step_seconds'):.0f} ms"),
            ("modelled speed", f"{positive('tokens_per_second'):,.0f} tokens/s"),
        ]
        if verdict.get("modelled_hours") is not None:
            length = f"{positive('modelled_hours'):.2f} hours, {positive('chip_hours'):.1f} chip-hours"
            rows.append(("modelled run", f"{length} for {positive('tokens', whole=True):,} tokens"))
    said = "What the TPU's compiler says of this training (`eagle3-xla plan`); times are modelled, not measured."
    return f"\n## Planned for a TPU\n\n{said}\n\n{_table(rows)}\n", ""
