"""A run's training curves, for the page of `eval --report`."""

import contextlib
import io
from pathlib import Path
from typing import Any

from eagle3_xla.checks import mapping, parse_json
from eagle3_xla.errors import UserError

SIZE = (4.6, 3.2)  # inches: two stand side by side on a page, and letters stay readable where only one has room


def read_metrics(file: Path) -> list[dict]:
    """Rows of metrics.jsonl, without a line that a kill or a full disk cut, or that is being written."""
    rows = []
    for line in file.read_text(errors="replace").splitlines():
        with contextlib.suppress(UserError):
            rows.append(mapping(parse_json(line, str(file)), str(file)))
    return rows


def draw_curves(run: Path) -> list[str]:
    """Two <svg> elements: loss and accuracy, held-out expected tau. run: a training folder with metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(run / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    heldout = [row for row in rows if "heldout_tau" in row]

    training, loss = plt.subplots(figsize=SIZE, layout="constrained")
    loss.plot([row["step"] for row in steps], [row["loss"] for row in steps], color="tab:blue")
    loss.set(title="training loss and accuracy", xlabel="micro-step", ylabel="loss")
    accuracy = loss.twinx()
    for k, color in zip(range(3), ("tab:orange", "tab:green", "tab:red")):
        values = [(row["step"], row["acc"][k]) for row in steps if len(row["acc"]) > k]
        accuracy.plot(*zip(*values), color=color, alpha=0.7, label=f"acc_{k}")
    accuracy.set(ylabel="accuracy on answer tokens", ylim=(0, 1))
    accuracy.legend(loc="upper right")

    growth, tau = plt.subplots(figsize=SIZE, layout="constrained")
    tau.plot([row["step"] for row in heldout], [row["heldout_tau"] for row in heldout], marker="o")
    tau.set(title="held-out expected tau", xlabel="micro-step", ylabel="tau")
    tau.grid(alpha=0.3)
    return [_svg(figure, plt) for figure in (training, growth)]


def _svg(figure: Any, plt: Any) -> str:
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    plt.close(figure)
    return drawn.getvalue()[drawn.getvalue().index("<svg") :]
