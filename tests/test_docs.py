"""The documentation: it builds, its pages are those of the code, and every command in it is one that works.

A command is dry-run where it can be (launch/*.sh); the command line's are parsed and their settings resolved; of
other programs the options are compared with those that the program is known to have.
"""

import ast
import html
import json
import os
import re
import shlex
import subprocess
import sys
from itertools import repeat
from pathlib import Path

import pytest

from eagle3_xla.arguments import parser
from eagle3_xla.cli import _overrides
from eagle3_xla.config import load_recipe
from eagle3_xla.explain import settings, source_settings
from eagle3_xla.guide import EXAMPLES

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "patches/README.md",
]
LONG = "launch/quickstart.sh launch/test.sh tests/engines/environments.sh".split()  # scripts without a dry run
# Options of Google's commands, from their reference (cloud.google.com/sdk/gcloud/reference).
GCLOUD = {
    "auth login": "",
    "auth application-default login": "",
    "projects create": "",
    "config set": "",
    "billing projects link": "--billing-account",
    "services enable": "",
    "storage buckets create": "--location",
    "storage buckets add-iam-policy-binding": "--member --role",
    "storage cp": "--recursive",
    "compute tpus queued-resources create": "--node-id --zone --accelerator-type --runtime-version --spot",
    "compute tpus queued-resources describe": "--zone",
    "compute tpus queued-resources delete": "--zone --force --quiet",
    "compute tpus tpu-vm ssh": "--zone --worker --command",
    "compute tpus tpu-vm list": "--zone",
}
SGLANG = """--model-path --speculative-algorithm --speculative-draft-model-path --speculative-num-steps
--speculative-eagle-topk --speculative-num-draft-tokens --dtype""".split()


NEEDED = {
    "prepare": ("target.path", "data.train", "data.prepared"),
    "train": ("target.path", "data.prepared", "train.out"),
    "plan": ("target.path",),
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands() -> list[tuple[str, str]]:
    """(page, command line) of every ```bash block and of every example in the verbs' help."""
    examples = [(verb, line.strip()) for verb, text in EXAMPLES.items() for line in text.splitlines() if line.strip()]
    found = [(f"{verb} --help", re.split(r" {3,}", line)[0]) for verb, line in examples]
    for page in PAGES:
        for block in blocks(page, "bash"):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page.name, " ".join(line.split())) for line in lines if line.strip() and line.strip()[0] != "#"]
    return found


def words_of(line: str) -> list[str]:
    words = shlex.split(line, comments=True)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):  # NAME=value before the command
        words = words[1:]
    return words[: words.index(">")] if ">" in words else words


def check(words: list[str], line: str) -> None:
    program, *rest = words
    program = program.removeprefix(".venv/bin/")
    if program == "bash":
        script = next(word for word in rest if word != "-x")
        assert (ROOT / script).is_file(), f"no {script}"
        if script == "launch/quickstart.sh":
            parser().parse_args(["quickstart", *rest[1:]])
        elif script not in LONG:
            done = subprocess.run(
                ["bash", script, "--dry-run", *rest[1:]], capture_output=True, text=True, cwd=ROOT, timeout=60
            )
            assert done.returncode == 0, done.stderr
            for printed in map(shlex.split, done.stdout.splitlines()):
                if "eagle3_xla" in printed and "train" in printed:
                    check(["eagle3-xla", *printed[printed.index("train") :]], line)
    elif program == "eagle3-xla":
        options, overrides = parser().parse_known_args(rest)
        overrides = _overrides(overrides, options)
        named = [
            getattr(options, "config", None),
            getattr(options, "show", None),
            *(getattr(options, "diff", None) or []),
        ]
        for recipe in map(load_recipe, filter(lambda name: isinstance(name, str), named), repeat(overrides)):
            for setting in NEEDED.get(options.verb, ()):
                section, key = setting.split(".")
                assert getattr(getattr(recipe, section), key), f"{setting} is empty"
    elif program == "gcloud":
        command = next(name for name in GCLOUD if rest[: len(name.split())] == name.split())
        used = {word.partition("=")[0] for word in rest if word.startswith("--")}
        assert used <= set(GCLOUD[command].split()), used
    elif program == "pip" or words[:4] == ["python", "-m", "pip", "install"]:
        extras = (ROOT / "setup.cfg").read_text().partition("[options.extras_require]")[2]
        for name in re.findall(r"\[(\w+)\]", " ".join(rest)):
            assert f"\n{name} =\n" in extras, f"no extra {name}"
    elif words[:3] == ["python", "-m", "sglang.launch_server"]:
        assert {word for word in rest if word.startswith("--")} <= set(SGLANG)
        assert "--dtype" in rest, "SGLang chooses one for the target and one for the head"
    elif words[:2] == ["vllm", "serve"]:
        assert json.loads(rest[rest.index("--speculative-config") + 1])["method"] == "eagle3"
    elif program == "python" and rest[0].endswith(".py"):
        assert (ROOT / rest[0]).is_file()
    elif program == "torchrun":
        check(["eagle3-xla", *rest[rest.index("eagle3_xla") + 1 :]], line)
    elif program in ("source", "git", "mkdocs", "docker", ".", "eval"):
        pass
    else:
        raise AssertionError(f"{program} is not known here")


