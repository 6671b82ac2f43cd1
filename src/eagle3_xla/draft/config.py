"""The settings of the head's shape."""

from dataclasses import dataclass

from eagle3_xla.settings import setting


@dataclass
class DraftConfig:
    # eagle3.1: aux states are normed before fc, the normed state is fed back (docs/serving.md: which engines serve it)
    variant: str = setting("eagle3", among=("eagle3", "eagle3.1"))
