"""The TPU compiler (libtpu) without a TPU: a lowered step -> its executable for a slice, and what that says of memory.

The versions in setup.cfg's `plan` extra belong together: this jaxlib reads the HLO of that torch_xla and hands
StableHLO to that libtpu.
"""

import os
import re
from typing import Any, NamedTuple

import numpy as np

from eagle3_xla.errors import UserError


class Chip(NamedTuple):
    """hbm_bytes: what the compiler lets a program use (its own refusals say so); peak_flops: bf16 matmuls a second;
    hbm_rate: bytes/s; clock: Hz of `estimated_cycles`; link_rate: bytes/s of one ICI link in one direction.
    Peaks are Google's published ones (cloud.google.com/tpu/docs, "System architecture").
    """

    name: str
    config: str
    hbm_bytes: int
    peak_flops: float
    hbm_rate: float
    clock: float
    link_rate: float


GIB = 1024**3
V4 = Chip("v4", "megacore_dense", int(31.75 * GIB), 275e12, 1.2e12, 1.05e9, 45e9)
V5E = Chip("v5e", "default", int(15.75 * GIB), 197e12, 0.82e12, 1.5e9, 45e9)
V5P = Chip("v5p", "megacore", int(95.74 * GIB), 459e12, 2.765e12, 1.75e9, 90e9)
V6E = Chip("v6e", "default", int(31.25 * GIB), 918e12, 1.64e12, 1.75e9, 90e9)
PEAK_FLOPS = {chip.name: chip.peak_flops for chip in (V4, V5E, V5P, V6E)}


class Topology(NamedTuple):
    """name: the accelerator type (v4 and v5p count TensorCores, two in a chip); shape: chips along the torus' axes."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        return int(np.prod(self.shape))

    def coordinates(self) -> list[tuple[int, ...]]:
        """Of each chip by its device number: x fastest. torch_xla numbers devices in the order of their ids."""
        x, y, *z = self.shape
        return [(i, j, *k) for k in np.ndindex(*z) for j in range(y) for i in range(x)]

    @property
    def compiler_name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


TOPOLOGIES = {
    name: Topology(name, chip, shape)
    for name, chip, shape in [
        ("v4-8", V4, (2, 2, 1)),
        ("v4-16", V4, (2, 2, 2)),
        ("v4-32", V4, (2, 2, 4)),
        ("v4-64", V4, (2, 4, 4)),
        ("v5e-8", V5E, (2, 4)),
        ("v5e-16", V5E, (4, 4)),
        ("v5p-16", V5P, (2, 2, 2)),
        ("v6e-8", V6E, (2, 4)),
        ("v6e-16", V6E, (4, 4)),
    ]
}


def find_topology(name: str) -> Topology:
    """A slice by its accelerator type (`v4-32`, `v5litepod-16`) or by the compiler's name of it (`v4:2x2x4`)."""
    wanted = name.lower().replace("v5litepod", "v5e")
    for topology in TOPOLOGIES.values():
        if wanted in (topology.name, topology.compiler_name):
            return topology
    known = ", ".join(f"{t.name} = {t.compiler_name}, {t.chips} chips" for t in TOPOLOGIES.values())
    raise UserError(f"unknown topology {name!r}; known: {known}")


class DoesNotFit(Exception):
    """The compiler's refusal. needed: bytes of HBM per chip; largest: the biggest buffers, as (bytes, shape, kind);
    at_rest: weights and optimizer alone are too large, before any activation.
    """

    def __init__(self, needed: int, largest: list[tuple[int, str, str]], at_rest: bool = False):
        super().__init__(f"{needed} bytes of HBM needed")
        self.needed, self.largest, self.at_rest = needed, largest, at_rest


