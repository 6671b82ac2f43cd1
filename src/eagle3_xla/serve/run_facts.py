"""What a run's own files say about a head's training, for its card: run.yaml, metrics.jsonl, manifest.json."""

from pathlib import Path

import torch

from eagle3_xla import checkpoint as checkpoints
from eagle3_xla.checks import escaped, parse_json, read_json
from eagle3_xla.config import Recipe, load_recipe
from eagle3_xla.draft.saved import SavedHead
from eagle3_xla.errors import UserError
from eagle3_xla.outputs import RUN_FILE


def run_facts(run: Path, head: SavedHead) -> tuple[str, list[str]]:
    """(the card's section, what it lacks for want of a file). Raises UserError when the head is none of this run's."""
    if not (run / RUN_FILE).is_file():
        raise UserError(f"--run {run}: no {RUN_FILE}; the folder that `train` wrote is expected")
    recipe = load_recipe(str(run / RUN_FILE), [])
    step = _step_of(run, head)
    rows, left_out = _rows(recipe, step), []
    metrics = _metrics(run / "metrics.jsonl")
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
    manifest = Path(recipe.data.prepared) / "manifest.json"
    data = _mix(read_json(manifest)) if recipe.data.prepared and manifest.is_file() else ""
    left_out += [] if data else ["the data mix (manifest.json of data.prepared)"]
    table = "\n".join(f"| {name} | {escaped(str(value))} |" for name, value in rows)
    return f"\n## Training\n\n| | |\n|---|---|\n{table}\n{data}", left_out


def _step_of(run: Path, head: SavedHead) -> int:
    """The micro-step of the checkpoint that the head was exported from."""
    for folder in sorted((run / "checkpoints").glob("step-*"), reverse=True):
        saved = checkpoints.load(folder)
        if saved.head.keys() <= head.tensors.keys() and all(
            torch.equal(value.to(head.tensors[name].dtype), head.tensors[name]) for name, value in saved.head.items()
        ):
            return saved.micro_step
    raise UserError(f"--run {run}: none of its checkpoints holds the weights of {head.folder}")


def _rows(recipe: Recipe, step: int) -> list[tuple[str, object]]:
    train, loss, xla = recipe.train, recipe.loss, recipe.xla
    batch = train.batch_size * xla.dp * train.gradient_accumulation
    return [
        ("framework", "eagle3-xla, PyTorch/XLA" if xla.device == "xla" else f"eagle3-xla, PyTorch on {xla.device}"),
        ("mesh", f"dp={xla.dp} x tp={xla.tp}"),
        ("micro-steps", f"{step} of at most {train.epochs} epochs"),
        ("batch", f"{batch} rows of {recipe.data.row_length} tokens"),
        ("optimizer", f"AdamW, lr {train.lr:g}, betas {train.beta1:g} and {train.beta2:g}, cosine decay"),
        ("warm-up", f"{train.warmup:.0%} of the steps"),
        ("TTT", f"{loss.ttt_length} steps, step k weighs {loss.decay:g}^k, loss {loss.objective}"),
        ("longest context trained on", f"{recipe.data.row_length} tokens"),
        ("languages", ", ".join(recipe.data.languages) or "those of the data, none was left out"),
        ("precision", "bfloat16 over float32 weights" if xla.autocast else "float32"),
    ]


def _metrics(file: Path) -> list[dict]:
    rows = []
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else ():
        try:
            row = parse_json(line, str(file))
        except UserError:  # a line cut by a kill
            continue
        rows += [row] if isinstance(row, dict) else []
    return rows


def _mix(manifest: dict) -> str:
    sources = manifest.get("sources")
    named = [s for s in sources if isinstance(s, dict)] if isinstance(sources, list) else []
    chats = [(str(s.get("name", "unnamed")), s.get("train")) for s in named]
    counts = [
        (name, t["chats"], t.get("answer_tokens", 0)) for name, t in chats if isinstance(t, dict) and "chats" in t
    ]
    total = sum(chats for _, chats, _ in counts)
    if not total:
        return ""
    lines = [f"| {escaped(name)} | {n:,} | {n / total:.1%} | {tokens:,} |" for name, n, tokens in counts if n]
    return "\n".join(["", "| data | conversations | share | answer tokens |", "|---|---|---|---|", *lines, ""])
