"""Lowering without data: the backend of a run whose parameters, moments and batches are placeholders.

Modules built on the meta device get one placeholder for each tensor, so a 7B step lowers in seconds and a few hundred
MB, through the same code that `train` runs.
"""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch_xla
import torch_xla.core.xla_builder as xla_builder

from eagle3_xla.xla.spmd import SpmdBackend, _annotate

_XLAC = torch_xla._XLAC


class Argument(NamedTuple):
    """name: "" for a constant of the graph; shape: the whole tensor's; bytes: on one device."""

    name: str
    shape: str
    bytes: int


class LoweredStep(NamedTuple):
    """hlo: serialised HloModuleProto; arguments: the module's parameters in order; state: numbers of the arguments
    that the step replaces, which train donates.
    """

    hlo: bytes
    arguments: list[Argument]
    state: list[int]


class AotBackend(SpmdBackend):
    """SpmdBackend whose tensors hold no data. Nothing runs; `lower` gives the graph of a function."""

    runs_here = False  # what the TPU compiler frees, gigabytes, is given back

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        # clone(): a tensor of its own over the placeholder, so that sharding it leaves the placeholder as it is.
        return xla_builder.create_placeholder_tensor(tuple(tensor.shape), tensor.dtype).clone()

    def _mark(self, tensor: torch.Tensor, sharding: Any) -> None:
        _annotate(tensor, sharding)

    def compile(self, function: Callable, state: Iterable[torch.Tensor] = ()) -> Callable:
        return function

    def settle(self) -> None:
        pass

    def lower(self, function: Callable[[dict], list], inputs: dict, state: dict, frozen: dict) -> LoweredStep:
        """Trace `function(inputs)`, which returns a list of tensors, updates the tensors of `state` in place and reads
        those of `frozen`. All three: name -> placeholder, as this backend placed them.
        """
        names = {_placeholders([tensor])[0]: name for name, tensor in {**inputs, **state, **frozen}.items()}
        placed = {name: _argument(name, tensor) for name, tensor in {**inputs, **state, **frozen}.items()}
        outputs = [*function(inputs), *state.values()]
        constant = Argument("", "", 0)
        arguments = [placed.get(names.get(number), constant) for number in _placeholders(outputs)]
        hlo = _XLAC._get_xla_tensors_hlo_proto(outputs)
        return LoweredStep(hlo, arguments, [i for i, argument in enumerate(arguments) if argument.name in state])


def _placeholders(tensors: list[torch.Tensor]) -> list[int]:
    """Ids of the data that the graph of `tensors` reads, in the order of the lowered module's parameters."""
    return _XLAC._get_tensors_xla_device_data_node(tensors)[0]


def _argument(name: str, tensor: torch.Tensor) -> Argument:
    sharding = re.search(r"devices=\[([\d,]+)\]", _XLAC._get_xla_sharding_spec(tensor))
    parts = [int(n) for n in sharding[1].split(",")][: tensor.ndim] if sharding else []
    shape = f"{str(tensor.dtype).removeprefix('torch.')}[{','.join(map(str, tensor.shape))}]"
    return Argument(name, shape, tensor.numel() * tensor.element_size() // math.prod(parts))