class Memory(NamedTuple):
    """Bytes of HBM per chip. A state argument shares its buffer with the output that replaces it: `aliased`."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


class Executable(NamedTuple):
    """memory; flops: per chip, as the compiler counts them, the body of a loop (experts have one) once; donated:
    arguments that share a buffer with an output; text: the scheduled HLO module.
    """

    memory: Memory
    flops: float
    donated: set[int]
    text: str


def compiler_flags(text: str) -> list[tuple[str, str]]:
    """`--xla_a=1 --xla_b` -> [("xla_a", "1"), ("xla_b", "true")]. Raises UserError for anything else."""
    flags = []
    for word in text.split():
        name, equals, value = word.removeprefix("--").partition("=")
        if not re.fullmatch(r"(--)?xla_\w+(=\S+)?", word):
            raise UserError(f"setting plan.xla_flags: {word!r} is no flag; --xla_NAME=VALUE is expected")
        flags.append((name, value if equals else "true"))
    return flags


def compile_for(topology: Topology, hlo: bytes, donated: list[int], flags: str = "") -> Executable:
    """Compile an HloModuleProto for the slice's chips, one partition each; `donated`: argument numbers; flags: of the
    compiler (`compiler_flags`).

    Raises UserError when the compiler isn't installed, doesn't start or doesn't know a flag, DoesNotFit when the step
    needs more HBM.
    """
    overrides = compiler_flags(flags)
    devices = topology_devices(topology)
    from jaxlib import _jax

    module = _with_shardings(_jax.mlir.xla_computation_to_mlir_module(_jax.XlaComputation(hlo)), donated)
    options = _jax.CompileOptions()
    options.num_replicas, options.num_partitions = 1, len(devices)
    options.env_option_overrides = overrides
    build = options.executable_build_options
    build.num_replicas, build.num_partitions = 1, len(devices)
    build.use_spmd_partitioning, build.use_shardy_partitioner = True, False  # as torch_xla compiles
    build.allow_spmd_sharding_propagation_to_output = [True]
    assignment = _jax.DeviceAssignment.create(np.array([[device.id for device in devices]]))
    build.device_assignment = options.device_assignment = assignment
    try:
        executable = devices[0].client.compile(
            module, executable_devices=_jax.DeviceList(tuple(devices)), compile_options=options
        )
    except _jax.XlaRuntimeError as error:
        raise _refusal(str(error)) from None
    stats = executable.get_compiled_memory_stats()
    memory = Memory(
        stats.argument_size_in_bytes,
        stats.output_size_in_bytes,
        stats.alias_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.generated_code_size_in_bytes,
    )
    text = "\n".join(module.to_string() for module in executable.hlo_modules())
    aliases = re.search(r"input_output_alias=\{(.*?) \}, ", text)
    reused = {int(number) for number in re.findall(r": \((\d+),", aliases[1])} if aliases else set()
    return Executable(memory, executable.cost_analysis()["flops"], reused, text)


def topology_devices(topology: Topology) -> list:
    """The slice's devices in torch_xla's order, that of their ids."""
    # No TPU is looked for: no metadata server, no other workers; and several plans may run at once.
    os.environ.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        TPU_STDERR_LOG_LEVEL="3",
        TPU_MIN_LOG_LEVEL="3",
        LIBTPU_INIT_ARGS=libtpu_flags(topology),
    )
    try:
        import libtpu  # noqa: F401
        from jax.experimental import topologies
    except ImportError as error:
        raise not_installed(error) from None
    try:
        description = topologies.get_topology_desc(topology.compiler_name, "tpu", chip_config_name=topology.chip.config)
    except RuntimeError as error:  # jaxlib's own error is one
        raise UserError(f"the TPU compiler does not start: {str(error).splitlines()[0]}") from None
    return sorted(description.devices, key=lambda device: device.id)


def not_installed(error: ImportError) -> UserError:
    return UserError(f"the TPU compiler is not installed ({error}): pip install 'eagle3-xla[plan]' (Linux on x86)")


def libtpu_flags(topology: Topology) -> str:
    """LIBTPU_INIT_ARGS of a run on such chips: what it holds now, and torch_xla's defaults, which `import torch_xla`
    adds where it finds chips.
    """
    import torch_xla

    # Not for longer than that: libtpu, which reads them too, aborts on a v4 whose type it was told.
    asked = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": topology.name}
    before = {name: os.environ.get(name) for name in (*asked, "LIBTPU_INIT_ARGS")}
    os.environ.update(asked)
    try:
        torch_xla._setup_libtpu_flags()
        return os.environ["LIBTPU_INIT_ARGS"].strip()
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _with_shardings(text: bytes | str, donated: list[int]) -> bytes:
    """Give every argument its sharding and the donated ones their mark.

    A placeholder's sharding is a custom call on it; data that lies on the devices carries it as the argument's own
    attribute, and without one the partitioner chooses (replicated here, which is what torch_xla's data is then).
    """
    from jax._src.interpreters.mlir import make_ir_context
    from jaxlib.mlir import ir

    with make_ir_context() as context, ir.Location.unknown(context):
        module: Any = ir.Module.parse(text)  # of its operations' own classes the stubs know nothing
        main = next(op for op in module.body if op.name.value == "main")
        shardings = {}
        for operation in main.entry_block:
            if operation.operation.name != "stablehlo.custom_call":
                continue
            operands = operation.operation.operands
            if (
                operation.call_target_name.value == "Sharding"
                and len(operands)
                and ir.BlockArgument.isinstance(operands[0])
            ):
                shardings[ir.BlockArgument(operands[0]).arg_number] = operation.operation.attributes["mhlo.sharding"]
        attributes = []
        for number, old in enumerate(main.arg_attrs):
            new = {entry.name: entry.attr for entry in old}
            new.setdefault("mhlo.sharding", shardings.get(number, ir.StringAttr.get("{replicated}")))
            if number in donated:
                new["jax.buffer_donor"] = ir.BoolAttr.get(True)
            attributes.append(ir.DictAttr.get(new))
        main.arg_attrs = ir.ArrayAttr.get(attributes)
        return str(module).encode()


def _refusal(message: str) -> Exception:
    if re.search(r"No such compile option|Failed to parse flag", message):
        return UserError(f"setting plan.xla_flags: {message.strip().removeprefix('INVALID_ARGUMENT: ')}")
    used = re.search(r"Used ([\d.]+[KMG]?) of [\d.]+[KMG]? hbm", message)
    if not used:
        return RuntimeError(f"the TPU compiler refused the step: {message[:2000]}")
    buffers = re.findall(
        r"Size: ([\d.]+[KMG]?)\n.*?Shape: (\S+?)\{?[^\n]*\n.*?Allocation type: ([^\n]*)", message, re.S
    )
    return DoesNotFit(_bytes(used[1]), [(_bytes(size), shape, kind) for size, shape, kind in buffers])


def _bytes(text: str) -> int:
    """`120.00G` as the compiler writes it."""
    units = {"K": 1024, "M": 1024**2, "G": GIB}
    return int(float(text[:-1]) * units[text[-1]]) if text[-1] in units else int(float(text))
