"""One micro-step: target, teacher, TTT unroll, backward, and every `gradient_accumulation` of them AdamW. One graph."""

import torch

from eagle3_xla.config import Recipe
from eagle3_xla.loss.metrics import AcceptanceSums
from eagle3_xla.loss.unroll import UnrollResult, unroll
from eagle3_xla.target.model import TargetStates


class TrainStep:
    """Compiled micro-steps over one head.

    target: the frozen Target on the backend's devices; head: float32 master weights there; d2t [D], t2d [V]: the
    draft vocabulary's maps; optimizer: train.optimizer.AdamW over the head's parameters.
    """

    def __init__(self, recipe: Recipe, backend, target, head, d2t, t2d, optimizer=None):
        self.recipe, self.backend, self.target, self.head = recipe, backend, target, head
        self.d2t, self.t2d = backend.replicate(d2t), backend.replicate(t2d)
        self.optimizer = optimizer
        self.accumulation = recipe.train.gradient_accumulation
        self._parameters = list(head.parameters())
        # Accumulated gradients are buffers that exist before the first micro-step: one graph for all of them.
        if optimizer is not None and self.accumulation > 1:
            for parameter in self._parameters:
                parameter.grad = backend.like(torch.zeros(parameter.shape), parameter)
        self._accumulate = backend.compile(self._accumulate_eager)
        self._update = backend.compile(self._update_eager)
        self._evaluate = backend.compile(self._evaluate_eager)

    @property
    def compile_budget(self) -> int:
        """Graphs that training needs: the update's, and the accumulating one's when there is one."""
        return 1 if self.accumulation == 1 else 2

    def run(self, micro_step: int, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Micro-step number `micro_step` (from 0); every `gradient_accumulation`-th updates the weights.

        Returns the step's metrics, a device vector that `unpack_metrics` reads.
        """
        last = (micro_step + 1) % self.accumulation == 0
        return (self._update if last else self._accumulate)(batch)

    def evaluate(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Metrics of a batch without gradients."""
        return self._evaluate(batch)

    def _unroll(self, batch: dict[str, torch.Tensor]) -> UnrollResult:
        if "aux" in batch:
            states = TargetStates(*(batch[name] for name in TargetStates._fields))
            states = states._replace(argmax=states.argmax.long())
        else:
            states = self.target.states(batch["input_ids"], batch["position_ids"], batch["document_ids"])
        teacher = self.target.teacher(states)
        with self.backend.autocast():
            return unroll(
                self.head,
                self.target.embed_tokens,
                batch,
                states.aux.to(torch.float32),
                teacher,
                self.t2d,
                self.d2t,
                self.recipe.loss,
            )

    def _accumulate_eager(self, batch):
        result = self._unroll(batch)
        (result.loss / self.accumulation).backward()
        return _pack_metrics(result, torch.zeros_like(result.loss))

    def _update_eager(self, batch):
        result = self._unroll(batch)
        (result.loss / self.accumulation).backward()
        norm = self.optimizer.step()
        for parameter in self._parameters:
            if self.accumulation > 1:
                parameter.grad.zero_()
            else:
                parameter.grad = None
        return _pack_metrics(result, norm)

    @torch.no_grad()
    def _evaluate_eager(self, batch):
        result = self._unroll(batch)
        return _pack_metrics(result, torch.zeros_like(result.loss))


def _pack_metrics(result: UnrollResult, gradient_norm: torch.Tensor) -> torch.Tensor:
    """One float32 vector, so that one transfer fetches everything: [2 + 6 K]."""
    head = torch.stack([result.loss.detach(), gradient_norm])
    return torch.cat([head, result.step_losses, *result.sums])


def unpack_metrics(vector: torch.Tensor) -> tuple[float, float, torch.Tensor, AcceptanceSums]:
    """(loss, gradient norm, step losses [K], acceptance sums) on the host."""
    vector = vector.float().cpu()
    columns = vector[2:].view(6, -1)
    return float(vector[0]), float(vector[1]), columns[0], AcceptanceSums(*columns[1:])
