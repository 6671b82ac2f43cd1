"""What this machine can do, measured in a second: the quickstart sizes its work by it and says what to expect."""

import os
import time
from pathlib import Path
from typing import NamedTuple

import torch

# The machine that quickstart.py's seconds were measured on: two cores of an AMD EPYC with AVX-512.
REFERENCE_GFLOPS = 165.0
# Without AVX-512 XLA's matmuls lose more than torch's, which are measured here: 110 tokens/s at 76 GFLOP/s against 404
# at 161 (benchmarks/README.md).
WITHOUT_AVX512 = 1.7
SIZE, REPEATS = 1024, 20


class Machine(NamedTuple):
    """gflops: of plain torch matmuls in float32 on all of torch's threads; free_gib: memory that can be had now."""

    cores: int
    gflops: float
    avx512: bool
    free_gib: float

    @property
    def slowness(self) -> float:
        """How many times longer than on the reference machine the same work takes."""
        return max(0.2, REFERENCE_GFLOPS / self.gflops * (1 if self.avx512 else WITHOUT_AVX512))

    def words(self) -> str:
        vectors = "AVX-512" if self.avx512 else "no AVX-512"
        return f"{self.cores} cores, {vectors}, {self.gflops:.0f} GFLOP/s, {self.free_gib:.0f} GiB of memory free"


def measure() -> Machine:
    """The best of several matmuls, so that other work on the machine counts for little.

    On all threads: two cores may be two threads of one, which together do no more than one.
    """
    left, right, times = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE), []
    for _ in range(REPEATS):
        started = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - started)
    gflops = 2 * SIZE**3 / min(times) / 1e9
    return Machine(len(os.sched_getaffinity(0)), gflops, "avx512f" in _text("/proc/cpuinfo"), _free_gib())


def _free_gib() -> float:
    lines = [line.split() for line in _text("/proc/meminfo").splitlines() if line.startswith("MemAvailable:")]
    return int(lines[0][1]) / 2**20 if lines else 0.0


def _text(file: str) -> str:
    return Path(file).read_text() if Path(file).exists() else ""
