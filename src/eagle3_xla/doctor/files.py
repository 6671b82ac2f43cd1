"""A target's folder as it is, before any library fills in what is missing, and what a rule finds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagle3_xla.data.tokenizer import load_config, small_files


@dataclass
class Finding:
    """status: pass | warn | fail. fix: fields of config.json to set (None: to drop) when that is safe."""

    rule: str
    status: str
    message: str
    fix: dict | None = None


@dataclass
class Target:
    """config: Hugging Face config; folder: of a URL or a hub id one of this machine, without what wasn't fetched."""

    name: str
    config: Any
    folder: Path

    @property
    def head_dim(self) -> int:
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads


def read_target(path: str) -> Target:
    return Target(path, load_config(path), Path(small_files(path)))
