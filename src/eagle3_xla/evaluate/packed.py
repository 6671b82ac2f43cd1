"""Weights of linear layers in oneDNN's own order, for decoding on a CPU.

A call with a few drafted tokens is a product of a few rows. With MKL, which torch takes for float32, 2 to 8 rows take
twice the time of one; with the weights packed hardly more than one does (benchmarks/README.md).
"""

from functools import partial

import torch
from torch import nn


def pack(model: nn.Module, head: nn.Module) -> None:
    """Pack the target's and the head's linear layers in place where they are float32 on a CPU; again is nothing.

    The unpacked weights of the target's layers are let go: memory stays what it was, but for its lm_head and the head.
    """
    if not torch.backends.mkldnn.is_available():
        return
    lm_head = model.get_output_embeddings()
    for module in [*model.modules(), *head.modules()]:
        if type(module) is nn.Linear and module.weight.dtype is torch.float32 and module.weight.device.type == "cpu":
            if "forward" in vars(module):
                continue
            packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), None)
            module.forward = partial(_linear, packed, module.bias)
    for module in model.modules():
        if module is not lm_head and "forward" in vars(module) and isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.new_empty(0), requires_grad=False)


def _linear(packed: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
