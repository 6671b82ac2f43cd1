"""Quantised checkpoints: what is read, tensor by tensor, into the target's own dtype, and what is not.

A head is trained on the weights that are served, so FP8 and MXFP4 are dequantised, not replaced. The engines' kernels
also round activations to FP8 or BF16; that is within what bfloat16 training sees anyway.
"""

import torch

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
ORIGINAL = "take the bfloat16 original that it was made from"


def refusal(quantization: dict) -> str | None:
    """Why a checkpoint with this `quantization_config` is not read."""
    method = quantization.get("quant_method")
    if not quantization or method in ("fp8", "mxfp4"):
        return None
    if method == "compressed-tensors":
        if (quantization.get("transform_config") or {}) not in ({}, {"config_groups": {}}):
            return f"compressed-tensors with rotations in the forward pass (transform_config) is not read; {ORIGINAL}"
        for group in quantization.get("config_groups", {}).values():
            weights = group.get("weights") or {}
            kind = f"{weights.get('type')}{weights.get('num_bits')} weights in {weights.get('strategy')}s"
            whole = weights.get("strategy") in ("tensor", "channel", "block") and weights.get("symmetric", True)
            if (weights.get("type"), weights.get("num_bits")) != ("float", 8) or not whole:
                return f"compressed-tensors with {kind}; FP8 by tensor, channel or block is read, so {ORIGINAL}"
        return None
    known = {"gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes"}.get(str(method), method)
    return f"its weights are quantised by {known}, which is not read here; {ORIGINAL}"


def block_of(quantization: dict) -> tuple[int, int]:
    """Rows and columns that share a scale where `weight_scale_inv` or a block strategy has one for each block."""
    groups = quantization.get("config_groups", {}).values()
    blocks = [quantization.get("weight_block_size"), *((g.get("weights") or {}).get("block_structure") for g in groups)]
    return tuple(next((block for block in blocks if block), (128, 128)))


def scaled_fp8(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """weight [O, I] float8; scale: one, [O, 1], or one for each block -> float32."""
    scale = scale.float()
    blocks = tuple(-(-size // of) for size, of in zip(weight.shape, block))
    if scale.numel() > 1 and scale.shape == blocks and scale.shape != (weight.shape[0], 1):
        scale = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        scale = scale[: weight.shape[0], : weight.shape[1]]
    elif scale.numel() > 1:
        scale = scale.view(weight.shape[0], 1)
    return weight.float() * scale


def from_mxfp4(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """gpt-oss's experts: blocks [E, out, in/32, 16] uint8 of two 4-bit floats each, scales [E, out, in/32] uint8
    exponents -> [E, in, out], as its modules multiply."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(blocks, scales, dtype=dtype, rows_per_chunk=2**20).cpu()
