"""What this machine can do, measured in seconds: the quickstart sizes its work by it and says what to expect."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from eagle3_xla.errors import UserError

# The machine that quickstart.py's seconds were measured on: two cores of an AMD EPYC with AVX-512.
REFERENCE_GFLOPS = 165.0


class Machine(NamedTuple):
    """gflops: of XLA's matmuls in float32 (xla/speed.py), which lose more without AVX-512 than torch's; free_gib: of
    memory that can be had now."""

    cores: int
    gflops: float
    avx512: bool
    free_gib: float

    @property
    def slowness(self) -> float:
        """How many times longer than on the reference machine the same work takes."""
        return max(0.2, REFERENCE_GFLOPS / self.gflops)

    def words(self) -> str:
        vectors = "AVX-512" if self.avx512 else "no AVX-512"
        return f"{self.cores} cores, {vectors}, {self.gflops:.0f} GFLOP/s, {self.free_gib:.0f} GiB of memory free"


def measure(gflops: float | None) -> Machine:
    """gflops: as measured before; None: now. Raises UserError where torch_xla does not run."""
    gflops = gflops or _gflops()
    return Machine(len(os.sched_getaffinity(0)), gflops, "avx512f" in _text("/proc/cpuinfo"), _free_gib())


def _gflops() -> float:
    """In a process of its own, whose graph and buffers end with it."""
    done = subprocess.run([sys.executable, "-m", "eagle3_xla.xla.speed"], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"torch_xla does not run on this machine ({last}); bash launch/quickstart.sh installs it")
    return float(done.stdout.split()[-1])


def _free_gib() -> float:
    lines = [line.split() for line in _text("/proc/meminfo").splitlines() if line.startswith("MemAvailable:")]
    return int(lines[0][1]) / 2**20 if lines else 0.0


def _text(file: str) -> str:
    return Path(file).read_text() if Path(file).exists() else ""
