"""The rows that an engine would draft at, brought together: after the causal context nothing else is computed.

TTT steps after the first may be unrolled at some of these alone, the anchors (`loss.anchors`).

A row outside an answer has no loss, and from TTT step 1 on a row sees only its own later keys and step 0's context.
"""

from typing import Any

import torch

from eagle3_xla.target.gather import gather


def shift_left(x: torch.Tensor, by: int) -> torch.Tensor:
    """x[:, t + by] at [:, t], zeros at the right: static shapes at every step."""
    return x if by == 0 else torch.cat([x[:, by:], torch.zeros_like(x[:, :by])], dim=1)


def shift_right(x: torch.Tensor, by: int) -> torch.Tensor:
    """x[:, t - by] at [:, t], zeros at the left."""
    return x if by == 0 else torch.cat([torch.zeros_like(x[:, :by]), x[:, :-by]], dim=1)


class Rows:
    """Between all rows of a batch, [B, T, ...], and the listed ones, [G, R, ...].

    The batch is G groups of B/G sequences, one group a data-parallel replica, or with xla.draft_data_parallel one a
    device. index [G, R]: the listed rows of a group, numbered over its B/G * T rows, ascending where they count; slots
    [G, B/G * T]: where each row is in the list, R when it is not. Without an index every row is listed, R = B/G * T,
    and nothing moves.
    """

    def __init__(self, groups: int, index: torch.Tensor | None = None, slots: torch.Tensor | None = None):
        self.groups = groups
        self.index = None if index is None else index.long()
        self.slots = None if slots is None else slots.long()

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, ...] -> [G, R, ...]."""
        x = x.reshape(self.groups, -1, *x.shape[2:])
        return x if self.index is None else _Take.apply(x, self.index, self.slots)

    def at(self, anchors: "Rows") -> "Rows":
        """The rows that `anchors` list among these; anchors.index [G, N], anchors.slots [G, R]."""
        if self.index is None or self.slots is None:
            return anchors
        assert anchors.index is not None and anchors.slots is not None
        listed = self.slots < anchors.slots.shape[1]
        slots = gather(anchors.slots, self.slots.clamp(max=anchors.slots.shape[1] - 1))
        slots = torch.where(listed, slots, anchors.index.shape[1])
        return Rows(self.groups, gather(self.index, anchors.index), slots)

    def put(self, y: torch.Tensor, batch: int) -> torch.Tensor:
        """[G, R, ...] -> [batch, T, ...], zeros in the rows that are not listed."""
        y = y if self.index is None else _Put.apply(y, self.index, self.slots)
        return y.reshape(batch, -1, *y.shape[2:])


# Each is the other's gradient, and both only gather: a scatter is slow on TPUs and on XLA's CPU.
class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, index: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index, slots)
        return gather(x, index)

    @staticmethod
    def backward(ctx: Any, d_y: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        index, slots = ctx.saved_tensors
        return _gather_or_zero(d_y, slots), None, None


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, index: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index, slots)
        return _gather_or_zero(y, slots)

    @staticmethod
    def backward(ctx: Any, d_x: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        index, slots = ctx.saved_tensors
        return gather(d_x, index), None, None


def _gather_or_zero(y: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    listed = slots < y.shape[1]
    x = gather(y, slots.clamp(max=y.shape[1] - 1))
    return torch.where(
        listed.view(*listed.shape, *(1,) * (x.ndim - 2)), x, torch.zeros((), dtype=x.dtype, device=x.device)
    )
