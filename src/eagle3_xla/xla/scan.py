"""A loop that XLA compiles once, for target/experts.py."""

from collections.abc import Callable, Sequence

import torch
from torch_xla.experimental.scan import _scan_impl_pytree


def scanned(function: Callable, weights: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """function(weights, block of each of `blocks`) for all blocks [n, ..], stacked. Without gradient.

    The public `scan` traces a backward pass too, and the frozen target needs none. Weights that go round unchanged are
    no copies: XLA sees that the loop leaves them alone.
    """
    _, outputs = _scan_impl_pytree(lambda carry, block: (carry, function(carry, *block)), weights, blocks)
    return outputs
