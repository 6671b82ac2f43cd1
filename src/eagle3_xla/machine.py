"""What this machine can do, measured in seconds: the quickstart sizes its work by it and says what to expect."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from eagle3_xla.errors import UserError

# Of the machines that quickstart.py's seconds are of, by `Machine.bfloat16`: two cores of an AMD EPYC with AVX-512.
REFERENCE_GFLOPS = {False: 165.0, True: 425.0}
BFLOAT16 = ("avx512_bf16", "amx_bf16")  # the processor's flags for products of bfloat16 pairs


class Machine(NamedTuple):
    """bfloat16: whether the processor multiplies it itself; gflops: of the matmuls of the training (xla/speed.py): then
    torch's in bfloat16, else XLA's in float32, which lose more without AVX-512 than torch's; free_gib: of memory that
    can be had now."""

    cores: int
    gflops: float
    avx512: bool
    bfloat16: bool
    free_gib: float

    @property
    def slowness(self) -> float:
        """How many times longer than on the reference machine the same work takes."""
        return max(0.2, REFERENCE_GFLOPS[self.bfloat16] / self.gflops)

    def words(self) -> str:
        vectors = "AVX-512" if self.avx512 else "no AVX-512"
        numbers = "bfloat16" if self.bfloat16 else "float32"
        speed = f"{self.gflops:.0f} GFLOP/s in {numbers}"
        return f"{self.cores} cores, {vectors}, {speed}, {self.free_gib:.0f} GiB of memory free"


def measure(gflops: float | None, bfloat16: bool | None) -> Machine:
    """gflops, bfloat16: as found before; None: now. Raises UserError where torch_xla has to run and does not."""
    flags = _text("/proc/cpuinfo").split()
    if bfloat16 is None:
        bfloat16 = any(flag in flags for flag in BFLOAT16)
    gflops = gflops or _gflops(bfloat16)
    return Machine(len(os.sched_getaffinity(0)), gflops, "avx512f" in flags, bfloat16, _free_gib())


def _gflops(bfloat16: bool) -> float:
    """In a process of its own, whose graph and buffers end with it."""
    command = [sys.executable, "-m", "eagle3_xla.xla.speed", *["bfloat16"] * bfloat16]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        part = "torch" if bfloat16 else "torch_xla"
        raise UserError(f"{part} does not run on this machine ({last}); bash launch/quickstart.sh installs it")
    return float(done.stdout.split()[-1])


def _free_gib() -> float:
    lines = [line.split() for line in _text("/proc/meminfo").splitlines() if line.startswith("MemAvailable:")]
    return int(lines[0][1]) / 2**20 if lines else 0.0


def _text(file: str) -> str:
    return Path(file).read_text() if Path(file).exists() else ""
