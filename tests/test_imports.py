"""Imports go one way, and only xla/ knows torch_xla."""

import ast
import subprocess
import sys
from pathlib import Path

import eagle3_xla

ROOT = Path(eagle3_xla.__file__).parent
ORDER = [
    "storage",
    "local_copies",
    "errors",
    "processes",
    "settings",
    "config",
    "checks",
    "hub",
    "outputs",
    "data",
    "target",
    "regenerate",
    "draft",
    "loss",
    "xla",
    "checkpoint",
    "train",
    "plan",
    "export",
    "doctor",
]
ORDER += ["evaluate", "serve", "machine", "live", "quickstart", "explain", "guide", "arguments", "cli"]


def imports_of(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_imports_go_one_way():
    """A package's config.py stands above errors and settings, below everything else; config.py puts them together."""
    files = [
        file for file in ROOT.rglob("*.py") if file.name not in ("__init__.py", "__main__.py") or file.parent != ROOT
    ]
    assert len(files) > 20
    for file in files:
        own = file.relative_to(ROOT).parts[0].removesuffix(".py")
        for name in imports_of(file):
            parts = name.split(".")
            if parts[0] == "torch_xla":
                assert own == "xla", f"{file} imports torch_xla"
            if parts[0] != "eagle3_xla" or parts[1:2] == ["__version__"] or len(parts) < 2:
                continue
            other = parts[1]
            if file.name == "config.py":
                of_a_package = file.parent == ROOT and parts[2:3] == ["config"]
                assert other in ("errors", "settings") or of_a_package, f"{file} imports {name}"
            elif other != own:
                assert ORDER.index(other) < ORDER.index(own), f"{file} imports {name}"


def test_the_plain_path_needs_no_torch_xla(tmp_path):
    """A machine without torch_xla: what the CPU backend needs imports, and it works."""
    (tmp_path / "torch_xla.py").write_text("raise ImportError('not installed here')")
    code = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name.startswith('torch_xla') else find(name, *a)\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "import eagle3_xla.quickstart\n"
        "from eagle3_xla.errors import UserError\n"
        "from eagle3_xla.xla.backend import make_backend\n"
        "from eagle3_xla.xla.config import XlaConfig\n"
        "print(make_backend(XlaConfig(device='cpu')).description)\n"
        "try: make_backend(XlaConfig())\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cores, eager torch" in done.stdout
    assert "torch_xla is not usable here" in done.stdout


def test_a_verb_that_needs_no_torch_xla_leaves_it_out(small_target, exported_head):
    """transformers imports it wherever it is installed: a quarter of the seconds that such a verb starts in."""
    verb = ["eval", f"--target={small_target}", f"--draft={exported_head}", "--prompts=/nowhere.jsonl"]
    code = (
        "import sys\nfrom eagle3_xla.cli import main\n"
        f"main({verb!r})\nprint(*sorted({{'transformers', 'torch_xla'}} & {{*sys.modules}}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "transformers\n" and "/nowhere.jsonl" in done.stderr
