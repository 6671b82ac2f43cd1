"""What a request leaves out, an engine takes from the model's generation_config.json: ours leave nothing of it out."""

import ast
from types import SimpleNamespace

import pytest
from engines.servers import engine_python

from eagle3_xla.regenerate.conversation import NEUTRAL
from eagle3_xla.serve.client import VLLM, Request, SGLang

OFF = (0, -1)  # of top_k


def sampling_defaults(engine: str, protocol: str, name: str) -> list[dict]:
    """The dicts of that name in an engine's own source."""
    folder = engine_python(engine).parents[1] / "lib" / "python3.11" / "site-packages"
    tree = ast.parse((folder / protocol).read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Assign | ast.AnnAssign)]
    targets = [(node.targets if isinstance(node, ast.Assign) else [node.target], node.value) for node in nodes]
    return [ast.literal_eval(value) for names, value in targets if name in {getattr(n, "id", "") for n in names}]


@pytest.mark.parametrize(
    "engine, protocol",
    [
        ("vllm", "vllm/entrypoints/openai/completion/protocol.py"),
        ("vllm", "vllm/entrypoints/openai/chat_completion/protocol.py"),
        ("sglang", "sglang/srt/entrypoints/openai/protocol.py"),
    ],
)
def test_every_default_of_the_server_is_named(engine, protocol):
    found = sampling_defaults(engine, protocol, "_DEFAULT_SAMPLING_PARAMS")
    assert found
    server = SimpleNamespace(name="m")
    question = (VLLM if engine == "vllm" else SGLang).question
    _, body = question(server, [1, 2], Request(8), "")
    for defaults in found:
        for sent in (body.get("sampling_params", body), {"temperature", "top_p"} | NEUTRAL.keys()):  # bench, regenerate
            assert defaults.keys() <= set(sent)
        for name in defaults.keys() & NEUTRAL.keys():
            assert NEUTRAL[name] == defaults[name] or (name == "top_k" and {NEUTRAL[name], defaults[name]} <= {*OFF})
