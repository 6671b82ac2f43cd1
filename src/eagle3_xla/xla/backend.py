"""The backend that a recipe names: spmd.py, or plain.py, which has the same methods without torch_xla."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from eagle3_xla.draft.model import Eagle3Head
from eagle3_xla.errors import UserError
from eagle3_xla.target.model import Target
from eagle3_xla.xla.config import XlaConfig
from eagle3_xla.xla.hosts import Hosts


class Backend(Protocol):
    """What a run asks of its devices. hosts: who runs together; part: which part of a batch this host reads;
    draft_groups: devices that share the draft phase's rows; peak_flops: of all devices, 0 when it is unknown."""

    hosts: Hosts
    part: int
    device: torch.device
    data_parallel: int
    draft_groups: int
    peak_flops: float

    @property
    def description(self) -> str: ...
    @property
    def runs_behind(self) -> bool: ...  # whether it may still compute what has been dispatched
    def place_target(self, target: Target) -> Target: ...
    def place_head(self, head: Eagle3Head) -> Eagle3Head: ...
    def working_weights(self, head: Eagle3Head) -> dict[str, torch.Tensor]: ...
    def reduced(self, gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor: ...
    def draft_layout(self, tensor: torch.Tensor) -> torch.Tensor: ...
    def target_layout(self, tensor: torch.Tensor) -> torch.Tensor: ...
    def like(self, tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor: ...
    def replicate(self, tensor: torch.Tensor) -> torch.Tensor: ...
    def to_host(self, tensor: torch.Tensor) -> torch.Tensor: ...
    def put(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]: ...
    def autocast(self) -> AbstractContextManager: ...
    def compile(self, function: Callable, state: Iterable[torch.Tensor] = ()) -> Callable: ...
    def compilations(self) -> int: ...
    def memory_bytes(self) -> int | None: ...
    def profiler(self, folder: str) -> AbstractContextManager: ...
    def settle(self) -> None: ...


def make_backend(config: XlaConfig, hosts: Hosts | None = None) -> Backend:
    """The backend of a recipe: SpmdBackend (XLA devices) or PlainBackend (one CPU, or one GPU with CUDA graphs);
    hosts: who run it together (default: this process alone)."""
    if config.device == "xla":
        try:
            from eagle3_xla.xla.spmd import SpmdBackend
        except ImportError as error:
            raise UserError(
                f"xla.device is xla, but torch_xla is not usable here ({error}); or --xla.device=cpu"
            ) from None
        return SpmdBackend(config, hosts)
    from eagle3_xla.xla.plain import PlainBackend

    return PlainBackend(config, hosts)
