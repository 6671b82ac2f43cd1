"""A picture of a run: training curves, and acceptance per draft position from real decoding."""

import json
from pathlib import Path
from typing import TextIO


def read_metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def plot_report(run: Path, heads: dict[str, dict], out: Path | TextIO, form: str = "png") -> None:
    """Write a picture. run: a training folder with metrics.jsonl; heads: label -> what `eval` returned."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(run)
    steps = [row for row in rows if "loss" in row]
    heldout = [row for row in rows if "heldout_tau" in row]
    figure, (loss, tau, acceptance) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")

    loss.plot([row["step"] for row in steps], [row["loss"] for row in steps], color="tab:blue")
    loss.set(title="training loss and accuracy", xlabel="micro-step", ylabel="loss")
    accuracy = loss.twinx()
    for k, color in zip(range(3), ("tab:orange", "tab:green", "tab:red")):
        values = [(row["step"], row["acc"][k]) for row in steps if len(row["acc"]) > k]
        accuracy.plot(*zip(*values), color=color, alpha=0.7, label=f"acc_{k}")
    accuracy.set(ylabel="accuracy on answer tokens", ylim=(0, 1))
    accuracy.legend(loc="upper right")

    tau.plot([row["step"] for row in heldout], [row["heldout_tau"] for row in heldout], marker="o")
    tau.set(title="held-out expected acceptance length", xlabel="micro-step", ylabel="tau")
    tau.grid(alpha=0.3)

    width = 0.8 / max(1, len(heads))
    for i, (label, figures) in enumerate(heads.items()):
        values = figures["acceptance_conditional"]
        at = [k + i * width for k in range(len(values))]
        acceptance.bar(at, values, width, label=f"{label}: tau {figures['tau']:.2f}")
    acceptance.set(title="acceptance per position, if all before were accepted", xlabel="draft position", ylim=(0, 1))
    acceptance.legend()
    figure.savefig(out, dpi=110, format=form)
    plt.close(figure)