def test_every_command(tmp_path, monkeypatch):
    [recipe] = blocks(ROOT / "docs/data.md", "yaml")
    (tmp_path / "my-recipe.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    found, wrong = commands(), []
    assert len(found) > 60
    for page, line in found:
        try:
            check(words_of(line), line)
        except (AssertionError, Exception) as error:
            wrong.append(f"{page}: {line}\n  {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


def test_python_yaml_and_links(tmp_path):
    for page in PAGES:
        for block in blocks(page, "python"):
            ast.parse(block)
        for number, block in enumerate(blocks(page, "yaml")):
            recipe = tmp_path / f"{page.stem}-{number}.yaml"
            recipe.write_text(block)
            load_recipe(str(recipe), [])
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name}: {link}"
        for path in re.findall(r"`((?:src|tests|docs|launch|benchmarks|patches)/[\w./-]+\.\w+)`", page.read_text()):
            assert (ROOT / path).exists(), f"{page.name}: {path}"
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_every_setting_says_what_it_means():
    """A comment beside the field or above it, which is that field's alone."""
    found = settings() + source_settings()
    assert not [setting.name for setting in found if not setting.meaning]
    meanings = {setting.name: setting.meaning for setting in found}
    assert meanings["data.heldout_share"] == "of the training conversations, when there is no heldout source"
    assert meanings["data.prepared"] == "folder (or gs:// URL) that `prepare` writes and `train` reads"


@pytest.fixture
def docs_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))


def test_pages_are_those_of_the_code(docs_on_path, monkeypatch):
    import generate

    monkeypatch.setenv("COLUMNS", "100")
    for name, content in generate.pages().items():
        assert (ROOT / "docs" / name).read_text() == content, f"docs/{name} is old: run python docs/generate.py"


def test_the_quickstart_has_the_same_figures_everywhere(docs_on_path):
    import figures

    screen = html.unescape(re.sub("<[^>]+>", "", (ROOT / "docs/quickstart.svg").read_text())).replace("\xa0", " ")
    tau, shares = re.search(r"trained head +([\d.]+) +((?:[\d.]+% *)+)", screen).groups()
    assert [f"{share:.1%}" for share in figures.SMALL] == shares.split()
    assert f"quickstart head: tau {tau}<" in (ROOT / "docs/figures/acceptance.svg").read_text()
    before = re.search(r"before training +([\d.]+)", screen)[1]
    tree = re.search(r"deep: acceptance length tau ([\d.]+)", screen)[1]
    caption = f"acceptance length {before} before training, {tau} after it, {tree} as a tree"
    assert caption in (ROOT / "README.md").read_text()


def test_it_builds_without_warnings_and_its_figures_are_drawn(docs_on_path, tmp_path):
    import figures

    figures.draw(tmp_path / "figures")
    drawn = {file.name for file in (tmp_path / "figures").iterdir()}
    assert drawn == {file.name for file in (ROOT / "docs" / "figures").iterdir()}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr
    assert (tmp_path / "site" / "tpu" / "index.html").is_file()
