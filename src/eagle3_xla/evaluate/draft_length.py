"""`--draft-tokens auto`: the chain that gives the most tokens per second on this machine.

A target call that checks more drafts costs more, by steps that belong to the machine (benchmarks/README.md), and a
draft step costs what it costs; deeper drafts are accepted less often. All of it is measured while the first prompts are
decoded with every length in turns.
"""

import sys
import time
from collections.abc import Sequence
from itertools import cycle, islice
from statistics import median

import torch

from eagle3_xla.draft.model import Eagle3Head
from eagle3_xla.evaluate.decode import Choice, SpeculativeDecoder
from eagle3_xla.target.model import Target

LONGEST = 8
LEAST_ANSWERS, MOST_TOKENS = 4, 64  # to the first prompts, in tokens of each: some rounds of each length


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

        Only rounds with every slot taken are timed. So there are twice as many answers as slots, the first prompts
        again where they are too few: the slot of a short answer is taken again. Says on stderr what stays unmeasured.
        """
        self.rounds: list[tuple[int, float, list[int]]] = []
        texts = self.slots = min(self.slots, len(prompts))
        asked = islice(cycle(zip(prompts, choices)), max(2 * texts, LEAST_ANSWERS))
        some, of_them = zip(*asked)
        self.decode_all(some, min(max_new_tokens, MOST_TOKENS), stop_ids, of_them)
        rows, share, tokens = [], 1.0, 1.0
        for length in range(1, self.longest + 1):
            seconds = [s for n, s, accepted in self.rounds if n == length and len(accepted) == texts]
            if not seconds:
                print(
                    f"--draft-tokens auto: the answers are too short to time chains of {length} or more drafts",
                    file=sys.stderr,
                )
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
