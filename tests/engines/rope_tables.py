"""An engine's own cos and sin of every position, run by its Python: rope_tables.py sglang|vllm JOB.json OUT.safetensors

JOB: {"head_dim": n, "longest": n, "theta": x, "scalings": [rope_scaling, ..]}; OUT: tables "0", "1", .. [positions,
head_dim], cos before sin.
"""

import json
import sys

import torch
from safetensors.torch import save_file


def tables(engine: str, head_dim: int, longest: int, theta: float, scalings: list[dict]):
    if engine == "sglang":
        from sglang.srt.layers.rotary_embedding import get_rope

        for scaling in scalings:
            yield get_rope(head_dim, head_dim, longest, theta, True, scaling, torch.float32).cos_sin_cache
        return
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    with set_current_vllm_config(VllmConfig()):
        for scaling in scalings:
            yield get_rope(head_dim, longest, True, scaling | {"rope_theta": theta}, torch.float32).cos_sin_cache


if __name__ == "__main__":
    engine, job, out = sys.argv[1:]
    with open(job) as file:
        made = tables(engine, **json.load(file))
    save_file({str(i): table.contiguous() for i, table in enumerate(made)}, out)
