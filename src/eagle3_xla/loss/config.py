"""The settings of the loss."""

import re
from dataclasses import dataclass

from eagle3_xla.errors import UserError
from eagle3_xla.settings import setting

OBJECTIVES = ("kl", "reverse_kl", "tv", "lk_alpha", "lk_lambda")


@dataclass
class LossConfig:
    # steps of the unroll: as many drafts as the head learns to write on its own states
    ttt_length: int = setting(7, within="[1, 64]")
    # share of the training over which that length grows from 1, each one as long; every length is a graph of its own
    ttt_warmup: float = setting(0.0, within="[0, 1)")
    decay: float = setting(0.8, within="(0, 1]")  # step k weighs decay**k
    objective: str = "kl"  # kl | reverse_kl | tv | lk_alpha | lk_lambda, or a weighted sum: "kl + 0.5*tv"
    # serving: the rows an engine drafts at | specforge: row t counts by the mask of token t
    rows: str = setting("serving", among=("serving", "specforge"))
    # share of a step's rows at which TTT steps after the first are unrolled, drawn anew each step; 1: all of them
    anchors: float = setting(1.0, within="(0, 1]")
    # rows: rows that count | sequences: conversations, each the mean of its own | all: all B*T rows, as SpecForge
    mean_over: str = setting("rows", among=("rows", "sequences", "all"))

    def ttt_length_at(self, update: int, updates: int) -> int:
        """Steps of the unroll in update number `update` (from 0) of a run of `updates`."""
        growing = self.ttt_warmup * updates
        return self.ttt_length if update >= growing else 1 + int(update * (self.ttt_length - 1) / growing)

    def check(self) -> None:
        """Raises UserError for an objective that is none, and for settings that don't go together."""
        objective_terms(self.objective)
        if self.anchors < 1 and (self.rows != "serving" or self.mean_over == "all"):
            raise UserError("setting loss.anchors is below 1: not for loss.rows=specforge or loss.mean_over=all")


def objective_terms(text: str) -> dict[str, float]:
    """Name -> weight of the objectives that "kl" or "kl + 0.5*tv" adds up. Raises UserError."""
    terms: dict[str, float] = {}
    for term in text.split("+"):
        match = re.fullmatch(r"\s*(?:(\d+\.?\d*|\.\d+)\s*\*\s*)?(\w+)\s*", term, re.ASCII)
        weight, name = (float(match[1] or 1), match[2]) if match else (0.0, "")
        if name not in OBJECTIVES or name in terms or not 0 < weight < 1e6:
            raise UserError(
                f"setting loss.objective is {text!r}; choose one of {', '.join(OBJECTIVES)}, or a sum of them, each "
                "once, with weights above 0, such as kl + 0.5*tv"
            )
        terms[name] = weight
    return terms
