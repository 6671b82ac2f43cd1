"""The settings of the head's shape."""

from dataclasses import dataclass

from eagle3_xla.settings import setting


@dataclass
class DraftConfig:
    # eagle3.1: aux states are normed before fc, the normed state is fed back (docs/serving.md: which engines serve it)
    variant: str = setting("eagle3", among=("eagle3", "eagle3.1"))
    # positions that the head sees, its own included (a sliding window); 0: the whole context
    window: int = setting(0, within="[0, inf)")
    # attention heads of the head's layer, a divisor of the hidden size; 0: as many as the target's layers have
    attention_heads: int = setting(0, within="[0, 1024]")
    key_value_heads: int = setting(0, within="[0, 1024]")  # a divisor of attention_heads; 0: as many as the target has
    head_dim: int = setting(0, within="[0, 1024]")  # even; 0: the target's
    qk_norm: bool = False  # RMSNorm of each attention head's query and key, as in Qwen3; vLLM alone serves it
