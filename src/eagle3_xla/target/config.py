"""The settings of the target."""

from dataclasses import dataclass

from eagle3_xla.settings import setting


@dataclass
class TargetConfig:
    path: str = setting("", free=True)  # folder, gs:// URL or hub id of a Hugging Face causal LM
    dtype: str = setting("bfloat16", among=("float32", "bfloat16"))  # of the target's weights and states
