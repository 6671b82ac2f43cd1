"""How malloc treats what a step on the CPU frees and takes again a moment later."""

import ctypes
import platform

# glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Keep what is freed, in one arena that all threads share: no tensor is mapped for itself, and nothing is given
    back, however much of it lies free at the end. Else each step takes its gigabytes anew, and the kernel clears them
    page by page (benchmarks/README.md).
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1)):
            libc.mallopt(option, value)
