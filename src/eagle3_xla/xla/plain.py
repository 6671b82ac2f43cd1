"""Eager torch on one CPU or GPU, for debugging and for machines without XLA."""

import contextlib

import torch
import torch.utils.checkpoint

from eagle3_xla.config import UserError, XlaConfig


class PlainBackend:
    """One device, nothing compiled."""

    def __init__(self, config: XlaConfig):
        if config.dp * config.tp != 1:
            raise UserError(f"xla.device={config.device} runs on one device; set xla.dp and xla.tp to 1")
        if config.device == "cuda" and not torch.cuda.is_available():
            raise UserError("xla.device is cuda, but torch sees no GPU")
        self.device = torch.device(config.device)
        self.data_parallel = 1
        self._autocast = config.autocast

    @property
    def description(self) -> str:
        return f"{self.device.type}, eager torch"

    def place_target(self, target):
        return target.to(self.device)

    def place_head(self, head):
        return head.to(self.device)

    def like(self, tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """`tensor` on the device, laid out as `parameter` is."""
        return tensor.to(self.device)

    def replicate(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device)

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().cpu().clone()

    def put(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.to(self.device) for name, value in batch.items()}

    def autocast(self):
        if not self._autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def checkpoint(self, function, *tensors):
        """function(*tensors), computed again in the backward pass instead of kept."""
        return torch.utils.checkpoint.checkpoint(function, *tensors, use_reentrant=False)

    def compile(self, function):
        return function

    def compilations(self) -> int:
        return 0

    def settle(self) -> None:
        """Wait until everything placed so far is on the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
