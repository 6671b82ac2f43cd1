"""Reads a scheduled HLO module as text: instructions with their shapes, bytes, called computations and trip counts."""

import math
import re
from dataclasses import dataclass, field

import numpy as np

ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
ITEM_BYTES |= {"s64": 8, "u64": 8, "f64": 8}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")


@dataclass
class Array:
    """One array of a shape; `bytes` as it lies in memory, tile padding included; space 0 is HBM, others on the chip."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    space: int


@dataclass
class Instruction:
    name: str
    opcode: str
    arrays: list[Array]  # the result's
    operands: list[str]
    text: str  # operands and attributes
    calls: list[str] = field(default_factory=list)

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.text)
        return found[1] if found else None

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate; None where it has none and writes no number, or the largest one (seen for a matmul
        that carries a part of a collective, on the v6e)."""
        cycles = int(self.attribute(r'"estimated_cycles":"?(\d+)') or 0)
        return None if cycles in (0, 2**63 - 1) else cycles

    def matmul_flops(self, left: tuple[int, ...], right: tuple[int, ...]) -> int:
        """Of a dot or a convolution of operands of these shapes. The compiler writes batched matmuls as convolutions
        whose windows meet dilated inputs: of a window's places only those count that meet an element."""
        (out,) = (a.shape for a in self.arrays)
        if self.opcode == "dot":
            contracted = re.findall(r"\d+", self.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or "")
            return 2 * math.prod(out) * math.prod(left[int(d)] for d in contracted)
        labels = self.attribute(r"dim_labels=([\w>\-]+)") or "bf_io->bf"
        lefts, rights, outs = re.split("_|->", labels)
        flops = 2 * out[outs.index("b")] * out[outs.index("f")] * right[rights.index("i")]
        window = dict(re.findall(r"(\w+)=([\dx_\-]+)", self.attribute(r"window=\{([^}]*)\}") or ""))
        spatial = sorted(set(outs) - {"b", "f"})
        default = {"size": "1", "stride": "1", "pad": "0_0", "lhs_dilate": "1", "rhs_dilate": "1"}
        values = [window[n].split("x") if n in window else [default[n]] * len(spatial) for n in default]
        for d, size, stride, pad, left_dilate, right_dilate in zip(spatial, *values):
            starts: np.ndarray = np.arange(out[outs.index(d)]) * int(stride) - int(pad.split("_")[0])
            places = np.add.outer(starts, np.arange(int(size)) * int(right_dilate))
            inside = (places >= 0) & (places < left[lefts.index(d)] * int(left_dilate))
            flops *= int((inside & (places % int(left_dilate) == 0)).sum())
        return flops

    @property
    def channel(self) -> str | None:
        """What the parts of one collective share."""
        return self.attribute(r"channel_id=(\d+)")

    @property
    def trip_count(self) -> int:
        """Of a while loop, which the compiler knows when its bounds are constants; 1 when it doesn't."""
        return int(self.attribute(r'"known_trip_count":\{"n":"?(\d+)') or 1)

    def groups(self) -> np.ndarray | None:
        """Partition numbers of a collective, [groups, members]; None for point-to-point ones."""
        iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", self.text)
        if iota:
            shape, dims, order = (tuple(map(int, part.split(","))) if part else None for part in iota.groups())
            numbers = np.arange(np.prod(dims)).reshape(dims)
            return (numbers.transpose(order) if order else numbers).reshape(shape)
        listed = self.attribute(r"replica_groups=\{(\{[\d,{}]*\})\}")
        return np.array([list(map(int, g.split(","))) for g in re.findall(r"\d[\d,]*", listed)]) if listed else None


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """computation name -> its instructions in scheduled order, and the entry's name."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", []
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
            continue
        found = _INSTRUCTION.match(re.sub(r"/\*.*?\*/", "", line))
        if not found:
            continue
        name, shape, opcode, rest = found.groups()
        operands = re.findall(r"%([\w.\-]+)", rest[: _closing(rest)])
        calls = re.findall(r"(?:calls|body|to_apply)=%([\w.\-]+)", rest)
        current.append(Instruction(name, opcode, _arrays(shape), operands, rest, calls))
    return computations, entry


def _closing(text: str) -> int:
    depth = 1
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return position
    return len(text)


def _arrays(shape: str) -> list[Array]:
    arrays = []
    for dtype, dims, layout in _ARRAY.findall(shape):
        if dtype not in ITEM_BYTES:
            continue
        sizes = tuple(int(d) for d in dims.split(",")) if dims else ()
        space = re.search(r"S\((\d+)\)", layout)
        size = int(np.prod(_padded(sizes, layout))) * ITEM_BYTES[dtype]
        arrays.append(Array(dtype, sizes, size, int(space[1]) if space else 0))
    return arrays


def _padded(sizes: tuple[int, ...], layout: str) -> list[int]:
    """Sizes with the minor dimensions rounded up to the layout's tile: `{minor,..,major:T(8,128)(2,1)}`."""
    order = re.match(r"([\d,]+)", layout)
    tile = re.search(r"T\(([\d,]+)\)", layout)
    padded = list(sizes)
    if order and tile:
        minor_first = [int(d) for d in order[1].split(",")]
        for dimension, unit in zip(minor_first, reversed([int(t) for t in tile[1].split(",")])):
            padded[dimension] = -(-padded[dimension] // unit) * unit
    return padded
