"""Configs of well-known targets, so that a plan needs neither weights nor a hub."""

from importlib import resources
from pathlib import Path
from typing import Any

from eagle3_xla.target.families import load_target_config


def plan_config(path: str) -> Any:
    """The Hugging Face config of a folder, a URL (config.json is enough) or a hub id; raises UserError for none.

    Hub ids whose config ships in target/configs/, as OWNER--NAME, are read from there.
    """
    shipped = Path(str(resources.files("eagle3_xla.target") / "configs")) / path.replace("/", "--")
    if path.count("/") == 1 and not Path(path).exists() and shipped.is_dir():
        return load_target_config(str(shipped))
    return load_target_config(path)
