"""How `eval` decodes."""

from dataclasses import dataclass

import torch

from eagle3_xla.errors import UserError


@dataclass(kw_only=True)
class EvalOptions:
    """limit: first prompts of the file, 0 for all; turns: of the user, asked one after the other's answer, 0 for
    all; thinking: "on" or "off" for the chat template, "" for its own default; draft_tokens, topk, steps: the shape of
    the drafts (decode.py), draft_tokens 0: the length of a chain that pays (draft_length.py), steps 0: as deep as
    draft_tokens allow, at most 5 in a tree; draft_window: positions that the head sees, its own included, 0: as its
    config.json says; batch_size: prompts decoded at once; temperature 0:
    greedy; device: cpu or cuda; baseline: decode without the head too, for its speed and for `identical`; force: a head
    that `doctor` fails, too.
    """

    limit: int = 0
    turns: int = 1
    thinking: str = ""
    max_new_tokens: int = 128
    draft_tokens: int = 5
    topk: int = 1
    steps: int = 0
    draft_window: int = 0
    batch_size: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    baseline: bool = True
    force: bool = False

    def __post_init__(self) -> None:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch finds no GPU here")
        if not self.draft_tokens:
            if self.topk > 1 or self.steps:
                raise UserError("--draft-tokens auto finds the length of a chain: without --topk and --steps")
            return
        self.steps = self.steps or (self.draft_tokens if self.topk == 1 else min(5, self.draft_tokens))
        if self.topk == 1 and self.steps != self.draft_tokens:
            raise UserError(f"a chain of {self.draft_tokens} drafts takes as many steps, not --steps {self.steps}")
        if not 1 <= self.steps <= self.draft_tokens:
            raise UserError(f"--steps {self.steps}: choose 1 to --draft-tokens ({self.draft_tokens})")
        most = self.topk + (self.steps - 1) * self.topk**2
        if self.topk > 1 and self.draft_tokens > most:
            raise UserError(
                f"--draft-tokens {self.draft_tokens}: a tree of --topk {self.topk} and --steps {self.steps} has at "
                f"most {most} drafts"
            )


def sampling_in_words(temperature: float, top_p: float) -> str:
    if not temperature:
        return "greedy"
    return f"temperature {temperature:g}" + (f", top_p {top_p:g}" if top_p < 1 else "")
