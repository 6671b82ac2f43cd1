"""Plain torch on one CPU (eager) or one GPU (CUDA graphs): no XLA."""

import contextlib
import resource
from collections.abc import Callable, Iterable

import torch

from eagle3_xla.draft.model import Eagle3Head
from eagle3_xla.errors import UserError
from eagle3_xla.target.model import Target
from eagle3_xla.xla.captured import Captured
from eagle3_xla.xla.config import XlaConfig
from eagle3_xla.xla.hosts import Hosts
from eagle3_xla.xla.memory import keep_freed_memory
from eagle3_xla.xla.processor import processor


class PlainBackend:
    """One device, nothing compiled; on a GPU each step is recorded once and played again (captured.py)."""

    def __init__(self, config: XlaConfig, hosts: Hosts | None = None):
        self.hosts, self.part = hosts or Hosts(), 0
        if self.hosts.count > 1:
            raise UserError(f"xla.device={config.device} runs in one process; {self.hosts.count} were started together")
        if config.dp * config.tp != 1:
            raise UserError(f"xla.device={config.device} runs on one device; set xla.dp and xla.tp to 1")
        if config.device == "cuda" and not torch.cuda.is_available():
            raise UserError("xla.device is cuda, but torch sees no GPU")
        if config.device == "cpu":
            keep_freed_memory()
        self.device = torch.device(config.device)
        self.data_parallel = self.draft_groups = 1
        self.peak_flops = config.peak_tflops * 1e12
        self._autocast = config.autocast
        self._pool = torch.cuda.graph_pool_handle() if config.device == "cuda" else None  # of all its graphs

    @property
    def description(self) -> str:
        if self.device.type == "cpu":
            return f"{processor()}, eager torch"
        return f"{torch.cuda.get_device_name()}, CUDA graphs"

    @property
    def runs_behind(self) -> bool:
        return self.device.type != "cpu"

    def place_target(self, target: Target) -> Target:
        return target.place(lambda tensor: tensor.to(self.device))

    def place_head(self, head: Eagle3Head) -> Eagle3Head:
        return head.to(self.device)

    def working_weights(self, head: Eagle3Head) -> dict[str, torch.Tensor]:
        """Parameter name -> the weight that a step computes with; here the parameter itself."""
        return dict(head.named_parameters())

    def reduced(self, gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """The gradient of a working weight as the parameter's; here it is that already."""
        return gradient

    def draft_layout(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor [B or groups, ...] as the draft phase computes with it."""
        return tensor

    def target_layout(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor [B or groups, ...] as the target computes with it."""
        return tensor

    def like(self, tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """`tensor` on the device, laid out as `parameter` is."""
        return tensor.to(self.device)

    def replicate(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device)

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().cpu().clone()

    def put(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.to(self.device) for name, value in batch.items()}

    def autocast(self) -> contextlib.AbstractContextManager:
        if not self._autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def compile(self, function: Callable, state: Iterable[torch.Tensor] = ()) -> Callable:
        return function if self.device.type == "cpu" else Captured(function, list(state), self._pool)

    def compilations(self) -> int:
        return 0

    def memory_bytes(self) -> int:
        """Most memory in use so far: the GPU's, or this process's."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def profiler(self, folder: str) -> contextlib.AbstractContextManager:
        """A context whose trace is written to `folder`."""
        return torch.profiler.profile(on_trace_ready=torch.profiler.tensorboard_trace_handler(folder))

    def settle(self) -> None:
        """Wait until everything placed so far is on the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
