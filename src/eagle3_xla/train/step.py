"""One micro-step: target, teacher, TTT unroll, backward, and every `gradient_accumulation` of them an update."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import torch
from torch.func import functional_call

from eagle3_xla.config import Recipe
from eagle3_xla.draft.model import Eagle3Head
from eagle3_xla.loss.metrics import AcceptanceSums
from eagle3_xla.loss.unroll import UnrollResult, teacher_positions, unroll
from eagle3_xla.target.model import Target
from eagle3_xla.target.order import recomputed
from eagle3_xla.train.optimizer import Optimizer
from eagle3_xla.xla.backend import Backend


class _WithHead(torch.nn.Module):
    """Calls a function that uses the head, so that functional_call can put other weights into it meanwhile."""

    def __init__(self, head: Eagle3Head):
        super().__init__()
        self.head = head

    def forward(self, function: Callable, *arguments: Any) -> Any:
        return function(*arguments)


def step_names(recipe: Recipe, updates: int) -> dict[int, str]:
    """TTT length -> name of its micro-steps' graph, of a run of so many updates."""
    lengths = sorted({recipe.loss.ttt_length_at(update, updates) for update in range(updates)})
    what = "step" if recipe.train.gradient_accumulation == 1 else "gradients"
    return {length: what if len(lengths) == 1 else f"{what}, TTT {length}" for length in lengths}


def _directly(name: str, function: Callable, *batch: dict[str, torch.Tensor]) -> Any:
    return function(*batch)


