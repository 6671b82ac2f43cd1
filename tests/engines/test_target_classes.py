"""Which target's class hands hidden states to a head, read in the sources of the installed engines."""

import ast
import re
from pathlib import Path

import pytest
from engines.servers import engine_python
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from eagle3_xla.target.families import FAMILIES, LAST_IN_SGLANG, SGLANG, VLLM, WINDOWED_IN_SGLANG

GENERIC = "TransformersForCausalLM"  # of a target that the engine has no class for


def models(engine: str, folder: str) -> Path:
    environment = engine_python(engine).parents[1]
    return next(environment.glob(f"lib/python3*/site-packages/{engine}/{folder}"))


def tree_of(file: Path) -> ast.Module:
    return ast.parse((file if file.suffix else file / "__init__.py").read_text())


def inherits(file: Path, name: str, wanted: str) -> bool:
    """Whether class `name` of a file is, inherits from or has a method `wanted`; imports are followed in its folder."""
    tree = tree_of(file)
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            methods = {child.name for child in node.body if isinstance(child, ast.FunctionDef)}
            bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
            return wanted in methods | bases or any(inherits(file, base, wanted) for base in bases - {name})
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            module = (node.module or "").split(".")[-1]
            folder = file if file.is_dir() else file.parent
            if (folder / f"{module}.py").is_file():
                return inherits(folder / f"{module}.py", name, wanted)
    return False


def sglang_file(architecture: str) -> Path:
    """Where SGLang's class of a target is."""
    for file in models("sglang", "srt/models").glob("*.py"):
        for node in tree_of(file).body if architecture in file.read_text() else ():
            of_entry = isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "EntryClass"
            if of_entry and architecture in {child.id for child in ast.walk(node.value) if isinstance(child, ast.Name)}:
                return file
    assert architecture != GENERIC
    return sglang_file(GENERIC)


def sglang_serves(architecture: str) -> bool:
    file = sglang_file(architecture)
    return inherits(file, architecture if architecture in file.read_text() else GENERIC, "set_eagle3_layers_to_capture")


def vllm_serves(architecture: str) -> bool:
    folder = models("vllm", "model_executor/models")
    for node in ast.walk(tree_of(folder / "registry.py")):
        for key, value in zip(node.keys, node.values) if isinstance(node, ast.Dict) else ():
            if isinstance(key, ast.Constant) and key.value == architecture and isinstance(value, ast.Tuple):
                module, name = (ast.literal_eval(part) for part in value.elts)
                file = folder / f"{module}.py"
                return inherits(file if file.is_file() else folder / module, name, "SupportsEagle3")
    raise AssertionError(f"vLLM knows no {architecture}")


@pytest.mark.parametrize("engine, serves", [(SGLANG, sglang_serves), (VLLM, vllm_serves)], ids=["sglang", "vllm"])
def test_families(engine, serves):
    served = {kind for kind in FAMILIES if serves(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])}
    assert served == {kind for kind, family in FAMILIES.items() if engine in family.engines}


def test_whose_last_layer_sglang_hands_out_and_whose_windows_it_has():
    """A look at the index behind the last layer, after the loop over the layers; a window's size in the class."""
    served = {
        kind: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind] for kind, family in FAMILIES.items() if SGLANG in family.engines
    }
    files = {kind: sglang_file(name).read_text() for kind, name in served.items()}
    size = "get_attention_sliding_window_size"
    windowed = {kind for kind, name in served.items() if inherits(sglang_file(name), name, size)}
    assert windowed == {*WINDOWED_IN_SGLANG}
    behind = re.compile(r"(num|end)_layers? in self.layers_to_capture")
    assert {kind for kind in served if behind.search(files[kind])} == {*LAST_IN_SGLANG}
