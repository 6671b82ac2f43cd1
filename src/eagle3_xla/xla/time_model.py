"""How long a compiled step would take, from its schedule. A model: it has not been compared with a chip.

The schedule of one chip is walked instruction by instruction.
- A matmul fusion takes the compiler's own `estimated_cycles`, or the time to move its operands, whichever is longer.
  One of which the compiler has no estimate takes its FLOPs at the mean rate of the module's others.
- Everything else is bound by memory: bytes read and written over the memory's rate. (The compiler's cycles for
  elementwise work are 2.5 to 5 times that bound.)
- A collective takes the time of its bytes over the ICI links that its group has, see `Ici`. An asynchronous one runs
  beside what is scheduled between its start and its done; prefetches into on-chip memory count for nothing. Fusions
  in between may carry a part of it (`async_collective_fusion`, seen for the v5p); they take the time of their compute.
- A hand-written kernel (the compiler has one for unmasked attention) counts for the bytes that it moves alone.
- A while loop takes its body's time, times its trip count.

`calibration.json` beside this file holds the model's figures for single operations next to their bounds on the chip;
`benchmarks/time_model.py` writes it.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from eagle3_xla.xla.hlo import COLLECTIVES, Array, Instruction, parse
from eagle3_xla.xla.tpu import Topology

HBM_EFFICIENCY = 0.82  # of the published rate, for streaming
ICI_EFFICIENCY = 0.85
ON_CHIP_SPEEDUP = 4.0  # CMEM and VMEM against HBM
HOP_SECONDS = 1e-6
STATED_ERROR = 0.3  # of the whole; see calibration.json and benchmarks/README.md
# Seconds of the host for a step that is run by its graph's hash, and more for each buffer that it takes: CPU seconds,
# the device's included, of `benchmarks/dispatch.py --layers 8` (156 buffers, 9.2 ms) and `--layers 28` (396, 13.8 ms).
HOST_CALL, HOST_BUFFER = 6.2e-3, 19e-6
KERNEL = "tpu_custom_call"  # a hand-written kernel; other custom calls only rename buffers
FUSED_START, FUSED_DONE = "async-collective-start", "async-collective-done"  # names of fusions
FREE = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "partition-id", "after-all", "iota")


@dataclass
class StepTime:
    """Seconds of one step on one chip; collectives: exposed ones, what no compute hides.

    counts, bytes: of collectives by kind, loops unrolled; bytes are those of the larger side of each on one chip.
    """

    matmul: float = 0.0
    memory: float = 0.0
    collectives: float = 0.0
    hidden_collectives: float = 0.0
    counts: Counter = field(default_factory=Counter)
    bytes: Counter = field(default_factory=Counter)

    @property
    def total(self) -> float:
        return self.matmul + self.memory + self.collectives

    def add(self, other: "StepTime", times: float) -> None:
        for name in ("matmul", "memory", "collectives", "hidden_collectives"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for name in ("counts", "bytes"):
            getattr(self, name).update({kind: round(times * n) for kind, n in getattr(other, name).items()})


def host_seconds(arguments: int) -> float:
    """What the host needs to start a step that takes so many buffers."""
    return HOST_CALL + HOST_BUFFER * arguments


class Ici:
    """Links of a slice: each chip has one to each neighbour along each axis of the torus (v4, v5p: 3, v5e, v6e: 2).

    Slices of these sizes are meshes without wrap-around links, so a group's collectives run at the rate of a corner:
    one incoming link for each axis that the group spans.
    """

    def __init__(self, topology: Topology):
        self.rate = topology.chip.link_rate * ICI_EFFICIENCY
        self.coordinates = np.array(topology.coordinates())

    def seconds(self, kind: str, size: int, groups: np.ndarray | None) -> float:
        """size: bytes on one chip of the larger of input and output."""
        if groups is None:  # point to point
            return size / self.rate + HOP_SECONDS
        members = groups.shape[1]
        if members == 1:
            return 0.0
        extents = [len(set(axis)) for axis in self.coordinates[groups[0]].T]
        spanned = [extent for extent in extents if extent > 1]
        if np.prod(spanned) != members:  # not a box: as a chain
            spanned = [members]
        share = (members - 1) / members
        latency = HOP_SECONDS * sum(extent - 1 for extent in spanned)
        if kind == "all-to-all":  # half of it crosses the middle of the longest axis
            return size * max(spanned) / 4 / self.rate + latency
        one_way = size * share / (len(spanned) * self.rate) + latency
        return 2 * one_way if kind == "all-reduce" else one_way


def model_time(text: str, topology: Topology) -> StepTime:
    """The modelled time of one execution of a scheduled module."""
    computations, entry = parse(text)
    return _Walk(computations, topology).run(entry)


class _Walk:
    def __init__(self, computations: dict[str, list[Instruction]], topology: Topology):
        self.computations = computations
        self.chip = topology.chip
        self.ici = Ici(topology)
        self.hbm = self.chip.hbm_rate * HBM_EFFICIENCY
        self.done: dict[str, StepTime] = {}

    def run(self, name: str) -> StepTime:
        if name not in self.done:
            self.done[name] = self._walk(self.computations[name])
        return self.done[name]

    def _walk(self, instructions: list[Instruction]) -> StepTime:
        time = StepTime()
        shapes = {instruction.name: instruction.arrays for instruction in instructions}
        clock = 0.0  # of compute; collectives in flight end at `ends`
        ends: dict[str | None, float] = {}
        wire_free = 0.0
        for instruction in instructions:
            opcode = instruction.opcode
            base = opcode.removesuffix("-start").removesuffix("-done")
            if opcode in FREE or (opcode == "custom-call" and KERNEL not in instruction.text):
                continue
            if opcode == "while":
                body = self.run(instruction.calls[0])
                time.add(body, instruction.trip_count)
                clock += instruction.trip_count * body.total
            elif opcode in ("call", "conditional"):
                for called in instruction.calls:
                    time.add(self.run(called), 1)
                    clock += self.run(called).total
            elif base in COLLECTIVES or (self._fused_collective(instruction) and not self._carries(instruction)):
                fused = self._fused_collective(instruction)
                flight = fused.channel if fused else instruction.name  # what start and done have in common
                if opcode.endswith("-done") or instruction.name.startswith(FUSED_DONE):
                    wait = max(0.0, ends[flight if fused else instruction.operands[0]] - clock)
                    time.collectives += wait
                    time.hidden_collectives -= wait
                    clock += wait
                    continue
                kind, size, groups = self._collective(instruction, base, shapes)
                seconds = self.ici.seconds(kind, size, groups)
                time.counts[kind] += 1
                time.bytes[kind] += size
                if opcode.endswith("-start") or instruction.name.startswith(FUSED_START):
                    wire_free = max(wire_free, clock) + seconds
                    ends[flight] = wire_free
                    time.hidden_collectives += seconds
                else:
                    wire_free = max(wire_free, clock) + seconds
                    time.collectives += wire_free - clock
                    clock = wire_free
            elif base not in ("copy", "slice") or base == opcode:  # else a prefetch, beside the units
                seconds, matmul = self._compute(instruction, shapes)
                clock += seconds
                if matmul:
                    time.matmul += seconds
                else:
                    time.memory += seconds
        return time

    def _carries(self, instruction: Instruction) -> bool:
        """Whether a fusion is compute beside which a collective goes on that was started before."""
        return instruction.calls[0].startswith("async_collective_fusion")

    def _fused_collective(self, instruction: Instruction) -> Instruction | None:
        """The all-reduce inside a reduce-scatter fusion, or the collective that an asynchronous fusion is part of."""
        return next((i for i in self._inside(instruction) if i.opcode in COLLECTIVES), None)

    def _inside(self, instruction: Instruction) -> list[Instruction]:
        """What a fusion does."""
        return self.computations.get(instruction.calls[0], []) if instruction.opcode == "fusion" else []

    def _collective(
        self, instruction: Instruction, base: str, shapes: dict[str, list[Array]]
    ) -> tuple[str, int, np.ndarray | None]:
        fused = self._fused_collective(instruction)
        if fused:
            kind = fused.opcode if instruction.name.startswith(FUSED_START) else "reduce-scatter"
            return kind, sum(a.bytes for a in fused.arrays), fused.groups()
        inputs = sum(a.bytes for name in instruction.operands for a in shapes.get(name, []))
        outputs = sum(a.bytes for a in instruction.arrays)
        if instruction.opcode.endswith("-start"):  # the result's shape repeats the operands
            outputs -= inputs if base != "all-reduce" else 0
        return base, max(inputs, outputs), instruction.groups()

    def _compute(self, instruction: Instruction, shapes: dict[str, list[Array]]) -> tuple[float, bool]:
        arrays = list(instruction.arrays)
        for position, name in enumerate(instruction.operands):
            share = self._share_read(instruction, position)
            arrays += [Array(a.dtype, a.shape, int(a.bytes * share), a.space) for a in shapes.get(name, [])]
        hbm = sum(a.bytes for a in arrays if a.space == 0) / self.hbm
        on_chip = sum(a.bytes for a in arrays if a.space != 0) / (self.hbm * ON_CHIP_SPEEDUP)
        bound = max(hbm, on_chip)
        if self._is_matmul(instruction):
            estimate = instruction.cycles
            cycles = self._flops(instruction, shapes) * self._cycles_per_flop if estimate is None else estimate
            return max(bound, cycles / self.chip.clock), True
        return bound, False

    @cached_property
    def _cycles_per_flop(self) -> float:
        """Of all matmuls that have an estimate."""
        cycles, flops = 0, 0
        for instructions in self.computations.values():
            shapes = {instruction.name: instruction.arrays for instruction in instructions}
            for instruction in instructions:
                if instruction.cycles and self._is_matmul(instruction):
                    cycles += instruction.cycles
                    flops += self._flops(instruction, shapes)
        return cycles / max(flops, 1)

    def _flops(self, instruction: Instruction, shapes: dict[str, list[Array]]) -> int:
        """Of all matmuls in an instruction."""
        if instruction.opcode in ("convolution", "dot"):
            return instruction.matmul_flops(*(shapes[name][0].shape for name in instruction.operands[:2]))
        inside = self._inside(instruction)
        within = {i.name: i.arrays for i in inside}
        return sum(self._flops(i, within) for i in inside)

    def _share_read(self, instruction: Instruction, position: int) -> float:
        """How much of an operand an instruction reads: a gather or a slice takes only what it returns."""
        if instruction.opcode in ("gather", "dynamic-slice", "slice") and position == 0:
            return 0.0  # what it returns is counted as its result
        inside = self._inside(instruction)
        parameters = {i.name: i for i in inside if i.opcode == "parameter"}
        for name, parameter in parameters.items():
            if int(parameter.text.split(")")[0]) != position:
                continue
            shares = [self._share_read(i, i.operands.index(name)) for i in inside if name in i.operands]
            return max(shares, default=0.0)
        return 1.0

    def _is_matmul(self, instruction: Instruction) -> bool:
        return instruction.opcode in ("convolution", "dot") or any(map(self._is_matmul, self._inside(instruction)))
