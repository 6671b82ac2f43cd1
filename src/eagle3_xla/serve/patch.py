"""`patch check|apply|revert`: set_eagle3_layers_to_capture() for engines whose Qwen2 lacks it.

A patch of patches/ changes one file of one engine and is what `git apply` takes in a checkout. Here it is applied to a
copy, and the copy takes the file's place in one step: an engine is never half patched, and a file that shares its
bytes with a package cache (hard or symbolic links) leaves the cache as it was.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from eagle3_xla import storage
from eagle3_xla.errors import UserError

MODEL = "srt/models/qwen2.py"
METHOD = "def set_eagle3_layers_to_capture("
OURS = "(eagle3-xla)"  # in the docstring of the method that the patches add


@dataclass(frozen=True)
class Engine:
    name: str  # on the package index and for --engine
    package: str
    patch: str
    releases: str  # which ones need the patch and which don't; the tests hold it to the real releases


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(
            "sglang",
            "sglang",
            "sglang-qwen2.patch",
            "the patch is for SGLang 0.4.9 to 0.5.1.post3, and 0.5.2 and later need none",
        ),
        Engine(
            "sglang-jax",
            "sgl_jax",
            "sglang-jax-qwen2.patch",
            "the patch is for sglang-jax's source tree at cddbf6f1; no release on PyPI has EAGLE3",
        ),
    )
}


def patch(action: str, engine: str | None = None, path: str | None = None) -> dict:
    """check, apply or revert. engine: default, the one that is there. path: a checkout, a site-packages folder or a
    virtual environment; default, what is installed beside this program.

    Returns engine, version, status (needed | native | applied | unknown), file, message. Raises UserError when no
    engine is there, or when apply or revert doesn't fit it.
    """
    found, package = _locate(engine, path)
    file = package / MODEL
    version = _version(found, package)
    source = file.read_bytes()
    status, changed = _status(found, source)
    about = f"{found.name} {version} at {package}"
    given = f" --path {path}" if path else ""
    if action == "check":
        message = {
            "needed": f"its Qwen2 lacks set_eagle3_layers_to_capture(); `eagle3-xla patch apply{given}` adds it",
            "native": "its Qwen2 takes EAGLE3 heads as it is; nothing to do",
            "applied": "patched",
            "unknown": f"the patch doesn't fit its {MODEL}; {found.releases}",
        }[status]
    elif status == "unknown":
        raise UserError(f"{about}: the patch doesn't fit its {MODEL}, nothing was changed; {found.releases}")
    elif (action, status) in {("apply", "needed"), ("revert", "applied")}:
        assert changed is not None
        _replace(file, changed)
        status = "applied" if action == "apply" else "needed"
        message = "patched" if action == "apply" else "the patch is taken back"
    else:
        message = {"native": "has it by itself, nothing to do", "applied": "patched already"}.get(status, "not patched")
    return {
        "engine": found.name,
        "version": version,
        "status": status,
        "file": str(file),
        "message": message,
        "screen": f"{about}: {status}: {message}" if action == "check" else f"{about}: {message}",
    }


def patch_file(name: str) -> Path:
    """A file of patches/: in the repository, or among the data files of the installed package."""
    places = [
        Path(__file__).parents[3] / "patches" / name,
        Path(__file__).parents[2] / "share" / "eagle3-xla" / "patches" / name,  # pip install --target
    ]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        files = importlib.metadata.files("eagle3-xla") or ()
        places += [Path(file.locate()) for file in files if file.name == name]
    for place in places:
        if place.is_file():
            return place
    raise UserError(f"{name} is neither beside this program nor among its installed files; install eagle3-xla again")


def _locate(name: str | None, path: str | None) -> tuple[Engine, Path]:
    if name is not None and name not in ENGINES:
        raise UserError(f"--engine {name}: choose one of {', '.join(ENGINES)}")
    if path is not None and not Path(path).is_dir():
        raise UserError(f"--path {path}: no such folder")
    wanted = [ENGINES[name]] if name else list(ENGINES.values())
    found = [(engine, package) for engine in wanted if (package := _package(engine.package, path))]
    if not found:
        engines = " or ".join(engine.name for engine in wanted)
        where = f"in {path}" if path else "installed here"
        hint = (
            "a checkout, a virtual environment or a site-packages folder is expected" if path else "name it by --path"
        )
        raise UserError(f"no {engines} {where} ({MODEL} of its package is looked for); {hint}")
    if len(found) > 1:
        raise UserError(f"both engines are there; say --engine {' or --engine '.join(ENGINES)}")
    return found[0]


def _package(package: str, path: str | None) -> Path | None:
    """The package's folder with its qwen2.py."""
    if path is None:
        spec = importlib.util.find_spec(package)
        places = [Path(place) for place in spec.submodule_search_locations or ()] if spec else []
    else:
        root = Path(path).absolute()
        places = [root / "python" / package, root / package, *root.glob(f"lib/python3*/site-packages/{package}")]
        places += [root] if root.name == package else []
    return next((place for place in places if (place / MODEL).is_file()), None)


def _version(engine: Engine, package: Path) -> str:
    """From the package's metadata beside it, its own version file, or its checkout's tags."""
    for distribution in importlib.metadata.distributions(name=engine.name, path=[str(package.parent)]):
        return distribution.version
    for name in ("version.py", "_version.py"):
        text = (package / name).read_text() if (package / name).is_file() else ""
        if match := re.search(r"^(?:__version__|version)\b.*=\s*[\"']([^\"']+)[\"']", text, re.MULTILINE):
            return match[1]
    checkout = package.parent.parent
    if (checkout / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(checkout), "describe", "--tags", "--always"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
    return "unknown"


def _status(engine: Engine, source: bytes) -> tuple[str, bytes | None]:
    """The status of a qwen2.py, and what apply (needed) or revert (applied) makes of it."""
    text = source.decode(errors="replace")
    if METHOD in text and OURS not in text:
        return "native", None
    if (reverted := _git_apply(engine, source, "--reverse")) is not None:
        return "applied", reverted
    if (applied := _git_apply(engine, source)) is not None:
        return "needed", applied
    return "unknown", None


def _git_apply(engine: Engine, source: bytes, *options: str) -> bytes | None:
    """qwen2.py after the patch, or None when the patch doesn't fit in every hunk."""
    if not shutil.which("git"):
        raise UserError("git is needed to read patches, and it is not installed")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "python" / engine.package / MODEL
        file.parent.mkdir(parents=True)
        file.write_bytes(source)
        # A repository around the temporary folder, or its settings, must not change what `git apply` does.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
        environment |= {"GIT_CEILING_DIRECTORIES": str(Path(folder).resolve().parent)}
        environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        command = ["git", "apply", *options, str(patch_file(engine.patch))]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True)
        return file.read_bytes() if done.returncode == 0 else None


def _replace(file: Path, content: bytes) -> None:
    """The file's content, in one step; its mode stays."""
    with storage.whole_file(file) as partial:
        partial.write_bytes(content)
        shutil.copymode(file, partial)
