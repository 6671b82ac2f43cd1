"""Weights of linear layers in oneDNN's own order, for decoding on a CPU.

A call with a few drafted tokens is a product of a few rows. With MKL, which torch takes for float32, 2 to 8 rows take
twice the time of one; with the weights packed hardly more than one does (benchmarks/README.md).
"""

from functools import partial

import torch
from torch import nn

# Of these a head multiplies with slices of the weight (draft/model.py) and never calls the layer.
SLICED = ("q_proj", "k_proj", "v_proj")


def pack(model: nn.Module, *heads: nn.Module) -> None:
    """Pack the linear layers of a target and of heads in place where they are float32 on a CPU; again is nothing.

    The unpacked weights of the target's layers are let go: memory stays what it was, but for its lm_head and the heads.
    """
    if not torch.backends.mkldnn.is_available():
        return
    of_heads = [module for head in heads for name, module in head.named_modules() if not name.endswith(SLICED)]
    kept = {model.get_output_embeddings(), *of_heads}
    for module in [*model.modules(), *of_heads]:
        if type(module) is not nn.Linear or "forward" in vars(module):
            continue
        weight = module.weight.detach()
        if weight.dtype is torch.float32 and weight.device.type == "cpu":
            module.forward = partial(_linear, torch.ops.mkldnn._reorder_linear_weight(weight, None), module.bias)
            if module not in kept:
                module.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)


def _linear(packed: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
