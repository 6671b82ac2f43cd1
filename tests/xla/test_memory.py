"""What is freed stays: the kernel has no page to clear when it is taken again."""

import resource
import subprocess
import sys

CHILD = """
import ctypes, resource, sys
from eagle3_xla.xla.memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: no huge pages, a fault for each small one
size, touched = 9 * 2**28, 2**26  # more than the 2 GiB that a threshold of an int could name
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory = libc.malloc(size)
    ctypes.memset(memory, 1, touched)
    libc.free(memory)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_gigabytes_that_are_freed_are_taken_again_without_a_page_fault():
    faults = {
        way: int(subprocess.run([sys.executable, "-c", CHILD, way], check=True, capture_output=True).stdout)
        for way in ("kept", "given back")
    }
    assert faults["kept"] < 100 < 2**26 // resource.getpagesize() <= faults["given back"]
