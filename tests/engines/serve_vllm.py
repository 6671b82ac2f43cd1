"""vLLM's OpenAI server whose engine is a fork of it: python serve_vllm.py [its own arguments]

On a CPU vLLM spawns that process, because of OpenMP's threads (vllm/platforms/cpu.py), and it imports everything once
more. With one thread nothing is lost in a fork.
"""

import multiprocessing
import os
import runpy
import sys

import vllm.utils.system_utils as system

if __name__ == "__main__":
    if os.environ["OMP_NUM_THREADS"] == "1":
        system.get_mp_context = lambda: multiprocessing.get_context("fork")  # before others import it by name
    sys.argv[0] = "vllm.entrypoints.openai.api_server"
    runpy.run_module(sys.argv[0], run_name="__main__")
