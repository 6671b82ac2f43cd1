"""Of each group the rows that its index names: one operator, so that every backend has its own form of it.

A group's rows lie on one device, which XLA's partitioner sees in the form that xla/gather.py gives it.
"""

import torch


def gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x [G, R, ...], index [G, N] -> [G, N, ...]. Without gradient."""
    gathered: torch.Tensor = torch.ops.eagle3_xla.gather(x, index)
    return gathered


torch.library.define("eagle3_xla::gather", "(Tensor x, Tensor index) -> Tensor")  # xla/spmd.py gives it XLA's


@torch.library.impl("eagle3_xla::gather", "CompositeExplicitAutograd")
def _gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    group = torch.arange(x.shape[0], device=x.device)[:, None]
    return x[group, index]
