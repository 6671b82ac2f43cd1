"""The compile budget: how many graphs a run needs is known beforehand, and any further one stops it with the reason."""

from collections.abc import Callable
from typing import Any

import torch

from eagle3_xla.config import Recipe
from eagle3_xla.errors import RunError
from eagle3_xla.train.step import step_names
from eagle3_xla.xla.backend import Backend


def planned_graphs(recipe: Recipe, updates: int, row_lengths: int, heldout_lengths: int) -> dict[str, int]:
    """Function -> shapes of its batches, of a run of so many updates; row_lengths, heldout_lengths: how many lengths
    the rows of its batches have."""
    planned = dict.fromkeys(step_names(recipe, updates).values(), row_lengths)
    planned |= {"update": 1} if recipe.train.gradient_accumulation > 1 else {}
    return planned | {"evaluation": heldout_lengths}


class CompileBudget:
    """Counts the compilations of a run's functions; each is compiled once for each shape of batch.

    planned: as `planned_graphs` gives it; with `allow` a further compilation is told to `say` instead of raised.
    """

    def __init__(self, backend: Backend, planned: dict[str, int], say: Callable[[str], None], allow: bool = False):
        self.backend, self.planned, self.say, self.allow = backend, planned, say, allow
        self.made = 0
        self._seen: dict[str, list[dict[str, str]]] = {name: [] for name in planned}

    def run(self, name: str, function: Callable, *batch: dict[str, torch.Tensor]) -> Any:
        """function(*batch). Raises RunError when that compiled more than is planned."""
        before = self.backend.compilations()
        result = function(*batch)
        made = self.backend.compilations() - before
        self.made += made
        if not made:
            return result
        inputs = {key: f"{str(x.dtype)[6:]}{list(x.shape)}" for part in batch for key, x in part.items()}
        seen = self._seen[name]
        reason = None
        if inputs in seen:
            reason = (
                "its inputs have the shapes and dtypes that they had before, so a Python number that changes is part "
                "of the graph (a learning rate, a step count); keep it in a tensor on the device"
            )
        elif len(seen) == self.planned[name]:
            was = seen[-1]
            changed = [
                f"{key} is {inputs.get(key)}, was {was.get(key)}"
                for key in was | inputs
                if inputs.get(key) != was.get(key)
            ]
            reason = f"{', '.join(changed)}; every batch needs one of the planned shapes and dtypes"
        elif made > 1:
            reason = "operations outside it were pending when it began"
        if inputs not in seen:
            seen.append(inputs)
        if reason:
            message = f"`{name}` was compiled beyond its budget ({self.planned[name]}): {reason}"
            if not self.allow:
                raise RunError(f"{message}. --allow-recompile lets the run go on")
            self.say(message)
        return result
