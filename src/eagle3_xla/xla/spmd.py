"""torch_xla SPMD (2.9.0): the mesh, the shardings, the compiled step, the count of compilations."""

import contextlib
import functools
import os
import re
import resource
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch_xla
import torch_xla.core.xla_model as xla_model
import torch_xla.debug.metrics as xla_metrics
import torch_xla.distributed.spmd as spmd
import torch_xla.runtime as runtime

from eagle3_xla.draft.model import Eagle3Head
from eagle3_xla.errors import UserError
from eagle3_xla.target.attention import GROUPED_EINSUM
from eagle3_xla.target.experts import PARTED, RoutedExperts, route_experts
from eagle3_xla.target.model import Target
from eagle3_xla.xla.config import XlaConfig
from eagle3_xla.xla.dispatch import alone, compiled
from eagle3_xla.xla.gather import local_gather
from eagle3_xla.xla.hosts import Hosts
from eagle3_xla.xla.memory import keep_freed_memory
from eagle3_xla.xla.mesh import mesh_devices, part_of_host
from eagle3_xla.xla.processor import processor
from eagle3_xla.xla.scan import scanned
from eagle3_xla.xla.tpu import PEAK_FLOPS

# The head, by parameter name: column-parallel ones over their output rows, row-parallel ones over their inputs.
HEAD_COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head", "fc")
HEAD_ROWS = ("o_proj", "down_proj")

torch.library.impl("eagle3_xla::gather", "XLA", local_gather)  # target/gather.py's, on XLA's tensors


