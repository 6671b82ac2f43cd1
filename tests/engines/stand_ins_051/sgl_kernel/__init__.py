"""Takes the place of SGLang 0.5.1.post3's CUDA kernels on a CPU: names to import, none of which is ever called."""

import torch

if not hasattr(torch._C._cpu, "_is_amx_tile_supported"):  # gone after torch 2.8
    torch._C._cpu._is_amx_tile_supported = lambda: False


def __getattr__(name):
    return None
