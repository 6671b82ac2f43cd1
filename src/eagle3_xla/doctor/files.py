"""A head's and a target's folders as they are, before any library fills in what is missing."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from eagle3_xla.config import UserError
from eagle3_xla.data.tokenizer import load_config
from eagle3_xla.export import RECORD

NUMBERS = (
    "vocab_size",
    "draft_vocab_size",
    "hidden_size",
    "target_hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rope_theta",
    "rms_norm_eps",
)
MAPPINGS = ("eagle_config", "rope_parameters", "rope_scaling")


@dataclass
class Finding:
    """status: pass | warn | fail. fix: fields of config.json to set (None: to drop) when that is safe."""

    rule: str
    status: str
    message: str
    fix: dict | None = None


@dataclass
class Head:
    """config: config.json. tensors: by name. record: how an exported head of ours was trained, else None.

    problem: why the weights can't be read, else None.
    """

    folder: Path
    config: dict
    tensors: dict[str, torch.Tensor]
    record: dict | None
    problem: str | None

    def shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self.tensors[name].shape) if name in self.tensors else None


@dataclass
class Target:
    """config: Hugging Face config; folder: None for a hub id."""

    name: str
    config: object
    folder: Path | None

    @property
    def head_dim(self) -> int:
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads


def read_head(folder: Path) -> Head:
    """Raises UserError when there is no head at all, or no config.json that can be read."""
    folder = Path(folder)
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"no head at {folder} (config.json is expected)")
    try:
        config = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{file} is not a JSON object")
    for fields, kind, name in ((NUMBERS, int | float, "a number"), (MAPPINGS, dict, "a mapping")):
        for field in fields:
            if config.get(field) is not None and not isinstance(config[field], kind):
                raise UserError(f"{file}: {field} is {config[field]!r}; {name} is expected")
    tensors, record, problem = _read_weights(folder)
    return Head(folder, config, tensors, record, problem)


def read_target(path: str) -> Target:
    return Target(path, load_config(path), Path(path) if Path(path).is_dir() else None)


def _read_weights(folder: Path) -> tuple[dict, dict | None, str | None]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = [file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern)]
        found = f"only {', '.join(pickled)}, which sglang-jax can't read" if pickled else "none is there"
        return {}, None, f"weights in *.safetensors are expected and {found}; save them by safetensors.torch.save_file"
    if len(files) > 1 and not (folder / "model.safetensors.index.json").is_file():
        names = ", ".join(file.name for file in files)
        return {}, None, f"several weight files ({names}): engines load them all over one another; keep one"
    tensors, record = {}, None
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                tensors |= {name: opened.get_tensor(name) for name in opened.keys()}
                record = json.loads((opened.metadata() or {}).get(RECORD, "null")) or record
        except (SafetensorError, json.JSONDecodeError) as error:
            return {}, None, f"{file.name} is damaged ({error}); export or download it again"
    return tensors, record, None
