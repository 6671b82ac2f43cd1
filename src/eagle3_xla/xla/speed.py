"""How fast XLA multiplies matrices on this machine's processor."""

import time

import torch
import torch_xla

from eagle3_xla.xla.memory import keep_freed_memory

SIZE, PRODUCTS, REPEATS = 1024, 4, 40


def matmul_gflops() -> float:
    """GFLOP/s of float32 products of 1024 x 1024; the best of several, so that other work on the machine counts for
    little. Compiles one graph; the process that trains is better another one."""
    keep_freed_memory()
    left, right = (torch.randn(SIZE, SIZE).div(SIZE**0.5).to(torch_xla.device()) for _ in range(2))
    torch_xla.sync(wait=True)
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        product = left
        for _ in range(PRODUCTS):
            product = product @ right
        product.sum().item()  # waits for it; `sync` doesn't on a CPU
        times.append(time.perf_counter() - started)
    return PRODUCTS * 2 * SIZE**3 / min(times) / 1e9


if __name__ == "__main__":
    print(matmul_gflops())
