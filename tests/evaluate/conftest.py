"""The head of tests/conftest.py with its target."""

import pytest
import torch

from eagle3_xla.data.vocab import draft_ids_of
from eagle3_xla.draft.saved import load_head
from eagle3_xla.target.model import Target, load_target


@pytest.fixture(scope="session")
def small_pair(trained, small_target):
    """The small target, its head, d2t."""
    head, d2t = load_head(trained)
    return Target(load_target(str(small_target), torch.float32), draft_ids_of(d2t)), head, d2t
