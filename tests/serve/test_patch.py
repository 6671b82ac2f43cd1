"""The patches on the real releases' own files, taken from their wheels."""

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from eagle3_xla.errors import UserError
from eagle3_xla.serve.patch import ENGINES, MODEL, patch, patch_file

ROOT = Path(__file__).parents[2]
# patches/README.md names every release; these are the ones at the borders.
STATUS = {"0.4.8.post1": "unknown", "0.4.9": "needed", "0.5.1.post3": "needed", "0.5.2": "native"}


@pytest.fixture(scope="session")
def wheels(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wheels")
    for version in STATUS:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, f"sglang=={version}"]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return {version: next(folder.glob(f"sglang-{version}-*.whl")) for version in STATUS}


def unpack(wheel: Path, site_packages: Path) -> Path:
    """The wheel's qwen2.py and metadata as pip installs them; returns the file."""
    with zipfile.ZipFile(wheel) as archive:
        wanted = [name for name in archive.namelist() if name.endswith("METADATA") or name == f"sglang/{MODEL}"]
        archive.extractall(site_packages, wanted)
    return site_packages / "sglang" / MODEL


@pytest.mark.parametrize("version", STATUS)
def test_releases(wheels, version, tmp_path):
    file = unpack(wheels[version], tmp_path)
    os.chmod(file, 0o640)
    original = file.read_bytes()
    found = patch("check", path=str(tmp_path))
    assert (found["engine"], found["version"], found["status"]) == ("sglang", version, STATUS[version])
    if STATUS[version] == "unknown":
        with pytest.raises(UserError, match=r"SGLang 0\.4\.9 to 0\.5\.1\.post3, and 0\.5\.2 and later need none"):
            patch("apply", path=str(tmp_path))
    else:
        assert patch("apply", path=str(tmp_path))["status"] == ("applied" if STATUS[version] == "needed" else "native")
    if STATUS[version] != "needed":
        assert file.read_bytes() == original
        return
    patched = file.read_bytes()
    model = next(node for node in ast.parse(patched).body if getattr(node, "name", "") == "Qwen2ForCausalLM")
    assert "set_eagle3_layers_to_capture" in {getattr(node, "name", "") for node in model.body}
    assert patch("check", path=str(tmp_path))["status"] == "applied"
    assert patch("apply", path=str(tmp_path))["message"] == "patched already"
    assert file.read_bytes() == patched and file.stat().st_mode & 0o777 == 0o640
    assert patch("revert", path=str(tmp_path))["status"] == "needed"
    assert file.read_bytes() == original
    assert [path.name for path in file.parent.iterdir()] == ["qwen2.py"]


def test_a_checkout_and_git(wheels, tmp_path):
    """`git apply` in a checkout does what `patch apply` does."""
    file = unpack(wheels["0.5.1.post3"], tmp_path / "python")
    original = file.read_bytes()
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    subprocess.run(["git", "apply", ROOT / "patches" / "sglang-qwen2.patch"], cwd=tmp_path, check=True)
    by_git = file.read_bytes()
    assert patch("revert", "sglang", str(tmp_path))["status"] == "needed" and file.read_bytes() == original
    assert patch("apply", "sglang", str(tmp_path))["status"] == "applied" and file.read_bytes() == by_git


def test_links_to_a_cache(wheels, tmp_path):
    """Installers link files from a cache: the cache stays as it was."""
    cached = unpack(wheels["0.5.1.post3"], tmp_path / "cache")
    original = cached.read_bytes()
    for link in (os.link, os.symlink):
        file = tmp_path / link.__name__ / "sglang" / MODEL
        file.parent.mkdir(parents=True)
        link(cached, file)
        assert patch("apply", path=str(tmp_path / link.__name__))["status"] == "applied"
        assert cached.read_bytes() == original != file.read_bytes()


def test_a_write_that_fails(wheels, tmp_path):
    """A file that can't be written whole is not touched."""
    file = unpack(wheels["0.5.1.post3"], tmp_path)
    original = file.read_bytes()
    code = (
        "import pathlib, resource, sys\n"
        "from eagle3_xla.serve import patch\n"
        "file = pathlib.Path(sys.argv[1])\n"
        "status, content = patch._status(patch.ENGINES['sglang'], file.read_bytes())\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "patch._replace(file, content)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True)
    assert done.returncode == 1 and "File too large" in done.stderr
    assert file.read_bytes() == original and [path.name for path in file.parent.iterdir()] == ["qwen2.py"]


def test_edited_by_hand(wheels, tmp_path):
    file = unpack(wheels["0.5.1.post3"], tmp_path)
    patch("apply", path=str(tmp_path))
    edited = file.read_bytes().replace(b"num_layers - 3]", b"num_layers - 4]")
    file.write_bytes(edited)
    assert patch("check", path=str(tmp_path))["status"] == "unknown"
    with pytest.raises(UserError, match="nothing was changed"):
        patch("revert", path=str(tmp_path))
    assert file.read_bytes() == edited


def test_command_line(cli, wheels, tmp_path):
    (tmp_path / "none").mkdir()
    for arguments, part in (
        (["check"], "no sglang or sglang-jax installed here"),
        (["apply", "--path", tmp_path / "none"], "a checkout, a virtual environment or a site-packages folder"),
        (["check", "--path", tmp_path / "nowhere"], "nowhere: no such folder"),
        (["check", "--engine", "vllm"], "--engine vllm: choose one of sglang, sglang-jax"),
    ):
        done = cli("patch", *arguments)
        assert done.returncode == 2 and part in done.stderr and done.stderr.count("\n") == 1, done.stderr
    site_packages = tmp_path / "environment" / "lib" / "python3.11" / "site-packages"
    unpack(wheels["0.5.1.post3"], site_packages)
    done = cli("patch", "check", "--path", tmp_path / "environment", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "needed"
    shutil.copytree(site_packages / "sglang", site_packages / "sgl_jax")
    done = cli("patch", "check", "--path", tmp_path / "environment")
    assert done.returncode == 2 and "both engines are there; say --engine" in done.stderr


def test_an_installed_wheel_brings_the_patches(installed_wheel, tmp_path):
    """Built, installed elsewhere, started without this repository."""
    (wheel,) = installed_wheel.parent.glob("dist/eagle3_xla-*.whl")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    prefix = tmp_path / "prefix"
    subprocess.run([*pip, "install", "--no-deps", "--ignore-installed", "--prefix", prefix, wheel], check=True)
    for place in (prefix, installed_wheel):  # the other one is `--target`'s
        package = next(place.rglob("eagle3_xla"))
        code = "from eagle3_xla.serve.patch import *; [print(patch_file(engine.patch)) for engine in ENGINES.values()]"
        environment = os.environ | {"PYTHONPATH": str(package.parent)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=place, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for engine, installed in zip(ENGINES.values(), done.stdout.split()):
            assert Path(installed).resolve().is_relative_to(place)
            assert Path(installed).read_bytes() == (ROOT / "patches" / engine.patch).read_bytes()


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_one_file_each(engine):
    """What makes one os.replace enough."""
    text = patch_file(engine.patch).read_text()
    changed = [line for line in text.splitlines() if line.startswith("+++ ")]
    assert changed == [f"+++ b/python/{engine.package}/{MODEL}"]