class TrainStep:
    """Compiled micro-steps over one head.

    target: the frozen Target on the backend's devices; head: float32 master weights there; d2t [D], t2d [V]: the
    draft vocabulary's maps; optimizer: train.optimizer.Optimizer over the head's parameters.
    """

    def __init__(
        self,
        recipe: Recipe,
        backend: Backend,
        target: Target,
        head: Eagle3Head,
        d2t: torch.Tensor,
        t2d: torch.Tensor,
        optimizer: Optimizer,
    ):
        self.recipe, self.backend, self.target, self.head = recipe, backend, target, head
        self.d2t, self.t2d = backend.replicate(d2t), backend.replicate(t2d)
        self.optimizer = optimizer
        self.accumulation = recipe.train.gradient_accumulation
        self._with_head = _WithHead(head)
        self._parameters = list(head.parameters())
        # One graph a micro-step when each one updates; else the gradients' (added to buffers that exist before the
        # first micro-step) and the small one of the optimizer, so that target and unroll are compiled once.
        # And one for each TTT length (`loss.ttt_warmup`).
        self.updates = optimizer.total_steps
        self.names = step_names(recipe, self.updates)
        state = [*self._parameters, *optimizer.changing()]
        self._evaluate = backend.compile(self._evaluate_eager, self._parameters)
        if self.accumulation == 1:
            self._steps = self._of_each_length(self._gradients_and_update_eager, state)
            return
        for parameter in self._parameters:
            parameter.grad = backend.like(torch.zeros(parameter.shape), parameter)
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        self._steps = self._of_each_length(self._gradients_eager, [*self._parameters, *gradients])
        self._update = backend.compile(self._update_eager, [*state, *gradients])

    def run(
        self, micro_step: int, batch: dict[str, torch.Tensor], call: Callable[..., Any] = _directly
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Micro-step number `micro_step` (from 0); every `gradient_accumulation`-th updates the weights.

        call(name, function, *batch) runs one of the graphs of train/budget.py (CompileBudget.run). Returns the step's
        metrics, a device vector that `unpack_metrics` reads, and at an update the norm of the gradients.
        """
        length = self.length(micro_step)
        name = self.names[length]
        if self.accumulation == 1:
            return call(name, self._steps[length], batch)
        metrics = call(name, self._steps[length], batch)
        updates = (micro_step + 1) % self.accumulation == 0
        return metrics, call("update", self._update) if updates else None

    def length(self, micro_step: int) -> int:
        """TTT length of micro-step number `micro_step`."""
        return self.recipe.loss.ttt_length_at(micro_step // self.accumulation, self.updates)

    def _of_each_length(self, function: Callable, state: list[torch.Tensor]) -> dict[int, Callable]:
        """TTT length -> function(length, batch), compiled."""

        def of(length: int) -> Callable:
            @wraps(function)
            def step(batch: dict[str, torch.Tensor]) -> Any:
                return function(length, batch)

            return self.backend.compile(step, state)

        return {length: of(length) for length in self.names}

    def evaluate(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Metrics of a batch without gradients; the chain's are of the rows at which decoding would draft."""
        return self._evaluate(batch)

    def _unroll(
        self,
        length: int,
        batch: dict[str, torch.Tensor],
        weights: dict[str, torch.Tensor],
        decoding: bool = False,
    ) -> UnrollResult:
        """weights: what the head computes with, by parameter name; decoding: as loss/unroll.py has it."""
        backend, groups = self.backend, self.backend.draft_groups
        if "aux" not in batch:
            aux, hidden = self.target.hidden_states(batch["input_ids"], batch["position_ids"], batch["document_ids"])
            batch = batch | {"aux": aux, "hidden": hidden}
        batch = {name: backend.draft_layout(x) for name, x in batch.items()}
        aux, hidden = batch["aux"], teacher_positions(batch, batch["hidden"], groups)
        if "argmax" in batch:
            known = (batch["argmax"].long(), batch["logsumexp"])
            argmax, logsumexp = (teacher_positions(batch, x, groups) for x in known)
        else:
            known = self.target.full_vocabulary(backend.target_layout(hidden))
            argmax, logsumexp = (backend.draft_layout(x) for x in known)
        teacher = self.target.teacher(hidden, argmax, logsumexp)

        def with_weights(function: Callable, *arguments: Any) -> Any:
            named = {f"head.{name}": weight for name, weight in weights.items()}
            with backend.autocast():
                return functional_call(self._with_head, named, (function, *arguments))

        # With the same weights when the backward pass calls it again.
        def remat(function: Callable, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return recomputed(partial(with_weights, function), *tensors)

        rows = "serving" if decoding else self.recipe.loss.rows
        loss = replace(self.recipe.loss, ttt_length=length, rows=rows)
        arguments = (self.target.embed_tokens, batch, aux.float(), teacher, self.t2d, self.d2t, loss)
        return with_weights(unroll, self.head, *arguments, remat if self.recipe.xla.remat else None, groups, decoding)

    def _backward(self, length: int, batch: dict[str, torch.Tensor]) -> UnrollResult:
        """Add the gradients of `batch`'s loss to the parameters'."""
        weights = self.backend.working_weights(self.head)
        result = self._unroll(length, batch, weights)
        (result.loss / self.accumulation).backward()
        for name, parameter in self.head.named_parameters():
            if weights[name] is not parameter:
                gradient = self.backend.reduced(weights[name].grad, parameter)
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return result

    def _gradients_eager(self, length: int, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self._pack_metrics(self._backward(length, batch))

    def _update_eager(self) -> torch.Tensor:
        norm = self.optimizer.step()
        for parameter in self._parameters:
            parameter.grad.zero_()
        return norm

    def _gradients_and_update_eager(
        self, length: int, batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        result = self._backward(length, batch)
        norm = self.optimizer.step()
        for parameter in self._parameters:
            parameter.grad = None
        return self._pack_metrics(result), norm

    @torch.no_grad()
    def _evaluate_eager(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        weights = self.backend.working_weights(self.head)
        result = self._unroll(self.recipe.loss.ttt_length, batch, weights, decoding=True)
        return self._pack_metrics(result)

    def _pack_metrics(self, result: UnrollResult) -> torch.Tensor:
        """One float32 vector, so that one transfer fetches everything: [1 + 4 K]; steps not unrolled have zeros."""
        sums: Sequence[torch.Tensor] = result.sums
        if missing := self.recipe.loss.ttt_length - len(result.step_losses):
            sums = [torch.nn.functional.pad(column, (0, missing)) for column in sums]
        return torch.cat([result.loss.detach().reshape(1), *sums])


def unpack_metrics(vector: torch.Tensor) -> tuple[float, AcceptanceSums]:
    """(loss, acceptance sums) on the host."""
    vector = vector.float().cpu()
    return float(vector[0]), AcceptanceSums(*vector[1:].view(4, -1))
