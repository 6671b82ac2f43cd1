"""How fast matrices are multiplied on this machine's processor: by XLA in float32, by torch in bfloat16."""

import sys
import time

import torch

from eagle3_xla.xla.memory import keep_freed_memory

SIZE, PRODUCTS, REPEATS = 1024, 4, 40


def matmul_gflops(bfloat16: bool) -> float:
    """GFLOP/s of products of 1024 x 1024; the best of several, so that other work on the machine counts for little.
    In float32 it compiles one graph; the process that trains is better another one."""
    keep_freed_memory()
    left, right = (torch.randn(SIZE, SIZE).div(SIZE**0.5) for _ in range(2))
    if bfloat16:
        left, right = left.bfloat16(), right.bfloat16()
    else:
        import torch_xla

        left, right = left.to(torch_xla.device()), right.to(torch_xla.device())
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
    print(matmul_gflops(sys.argv[1:] == ["bfloat16"]))
