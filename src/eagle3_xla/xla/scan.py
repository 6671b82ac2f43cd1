"""What mixture-of-experts layers (target/experts.py) need of XLA: a loop compiled once, and gathers that stay local."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch_xla
from torch_xla.distributed.spmd.xla_sharding import ShardingType
from torch_xla.experimental.scan import _scan_impl_pytree

from eagle3_xla.target.experts import take_rows

_XLAC = torch_xla._XLAC


def scanned(function: Callable, weights: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """function(weights, block of each of `blocks`) for all blocks [n, ..], stacked. Without gradient.

    The public `scan` traces a backward pass too, and the frozen target needs none. Weights that go round unchanged are
    no copies: XLA sees that the loop leaves them alone.
    """
    _, outputs = _scan_impl_pytree(lambda carry, block: (carry, function(carry, *block)), weights, blocks)
    return outputs


def local_take_rows(mesh: Any) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """experts.take_rows over a (dp, tp) mesh: each device takes its own groups' rows of its own part.

    The partitioner does not see that the rows of a group lie on one device, and moves all of them over the mesh.
    """

    def local(tensor: torch.Tensor, spec: tuple[str | None, ...]) -> torch.Tensor:
        tensor = tensor.clone()
        _XLAC._xla_mark_sharding(tensor, mesh.get_op_sharding(spec))
        return _XLAC._spmd_full_to_shard_shape(tensor)

    def take(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        spec = ("tp" if rows.shape[0] > 1 else None, "dp", None, None)
        taken = take_rows(local(rows, spec), local(index, ("dp", None)))
        _XLAC._mark_manual_sharding(taken, _XLAC.OpSharding([], [], [], ShardingType.MANUAL))
        whole = [*rows.shape[:2], index.shape[1], rows.shape[3]]
        return _XLAC._spmd_shard_to_full_shape(taken, mesh.get_op_sharding(spec), whole, taken.dtype)

    return take
