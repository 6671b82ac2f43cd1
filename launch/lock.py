"""Writes launch/requirements.lock: what is installed here of the package's needs and theirs, with exact versions.

    .venv/bin/python launch/lock.py [--check]

--check: says what in setup.cfg the lock file does not satisfy, and exits 1 if anything. The extras that are locked are
`plan` (jax, libtpu) and `dev`: pip install --requirement launch/requirements.lock && pip install --no-deps .
"""

import configparser
import platform
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "launch" / "requirements.lock"
EXTRAS = ("plan", "dev")  # `tpu` is torch_xla with a libtpu, which `plan` pins


def wanted() -> list[Requirement]:
    """Requirements in setup.cfg, extras included."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    texts = [config["options"]["install_requires"]]
    texts += [config["options.extras_require"][extra] for extra in EXTRAS]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def locked() -> dict[str, str]:
    """Name -> version in the file."""
    lines = [line.partition("#")[0].strip() for line in LOCK.read_text().splitlines()]
    return dict(line.split("==") for line in lines if line)


def installed(requirements: list[Requirement]) -> dict[str, str]:
    """Name -> version of all that these need here, and what that needs, and so on."""
    found: dict[str, str] = {}
    queue, asked = list(requirements), set()
    while queue:
        requirement = queue.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in asked:
            continue
        asked.add((name, extras))
        try:
            distribution = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            raise SystemExit(f"{requirement} is needed but not installed here") from None
        found[name] = distribution.version
        for needed in map(Requirement, distribution.requires or []):
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                queue.append(needed)
    return found


def complaints() -> list[str]:
    """What setup.cfg wants and the lock file doesn't give."""
    versions, wrong = locked(), []
    for requirement in wanted():
        version = versions.get(canonicalize_name(requirement.name))
        if version is None:
            wrong.append(f"{requirement.name} is in setup.cfg and not in the lock file")
        elif not requirement.specifier.contains(version.partition("+")[0], prereleases=True):
            wrong.append(f"setup.cfg wants {requirement}, the lock file has {version}")
    return wrong


if __name__ == "__main__":
    if sys.argv[1:] != ["--check"]:
        pins = sorted(installed(wanted()).items())
        heading = f"# Python {platform.python_version()}, Linux x86-64; written by launch/lock.py\n"
        LOCK.write_text(heading + "".join(f"{name}=={version}\n" for name, version in pins))
    for line in complaints():
        print(line)
    sys.exit(bool(complaints()))
