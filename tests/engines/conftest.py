"""A trained head of the quickstart, and what our own decoding says about it."""

from pathlib import Path
from typing import NamedTuple

import pytest

PROMPTS = "package:heldout.jsonl"


class Trained(NamedTuple):
    target: Path
    head: Path


@pytest.fixture(scope="session")
def trained(request) -> Trained:
    """--quickstart DIR, else the run that tests/test_quickstart.py checks."""
    folder = request.config.getoption("--quickstart")
    if folder is None:
        done, folder = request.getfixturevalue("quickstart_run")
        assert done.returncode == 0, done.stderr[-3000:]
    return Trained(folder / "target", folder / "head")
