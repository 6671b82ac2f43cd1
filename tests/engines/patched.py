"""The patched model classes of SGLang 0.5.1.post3 and sglang-jax, each in the engine's own Python:

    SGLANG_JAX=/checkout/of/sglang-jax bash launch/test.sh tests/engines/patched.py --quickstart quickstart

and the trained head of the quickstart in the patched sglang-jax's own server. The checkout is of commit cddbf6f1; it
needs Python 3.12 (PYTHON312).
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
import torch
from engines.conftest import PROMPTS
from engines.servers import engine_python, serve
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from eagle3_xla.data.tokenizer import load_tokenizer, stop_token_ids
from eagle3_xla.draft.attention import causal_attention
from eagle3_xla.evaluate.options import EvalOptions
from eagle3_xla.evaluate.run import decode_all, load_pair, prompt_ids, tau
from eagle3_xla.serve.patch import patch

HERE = Path(__file__).parent
LAYERS = 12
LAYER_IDS = [None, [0, 4, 10]]  # the default ones, explicit ones
ENGINES = {"sglang": "sglang-0.5.1", "sglang-jax": "sglang-jax"}  # name -> environment
OPTIONS = EvalOptions(limit=20, max_new_tokens=8, draft_tokens=3)
REQUESTS = [torch.randint(3, 800, (length,), generator=torch.Generator().manual_seed(5)).tolist() for length in (11, 7)]


@pytest.fixture(scope="module", params=["tied", "untied"])
def target(request, tmp_path_factory) -> Path:
    """A Qwen2 with random weights. Heads of 128: sglang-jax's plain attention takes no other."""
    config = Qwen2Config(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=request.param == "tied",
        torch_dtype="float32",
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            torch.nn.init.normal_(projection.bias)  # the patches must not lose them
    folder = tmp_path_factory.mktemp("target")
    model.save_pretrained(folder)
    return folder


def copy_of(engine: str, folder: Path) -> Path:
    """The engine's unpatched package in a folder laid out as its checkout."""
    package = {"sglang": "sglang", "sglang-jax": "sgl_jax"}[engine]
    if engine == "sglang":
        place = next(engine_python(ENGINES[engine]).parents[1].glob("lib/python3*/site-packages"))
    else:
        tree = os.environ.get("SGLANG_JAX")
        assert tree, "set SGLANG_JAX to a checkout of sglang-jax at cddbf6f1; no release on PyPI has EAGLE3"
        place = Path(tree) / "python"
    shutil.copytree(place / package, folder / "python" / package)
    return folder


def capture(engine: str, package: Path, target: Path, folder: Path, **more) -> subprocess.CompletedProcess:
    job, out = folder / "job.json", folder / "out.safetensors"
    job.write_text(json.dumps({"requests": REQUESTS, "layer_ids": LAYER_IDS} | more))
    script = HERE / {"sglang": "aux_sglang_051.py", "sglang-jax": "aux_sglang_jax.py"}[engine]
    environment = os.environ | {"PYTHONPATH": f"{package / 'python'}:{HERE / 'stand_ins_051'}", "JAX_PLATFORMS": "cpu"}
    command = [engine_python(ENGINES[engine]), script, target, job, out]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("engine", ENGINES)
def test_aux_hidden_states(engine, target, tmp_path):
    """Equal to Hugging Face's; without the patch the same capture fails."""
    package = copy_of(engine, tmp_path / "engine")
    assert patch("check", engine, str(package))["status"] == "needed"
    unpatched = capture(engine, package, target, tmp_path)
    assert unpatched.returncode != 0 and not (tmp_path / "out.safetensors").exists()
    assert "no attribute 'set_eagle3_layers_to_capture'" in unpatched.stderr, unpatched.stderr[-3000:]

    assert patch("apply", engine, str(package))["status"] == "applied"
    done = capture(engine, package, target, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    captured = load_file(tmp_path / "out.safetensors")
    model = Qwen2ForCausalLM.from_pretrained(target, torch_dtype=torch.float32)
    for i, request in enumerate(REQUESTS):
        with torch.no_grad():
            output = model(torch.tensor([request]), output_hidden_states=True)
        for k, layer_ids in enumerate(LAYER_IDS):
            layers = layer_ids or [1, LAYERS // 2 - 1, LAYERS - 4]
            expected = torch.cat([output.hidden_states[layer + 1][0] for layer in layers], -1)
            aux, logits = captured[f"aux.{k}.{i}"], captured[f"logits.{k}.{i}"]
            print(f"\n{engine} {layers}: largest difference {(aux - expected).abs().max():.1e}")
            torch.testing.assert_close(aux, expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(logits, output.logits[0, -1], rtol=1e-4, atol=1e-4)


def test_sglang_051_drafts_with_the_trained_head(trained, tmp_path):
    """Its own draft model loads the export, and what it drafts from its own states is what ours drafts from ours."""
    package = copy_of("sglang", tmp_path / "engine")
    patch("apply", "sglang", str(package))
    ids = prompt_ids(load_tokenizer(str(trained.target)), PROMPTS, OPTIONS, 10**6)
    requests = [prompt[:40] for prompt in ids[:3]]
    more = {"requests": requests, "layer_ids": [None], "head": str(trained.head)}
    done = capture("sglang", package, trained.target, tmp_path, **more)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "out.safetensors")
    pair = load_pair(str(trained.target), str(trained.head), OPTIONS)
    assert torch.equal(found["hot_token_id"], pair.d2t + torch.arange(len(pair.d2t)))
    target, head = pair.on(OPTIONS)
    for i, request in enumerate(requests):
        tokens, positions = torch.tensor([request]), torch.arange(len(request))[None]
        documents = torch.ones_like(tokens)
        with torch.inference_mode():
            features = head.features(target.states(tokens, positions, documents).aux)
            embedded = head.embedded(target.embed_tokens(torch.tensor([request[1:] + request[-1:]])))
            key, value = head.context(embedded, features, positions)

            def attend(query, key=key, value=value, documents=documents):
                return causal_attention(query, key, value, documents)

            hidden, *_ = head.ttt_step(0, embedded, features, positions, attend, (), ())
            ours = head.logits(hidden)[0]
        print(f"\nrequest {i}: largest difference {(found[f'drafts.{i}'] - ours).abs().max():.1e}")
        torch.testing.assert_close(found[f"drafts.{i}"], ours, rtol=1e-3, atol=1e-3)
        assert torch.equal(found[f"drafts.{i}"].argmax(-1), ours.argmax(-1))


def greedy(url: str, prompts: list[list[int]]) -> list[list[int]]:
    answers = []
    for prompt in prompts:
        sampling = {"temperature": 0, "max_new_tokens": OPTIONS.max_new_tokens}
        body = {"input_ids": prompt, "sampling_params": sampling}
        answer = httpx.post(f"{url}/generate", json=body, timeout=300).raise_for_status().json()
        # With a head this server gives what its last call accepted whole, past the limit too.
        answers.append(answer["output_ids"][: OPTIONS.max_new_tokens])
    return answers


def test_sglang_jax_serves_the_trained_head(trained, tmp_path, monkeypatch):
    """Greedy output with the head, a chain of 3 drafts, is the output without it; drafts are accepted."""
    package = copy_of("sglang-jax", tmp_path / "engine")
    monkeypatch.setenv("SGLANG_JAX", str(package))
    with pytest.raises(RuntimeError, match="eagle3-xla patch apply --engine sglang-jax"):
        with serve("sglang-jax", trained.target, trained.head):
            pass
    patch("apply", "sglang-jax", str(package))
    tokenizer = load_tokenizer(str(trained.target))
    prompts = prompt_ids(tokenizer, PROMPTS, OPTIONS, 10**6)
    answers = []
    for head in (None, trained.head):
        log = tmp_path / "server.log"
        with serve("sglang-jax", trained.target, head, steps=3, log=log) as server:
            answers.append(greedy(server.url, prompts))
    assert len(answers[0]) == 20 and answers[0] == answers[1]
    # The server counts tokens per target call in its log alone, a line for each call; those of its warm-up come first.
    counted = log.read_text().split("ready to roll")[-1]
    calls = [float(length) for length in re.findall(r"accept-len ([\d.]+)", counted)]
    pair = load_pair(str(trained.target), str(trained.head), OPTIONS)
    ours = tau(decode_all(pair, prompts, stop_token_ids(str(trained.target), tokenizer), OPTIONS))
    print(f"\nsglang-jax, chain of 3: served {sum(calls) / len(calls):.4f} in {len(calls)} calls, eval {ours:.4f}")
    assert sum(calls) / len(calls) == pytest.approx(ours, rel=0.02)
