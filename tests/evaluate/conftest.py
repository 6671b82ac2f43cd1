"""A small head that its random target accepts often."""

import pytest
import torch

from eagle3_xla.config import load_recipe
from eagle3_xla.data.prepare import prepare
from eagle3_xla.data.vocab import draft_ids_of
from eagle3_xla.draft.saved import load_head
from eagle3_xla.export import export
from eagle3_xla.target.model import Target, load_target
from eagle3_xla.train.loop import train


@pytest.fixture(scope="session")
def trained(small_run_in, tmp_path_factory):
    """Its exported folder."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = load_recipe(None, [*small_run_in(folder), "train.epochs=12", "train.lr=3e-3", "data.draft_vocab_size=256"])
    prepare(recipe)
    train(recipe)
    export(folder / "run", folder / "head", "float32")
    return folder / "head"


@pytest.fixture(scope="session")
def small_pair(trained, small_target):
    """The small target, its head, d2t."""
    head, d2t = load_head(trained)
    return Target(load_target(str(small_target), torch.float32), draft_ids_of(d2t)), head, d2t
