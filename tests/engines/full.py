"""The long version of test_served.py, 20 prompts of 48 tokens:

    bash launch/test.sh tests/engines/full.py --quickstart quickstart

In each engine: greedy output with the head, chain and trees, is the output without it; acceptance length within 2% of
our own; broken heads are caught by `doctor` and explained by `gap`. Prints the figures with -s.
"""

import functools
import json
import shutil
from dataclasses import replace

import pytest
import torch
from engines.conftest import PROMPTS
from engines.servers import serve
from safetensors.torch import load_file, save_file

from eagle3_xla.data.tokenizer import load_tokenizer, stop_token_ids
from eagle3_xla.doctor.run import doctor
from eagle3_xla.evaluate.options import EvalOptions
from eagle3_xla.evaluate.run import decode_all, load_pair, prompt_ids, tau
from eagle3_xla.serve.bench import run_prompts
from eagle3_xla.serve.client import Request, connect
from eagle3_xla.serve.gap import gap

OPTIONS = EvalOptions(limit=20, max_new_tokens=48)
CHAIN = {"steps": 5, "topk": 1, "draft_tokens": 6}
TREE = {"steps": 5, "topk": 4, "draft_tokens": 8}  # the root included, as SGLang counts
DEEP_TREE = {"steps": 6, "topk": 4, "draft_tokens": 24}  # drafts whose parents have another rank than they


@pytest.fixture(scope="session")
def prompts(trained):
    return prompt_ids(load_tokenizer(str(trained.target)), PROMPTS, OPTIONS, 10**6)


def served(engine, trained, prompts, head=None, shape=CHAIN):
    """(token ids of the answers, acceptance length) of a server started for it."""
    with serve(engine, trained.target, head, **shape) as server:
        answers, drafts, _ = run_prompts(connect(server.url), prompts, Request(OPTIONS.max_new_tokens), 1)
    return [answer.tokens for answer in answers], drafts and drafts.acceptance_length


@pytest.fixture(scope="session")
def decoded(trained, prompts):
    """decoded(shape): our own generations, made once for all engines."""
    pair = load_pair(str(trained.target), str(trained.head), OPTIONS)
    stop_ids = stop_token_ids(str(trained.target), load_tokenizer(str(trained.target)))

    @functools.cache
    def decode(steps, topk, draft_tokens):
        options = replace(OPTIONS, draft_tokens=draft_tokens - 1, topk=topk, steps=steps)
        return decode_all(pair, prompts, stop_ids, options)

    return lambda shape: decode(**shape)


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_output_and_acceptance(engine, trained, prompts, decoded):
    without, none = served(engine, trained, prompts)
    assert none is None and len(without) == 20
    for shape in (CHAIN, TREE, DEEP_TREE) if engine == "sglang" else (CHAIN,):
        ours = decoded(shape)
        tokens, acceptance_length = served(engine, trained, prompts, trained.head, shape)
        print(f"\n{engine} {shape}: served {acceptance_length:.4f}, eval {tau(ours):.4f}")
        assert tokens == without
        assert [generation.tokens for generation in ours] == without
        assert acceptance_length == pytest.approx(tau(ours), rel=0.02)


def broken(head, folder, how):
    """A copy of the head with one known fault; what `gap` has to say about it."""
    shutil.copytree(head, folder)
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    if how == "layer ids":  # Hugging Face's indices of hidden_states, where layers are asked for
        config["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [2, 15, 27], "use_aux_hidden_state": True}
        expected = "config.json asks for the target's layers [2, 15, 27]; the head reads [1, 14, 26]"
    elif how == "d2t":
        del tensors["d2t"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        expected = "d2t is missing"
    elif how == "template":
        expected = "the server's chat template makes"
    elif how == "theta":
        config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 100.0
        expected = "rope_theta is 100"  # too weak a head shows no difference in decoding; then the rule names it
    else:
        config["max_position_embeddings"] = 2048
        expected = "max_position_embeddings is 2048 in config.json, the target's is 8192"
    (folder / "config.json").write_text(json.dumps(config))
    return expected


@pytest.mark.parametrize("how", ["layer ids", "d2t", "theta", "positions", "template"])
def test_broken_heads(how, trained, tmp_path, monkeypatch):
    """`doctor` catches them before (all but the template, which is the server's), `gap` explains them after."""
    head, target, file = tmp_path / "head", trained.target, PROMPTS
    expected = broken(trained.head, head, how)
    options = replace(OPTIONS, limit=4, max_new_tokens=32)
    assert doctor(head, str(target))["ok"] == (how == "template")
    if how == "positions":
        monkeypatch.setenv("SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN", "1")  # else SGLang refuses to start
        file = tmp_path / "long.jsonl"
        text = " ".join(f"The colour of item {i} is {'red' if i % 3 else 'blue'}." for i in range(220))
        file.write_text(json.dumps({"prompt": f"{text} What is the colour of item 7?"}) + "\n")
        options = replace(options, limit=1)
    if how == "template":
        target = shutil.copytree(trained.target, tmp_path / "target")
        (target / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with serve("sglang", target, head) as server:
        figures = gap(str(trained.target), str(head), str(file), server.url, options)
    print("\n" + figures["screen"])
    assert not figures["ok"] and expected in figures["causes"][0], figures["causes"]
    assert torch.isfinite(torch.tensor(figures["served"]))
