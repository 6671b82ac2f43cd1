"""Saying to a compiler in which order things are computed: it only sees what depends on what.

XLA's schedule on the CPU keeps large tensors of independent parts alive together, and finds again in the forward pass
what a backward pass was to compute anew. An optimization barrier changes neither: its CPU compiler drops them first.
"""

from collections.abc import Callable
from typing import Any

import torch


def after(x: torch.Tensor, *before: torch.Tensor) -> torch.Tensor:
    """x, unchanged, but computed from `before` too (finite, each broadcasts against x): 0 * y is not 0 for every y."""
    for y in before:
        x = x + 0 * y.to(x.dtype)
    return x


def recomputed(function: Callable[..., tuple[torch.Tensor, ...]], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """function(*tensors) -> tensors, of which nothing is kept for the backward pass: it is computed again there.

    The inputs that have the shape of the first result wait for its gradient, so that the second computation is
    another one than the first.
    """
    return _Recomputed.apply(function, *tensors)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.function = function
        ctx.save_for_backward(*tensors)
        return function(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        leaves = [x.detach().requires_grad_(need) for x, need in zip(ctx.saved_tensors, ctx.needs_input_grad[1:])]
        first = gradients[0]
        with torch.enable_grad():
            results = ctx.function(*(after(x, first) if x.shape == first.shape else x for x in leaves))
        torch.autograd.backward(results, gradients)
        return None, *(leaf.grad for leaf in leaves)
