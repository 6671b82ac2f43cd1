"""A trained head of the quickstart, and the engines' servers with it."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from engines.servers import Running, serve

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


@pytest.fixture(scope="session")
def server_of(trained, tmp_path_factory) -> Callable[[str], Running]:
    """An engine's server with the head, started when it is first asked for, and again once a test has killed it."""
    servers: dict[str, Running] = {}
    with contextlib.ExitStack() as running:

        def get(engine: str) -> Running:
            if engine not in servers or servers[engine].process.poll() is not None:
                log = tmp_path_factory.mktemp("served") / f"{engine}.log"
                servers[engine] = running.enter_context(serve(engine, trained.target, trained.head, log=log))
            return servers[engine]

        yield get
