"""target/gather.py's operator for XLA: the rows of a group lie on one device, and the partitioner has to see that.

It does where the first coordinate of every place is an iota over the groups. torch_xla's own `x[group, index]` hides
that behind what wraps negative indices: the partitioner then masks on every device and reduces the whole result over
the mesh, [16, 3072, 3584] in float32 at each TTT step of `qwen2.5-7b-v4-32-fast`.
"""

from typing import Any

import torch
from torch_xla.core import xla_builder, xla_op_registry


def _lowered(x: Any, index: Any) -> Any:
    """x [G, R, ...], index [G, N] int32."""
    (groups, count), (_, _, *row) = index.shape().sizes, x.shape().sizes
    column = xla_builder.mkshape(xla_builder.Type.S32, [groups, count, 1])
    group = xla_builder.Op.iota(index.builder(), column, iota_dimension=0)
    places = xla_builder.Op.concat_in_dim([group, index.reshape([groups, count, 1])], 2)
    return xla_builder.mkop(
        "Gather",
        (x.op, places.op),
        slice_sizes=[1, 1, *row],
        offset_dims=list(range(2, 2 + len(row))),
        collapsed_slice_dims=[0, 1],
        start_index_map=[0, 1],
        index_vector_dim=2,
    )


_gather = xla_op_registry.register("eagle3_gather", _lowered)


def local_gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x [G, R, ...], index [G, N] -> [G, N, ...], each group on its device."""
    return _gather(x, index.int())
