"""`--draft-tokens auto`: the chain that gives the most tokens per second on this machine.

A target call that checks more drafts costs more, by steps that belong to the machine (benchmarks/README.md), and a
draft step costs what it costs; deeper drafts are accepted less often. All of it is measured while the first prompts are
decoded with every length in turns.
"""

import time
from collections.abc import Sequence
from statistics import median

import torch

from eagle3_xla.draft.model import Eagle3Head
from eagle3_xla.evaluate.decode import Choice, SpeculativeDecoder
from eagle3_xla.target.model import Target

LONGEST = 8
LEAST_PROMPTS, MOST_TOKENS = 4, 64  # of the first prompts, in tokens of an answer: some rounds of each length


class MeasuringDecoder(SpeculativeDecoder):
    """A chain whose every round has the next length, 1 to `longest` and again: to LONGEST, or what the head sees."""

    def __init__(self, target: Target, head: Eagle3Head, d2t: torch.Tensor, slots: int = 1):
        self.longest = min(LONGEST, head.window or LONGEST)
        super().__init__(target, head, d2t, self.longest, slots=slots)

    def _round(self, running: list) -> None:
        self.draft_tokens = self.steps = self.draft_tokens % self.longest + 1
        started = time.perf_counter()
        super()._round(running)
        seconds = time.perf_counter() - started
        accepted = [text.generation.accepted[-1] for text in running]
        self.rounds.append((self.draft_tokens, seconds, accepted))

    def lengths(
        self, prompts: Sequence[list[int]], max_new_tokens: int, stop_ids: set[int], choices: Sequence[Choice]
    ) -> tuple[int, list[dict[str, float]]]:
        """(the best length, of each length from 1 on its figures): tokens_per_second expected of it, seconds of a round
        of as many texts as there are at most, acceptance of its deepest draft if all before were accepted.
        """
        self.rounds: list[tuple[int, float, list[int]]] = []
        few = max(self.slots, LEAST_PROMPTS)
        self.decode_all(prompts[:few], min(max_new_tokens, MOST_TOKENS), stop_ids, choices[:few])
        texts = max((len(accepted) for _, _, accepted in self.rounds), default=0)
        rows, share, tokens = [], 1.0, 1.0
        for length in range(1, self.longest + 1):
            seconds = [s for n, s, accepted in self.rounds if n == length and len(accepted) == texts]
            if not seconds:  # the answers are too short for more
                break
            tried = [a for n, _, accepted in self.rounds if n >= length for a in accepted if a >= length - 1]
            conditional = sum(a >= length for a in tried) / len(tried) if tried else 0.0
            share *= conditional
            tokens += share
            rows.append({
                "tokens_per_second": texts * tokens / median(seconds),
                "seconds": median(seconds),
                "acceptance_conditional": conditional,
            })  # fmt: skip
        speeds = [row["tokens_per_second"] for row in rows]
        return (speeds.index(max(speeds)) + 1 if speeds else 1), rows