class SpmdBackend:
    """A (dp, tp) mesh over all devices of the run.

    On the CPU, dp * tp virtual devices are made, so that the step of a TPU slice can be run anywhere. coordinates: of
    each device by its number, None: the runtime's own. hosts: who this process runs with; part: which part of a batch
    it reads.
    """

    runs_here = runs_behind = True

    def __init__(self, config: XlaConfig, hosts: Hosts | None = None, coordinates: list | None = None):
        wanted = config.dp * config.tp
        if runtime.device_type() == "CPU":
            os.environ.setdefault("CPU_NUM_DEVICES", str(wanted))
            if self.runs_here:
                keep_freed_memory()
        runtime.use_spmd()
        found = runtime.global_runtime_device_count()
        if found != wanted:
            raise UserError(f"xla.dp * xla.tp = {config.dp} * {config.tp} = {wanted}, but there are {found} devices")
        self.hosts = hosts or Hosts()
        if self.hosts.count != runtime.process_count():
            raise UserError(
                f"the devices belong to {runtime.process_count()} hosts, but {self.hosts.count} processes were started "
                "together; start launch/train_torchrun.sh on each host, one process there"
            )
        self.peak_flops = wanted * (config.peak_tflops * 1e12 or _peak_flops())
        # The device must exist before the first backward: autograd sizes its queues then.
        self.device = torch_xla.device()
        devices = mesh_devices(config.dp, config.tp, coordinates or _coordinates())
        self.mesh = spmd.Mesh(devices.ravel(), devices.shape, ("dp", "tp"))
        mine = [int(name.partition(":")[2]) for name in torch_xla._XLAC._xla_get_runtime_devices()]
        self.part, self._local_replicas = part_of_host(devices, mine)
        spmd.set_global_mesh(self.mesh)
        self.data_parallel = config.dp
        self._split_draft = config.draft_data_parallel and config.tp > 1
        self._tensor_parallel_draft = config.tp > 1 and not self._split_draft
        self.draft_groups = wanted if self._split_draft else config.dp  # devices that share the draft phase's rows
        self._autocast = config.autocast
        # Without it a TPU multiplies float32 as bfloat16. (set_mat_mul_precision warns of every call.)
        torch_xla._XLAC._xla_set_mat_mul_precision("default" if config.autocast else "highest")
        self._shape = f"dp={config.dp} x tp={config.tp}" + self._split_draft * f", draft dp={wanted}"

    @property
    def description(self) -> str:
        return f"{_hardware()}, torch_xla {torch_xla.__version__}, mesh {self._shape}"

    # What xla/aot.py does with placeholders instead of data: move a tensor, give a tensor its sharding.
    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device)

    def _mark(self, tensor: torch.Tensor, sharding: Any) -> None:
        torch_xla._XLAC._xla_mark_sharding(tensor, sharding)

    def place_target(self, target: Target) -> Target:
        """Shard by the model's own `base_model_tp_plan`, experts by their parts; anything else is replicated, a tied
        embedding too: split as its lm_head would be, torch_xla crashed in tests/target/test_families.py.
        """
        target.model.config._attn_implementation = GROUPED_EINSUM
        route_experts(target.model, self.mesh.shape()["tp"], self.data_parallel, scanned)
        plan = {f"model.model.{name}": style for name, style in (target.model.config.base_model_tp_plan or {}).items()}
        plan |= {f"model.{name}": style for name, style in (type(target.model)._tp_plan or {}).items()}

        def mark(name: str, tensor: torch.Tensor) -> None:
            module, _, leaf = name.rpartition(".")
            style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", module), "")
            spec = (None,) * tensor.ndim
            if isinstance(target.get_submodule(module), RoutedExperts):
                if leaf in PARTED:
                    spec = (None, "tp", *spec[2:])
            elif style.startswith("colwise"):
                spec = ("tp", *spec[1:])
            elif style.startswith("rowwise") and leaf == "weight":
                spec = (None, "tp")
            elif name == "draft_rows" and self._tensor_parallel_draft:
                spec = ("tp", None)
            self._mark(tensor, self.mesh.get_op_sharding(spec))

        return target.place(self._to_device, mark)

    def place_head(self, head: Eagle3Head) -> Eagle3Head:
        head = head._apply(self._to_device)
        for name, parameter in head.named_parameters():
            self._mark(parameter, self._stored(name, parameter))
        return head

    def _stored(self, name: str, parameter: torch.Tensor) -> Any:
        """Sharding of a parameter at rest, and of its moments and gradient: a matrix over all devices (ZeRO) when the
        draft phase is not split over tp; else as the step computes with it (benchmarks/README.md).
        """
        if self._tensor_parallel_draft or parameter.ndim < 2 or parameter.shape[0] % self.mesh.size():
            return self._computed(name, parameter)
        return self.mesh.get_op_sharding((("dp", "tp"), None))  # as in `draft_layout`

    def _computed(self, name: str, parameter: torch.Tensor) -> Any:
        """Sharding of a weight while the step computes with it."""
        module = name.split(".")[-2]
        if not self._tensor_parallel_draft:
            return self.mesh.get_op_sharding((None,) * parameter.ndim)
        if module in HEAD_COLUMNS:
            return self.mesh.get_op_sharding(("tp", None))
        if module in HEAD_ROWS:
            return self.mesh.get_op_sharding((None, "tp"))
        return self.mesh.get_op_sharding((None,) * parameter.ndim)

    def working_weights(self, head: Eagle3Head) -> dict[str, torch.Tensor]:
        """Parameter name -> the weight that a step computes with: gathered once, in bf16 if autocast."""
        weights = {}
        for name, parameter in head.named_parameters():
            narrow = self._autocast and parameter.ndim > 1
            weight = parameter.detach().to(torch.bfloat16) if narrow else parameter.detach().clone()
            _annotate(weight, self._computed(name, parameter))
            weights[name] = weight.requires_grad_()
        return weights

    def draft_layout(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor [B or groups, ...] of the target's as the draft phase computes with it: its first dimension over all
        devices, or as it is."""
        return self._laid_out(tensor, "dp", ("dp", "tp")) if self._split_draft else tensor

    def target_layout(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor [B or groups, ...] of the draft phase as the target computes with it: over dp."""
        return self._laid_out(tensor, ("dp", "tp"), "dp") if self._split_draft else tensor

    def _laid_out(self, tensor: torch.Tensor, *layouts: str | tuple[str, ...]) -> torch.Tensor:
        # Both sides are said: else the partitioner carries one side's layout on into the other's computation.
        for axes in layouts:
            tensor = tensor.clone()
            _annotate(tensor, self.mesh.get_op_sharding((axes,) + (None,) * (tensor.ndim - 1)))
        return tensor

    def reduced(self, gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """The gradient of a working weight in float32, sharded as `parameter` is."""
        gradient = gradient.float()
        _annotate(gradient, torch_xla._XLAC._get_xla_op_sharding(parameter))
        return gradient

    def like(self, tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """`tensor` on the device, sharded as `parameter` is."""
        tensor = self._to_device(tensor)
        self._mark(tensor, torch_xla._XLAC._get_xla_op_sharding(parameter))
        return tensor

    def replicate(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = self._to_device(tensor)
        self._mark(tensor, self.mesh.get_op_sharding((None,) * tensor.ndim))
        return tensor

    @alone
    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """The whole tensor on the host, put together from its shards: `.cpu()` would compile a gather for each."""
        tensor = tensor.detach()
        if self.hosts.count > 1:  # other hosts hold shards too
            tensor = tensor.clone()  # a compiled transfer for each shape
            _annotate(tensor, self.mesh.get_op_sharding((None,) * tensor.ndim))
            torch_xla.sync()
        xla_model.wait_device_ops()  # shards of a step that is still running can't be read
        whole = torch.empty(tensor.shape, dtype=tensor.dtype)
        for shard in spmd.XLAShardedTensor(tensor).local_shards:
            whole[shard.indices] = shard.unpadded_data
        return whole

    @alone
    def put(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Host tensors [B, ...] to the devices, the batch dimension over dp; of several hosts, each gives its part."""
        if self.hosts.count > 1:
            return {name: self._from_parts(value) for name, value in batch.items()}
        placed = {}
        for name, value in batch.items():
            placed[name] = self._to_device(value)
            self._mark(placed[name], self.mesh.get_op_sharding(("dp",) + (None,) * (value.ndim - 1)))
        return placed

    def _from_parts(self, part: torch.Tensor) -> torch.Tensor:
        """The tensor over dp whose rows of this host are `part`. torch_xla's own way (`ShardingSpec(minibatch=True)`)
        refuses every mesh whose batch isn't split over all devices, and parts with fewer rows than local devices.
        """
        rows = len(part) // len(set(self._local_replicas))
        shards = [part[replica * rows : (replica + 1) * rows] for replica in self._local_replicas]
        sharding = self.mesh.get_op_sharding(("dp",) + (None,) * (part.ndim - 1))
        return torch_xla._XLAC._global_tensor_from_cpu_shards(shards, sharding, None)

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast("xla", dtype=torch.bfloat16) if self._autocast else contextlib.nullcontext()

    def memory_bytes(self) -> int | None:
        """Most memory in use so far, on the CPU this process's. Of a TPU torch_xla can't tell it under SPMD."""
        if runtime.device_type() == "CPU":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return None

    @contextlib.contextmanager
    def profiler(self, folder: str) -> Iterator[None]:
        """A context whose xprof trace is written to `folder`/plugins/profile, where tensorboard finds it."""
        session = torch_xla._XLAC.profiler.TslProfilerSessionWrapper()
        yield
        xla_model.wait_device_ops()
        session.export(session.stop(), folder)

    def compile(self, function: Callable, state: Iterable[torch.Tensor] = ()) -> Callable:
        """`function` as one graph; torch_xla raises when it would need a second one. state: the tensors that may differ
        between two calls besides its arguments (xla/dispatch.py).
        """
        return compiled(function, list(state))

    def compilations(self) -> int:
        """How often XLA has compiled a graph in this process."""
        data = xla_metrics.metric_data("CompileTime")
        return data[0] if data else 0

    @alone
    def settle(self) -> None:
        """Materialise pending tensors, so that the step's graph starts from plain device buffers."""
        torch_xla.sync(wait=True)


def _annotate(tensor: torch.Tensor, sharding: Any) -> None:
    """Give a tensor inside a graph its sharding."""
    torch_xla._XLAC._xla_annotate_custom_sharding(tensor, sharding)


def _coordinates() -> list[tuple[int, ...]] | None:
    """Of each device in the slice's torus, by its number; None on the CPU."""
    if runtime.device_type() != "TPU":
        return None
    attributes = {int(a["name"].partition(":")[2]): a for a in runtime.global_runtime_device_attributes()}
    return [tuple(attributes[number]["coords"]) for number in range(len(attributes))]


def _peak_flops() -> float:
    """bf16 FLOP/s of one of this run's devices, 0 when it is unknown."""
    if runtime.device_type() != "TPU":
        return 0.0
    return PEAK_FLOPS.get(_accelerator().split("-")[0], 0.0)


@functools.cache  # it may be the metadata server that is asked
def _accelerator() -> str:
    """The slice's type, such as v5e-8; "" where its environment does not say."""
    try:
        return torch_xla.tpu.get_tpu_env().get("ACCELERATOR_TYPE", "").replace("v5litepod", "v5e")
    except OSError:  # those of requests are
        return ""


def _hardware() -> str:
    kind = runtime.device_type()
    if kind == "CPU":
        return processor()
    return f"{kind} {_accelerator()}".strip() if kind == "TPU" else kind
