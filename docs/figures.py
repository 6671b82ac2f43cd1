"""Draws the documentation's figures: python docs/figures.py [FOLDER]

python docs/figures.py --quickstart FOLDER draws docs/quickstart.svg: what a quickstart in FOLDER ended with.
"""

import io
import json
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BLUE, GREEN, RED, GREY, LIGHT = "#3f6fb5", "#3a9a5b", "#c0504d", "#8a8f98", "#e8ebf0"
# Conditional acceptance of docs/quickstart.svg's head; and the kind that training on a TPU slice is for.
SMALL, STRONG = (0.410, 0.396, 0.306, 0.273, 0.000), (0.75, 0.74, 0.73, 0.72, 0.71)


def box(axes, x: float, y: float, text: str, color: str, width: float = 0.9, white: bool = True) -> None:
    axes.add_patch(plt.Rectangle((x - width / 2, y - 0.3), width, 0.6, facecolor=color, edgecolor="none"))
    axes.text(x, y, text, ha="center", va="center", color="white" if white else "black", fontsize=10)


def arrow(axes, start: tuple, end: tuple, color: str = GREY) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.2})


def canvas(width: float, height: float):
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.axis("off")
    return figure, axes


def round_of_drafts():
    figure, axes = canvas(9, 3.4)
    drafts = ["the", "capital", "city", "of", "Spain"]
    for k, word in enumerate(drafts):
        box(axes, 2.4 + k, 3, word, BLUE)
        arrow(axes, (2.4 + k, 2.65), (2.4 + k, 2.2))
    for k in range(4):
        arrow(axes, (2.87 + k, 3), (2.95 + k, 3))
    axes.add_patch(plt.Rectangle((1.8, 1.55), 5.2, 0.6, facecolor=LIGHT, edgecolor=GREY))
    axes.text(4.4, 1.85, "target: one call checks all five", ha="center", va="center")
    verdicts = [("the", GREEN), ("capital", GREEN), ("city", GREEN), ("of", GREEN), ("France", RED)]
    for k, (word, color) in enumerate(verdicts):
        arrow(axes, (2.4 + k, 1.5), (2.4 + k, 1.05))
        box(axes, 2.4 + k, 0.7, word, color)
    axes.text(1.7, 3, "head drafts", ha="right", va="center")
    axes.text(1.7, 0.7, "kept", ha="right", va="center")
    axes.text(7.2, 0.7, "the target's own word\nin place of the wrong draft", ha="left", va="center", fontsize=9)
    axes.text(7.2, 3, "one small layer,\nfive cheap steps", ha="left", va="center", fontsize=9)
    axes.set(xlim=(0.3, 9.6), ylim=(0.2, 3.5))
    return figure


def unroll():
    figure, panels = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
    rows = 6
    for step, axes in enumerate(panels):
        for row in range(rows):
            for key in range(rows):
                seen = key <= row
                axes.add_patch(plt.Rectangle((key, rows - 1 - row), 0.9, 0.9, facecolor=BLUE if seen else LIGHT))
            for k in range(step):
                for key in range(rows):
                    color = (GREEN, RED)[k] if key == row else LIGHT
                    axes.add_patch(
                        plt.Rectangle(((k + 1) * (rows + 0.6) + key, rows - 1 - row), 0.9, 0.9, facecolor=color)
                    )
        axes.set(xlim=(-0.2, 20), ylim=(-0.2, rows + 0.2), aspect="equal")
        axes.set_title(f"step {step}: predicts token t+{2 + step}", fontsize=10)
        axes.axis("off")
    figure.supxlabel("keys: step 0 (blue, causal), step 1 (green) and step 2 (red) at the own row only", fontsize=9)
    return figure


def vocabulary():
    figure, axes = canvas(9, 2.6)
    targets, kept = 12, [0, 2, 3, 5, 9]
    for i in range(targets):
        box(axes, i, 2, str(i), GREEN if i in kept else LIGHT, white=i in kept)
    for i, target in enumerate(kept):
        box(axes, i + 3.5, 0.6, str(i), BLUE)
        arrow(axes, (i + 3.5, 0.95), (target, 1.65))
        axes.text(i + 3.5, 0.1, f"d2t {target - i:+d}".replace("+0", "0"), ha="center", va="center", fontsize=9)
    axes.text(-0.8, 2, "target ids", ha="right", va="center")
    axes.text(-0.8, 0.6, "draft ids", ha="right", va="center")
    axes.set(xlim=(-2.6, 12), ylim=(-0.2, 2.5))
    return figure


def acceptance():
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for label, color, shares in (("quickstart head", BLUE, SMALL), ("75% a position", GREEN, STRONG)):
        plain, reached = [], 1.0
        for share in shares:
            reached *= share
            plain.append(reached)
        tau = 1 + sum(plain)
        left.plot(range(5), shares, marker="o", color=color, linestyle="--", alpha=0.6)
        left.plot(range(5), plain, marker="o", color=color, label=f"{label}: tau {tau:.2f}")
    left.set(title="acceptance (line), conditional (dashed)", xlabel="draft position", ylim=(0, 1))
    left.legend(fontsize=9)
    shares = [i / 100 for i in range(0, 100)]
    for drafts in (1, 3, 5, 8):
        taus = [sum(share**k for k in range(drafts + 1)) for share in shares]
        right.plot(shares, taus, label=f"{drafts} drafts")
    right.set(title="tau at an even conditional acceptance", xlabel="conditional acceptance", ylabel="tau", ylim=(1, 7))
    right.grid(alpha=0.3)
    right.legend(fontsize=9)
    return figure


FIGURES = {"round": round_of_drafts, "ttt": unroll, "d2t": vocabulary, "acceptance": acceptance}


def draw(folder: Path) -> None:
    plt.rcParams |= {"svg.hashsalt": "eagle3-xla", "svg.fonttype": "none", "font.size": 10}
    folder.mkdir(exist_ok=True)
    for name, figure in FIGURES.items():
        drawn = figure()
        drawn.savefig(folder / f"{name}.svg", metadata={"Date": None})
        plt.close(drawn)


def draw_quickstart(folder: Path, picture: Path) -> None:
    """The last screen of a quickstart, from its result.json and run.yaml, as a terminal shows it."""
    from rich.console import Console
    from rich.text import Text

    from eagle3_xla.config import load_recipe
    from eagle3_xla.quickstart import GREEN, PLAIN, last_screen

    result = json.loads((folder / "result.json").read_text())
    screen = last_screen(result, load_recipe(str(folder / "run.yaml"), []), (GREEN, PLAIN))
    console = Console(record=True, width=118, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(screen.strip("\n")))
    drawn = console.export_svg(title="eagle3-xla quickstart")
    picture.write_text(
        re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)
    )  # a reader's browser fetches nothing


if __name__ == "__main__":
    if sys.argv[1:2] == ["--quickstart"]:
        draw_quickstart(Path(sys.argv[2]), Path(__file__).parent / "quickstart.svg")
    else:
        draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "figures")
