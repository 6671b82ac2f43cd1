"""Targets of other families in the real engines, a few prompts each:

    bash launch/test.sh tests/engines/families.py -s

A small Qwen3, with an EAGLE3 head, with an EAGLE-3.1 head, with one of more and wider attention heads than the target's
and with one of normed queries and keys and a sliding window (vLLM alone: SGLang has no class for it), a Llama with
llama3 RoPE whose prompts go beyond its original context, a Qwen3-MoE, and a Phi-3 with longrope within its original
context, in SGLang and in vLLM: greedy output with the head is the output without it, acceptance length is within 2% of
our own. Their weights begin at random and learn a dozen chats by heart, so that their distributions are sharp; the head
is one of a few training steps. Prints the figures with -s.
"""

import itertools
import json
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from engines.servers import engine_environment, engine_python, serve
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Phi3Config, Qwen3Config, Qwen3MoeConfig

from eagle3_xla.cli import main
from eagle3_xla.data.files import data_file, read_rows
from eagle3_xla.data.tokenizer import load_tokenizer, stop_token_ids
from eagle3_xla.doctor.run import doctor
from eagle3_xla.draft.model import Eagle3Head, draft_config
from eagle3_xla.evaluate.options import EvalOptions
from eagle3_xla.evaluate.run import decode_all, load_pair, prompt_ids, tau
from eagle3_xla.serve.bench import run_prompts
from eagle3_xla.serve.client import Request, connect
from eagle3_xla.target.families import is_longrope

CHATS, TARGET_STEPS, HEAD_STEPS = 12, 150, 60
ORIGINAL_CONTEXT, LONGROPE_CONTEXT = 16, 256
OPTIONS = EvalOptions(limit=CHATS, max_new_tokens=48)
SIZES = dict(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES = {
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "qwen3, EAGLE-3.1": Qwen3Config(**SIZES, head_dim=32),
    "qwen3, wider attention": Qwen3Config(**SIZES, head_dim=32),
    "qwen3, window and QK-norm": Qwen3Config(**SIZES, head_dim=32),
    "llama, llama3": LlamaConfig(
        **SIZES,
        head_dim=32,
        rope_theta=5e5,
        rope_scaling={"rope_type": "llama3", "original_max_position_embeddings": ORIGINAL_CONTEXT, **LLAMA3},
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, head_dim=32, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True
    ),
    "phi3, longrope": Phi3Config(
        **SIZES,
        sliding_window=None,
        original_max_position_embeddings=LONGROPE_CONTEXT,
        rope_scaling={
            "type": "longrope",
            "short_factor": [1 + i / 16 for i in range(16)],
            "long_factor": [4.0 + i for i in range(16)],
        },
    ),
}

VLLM_ALONE = "qwen3, window and QK-norm"
HEADS = {  # settings of a head that is not plain EAGLE3
    "qwen3, EAGLE-3.1": ["draft.variant=eagle3.1"],
    "qwen3, wider attention": ["draft.attention_heads=8", "draft.key_value_heads=4", "draft.head_dim=64"],
    VLLM_ALONE: ["draft.qk_norm=true", "draft.window=12"],
}


class Trained(NamedTuple):
    """family: a key of FAMILIES; head: exported; prompts: token ids; tokens: our greedy answers with the head; tau:
    their acceptance length.
    """

    family: str
    target: Path
    head: Path
    prompts: list[list[int]]
    tokens: list[list[int]]
    tau: float


def learn_by_heart(config, tokenizer, chats: list[list[dict]]):
    """A model of this config that says these chats, whose other tokens it neither reads nor writes."""
    rows = [tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"][:128] for chat in chats]
    spoken = torch.tensor(sorted({token for row in rows for token in row}))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    silent = torch.ones(config.vocab_size, dtype=torch.bool).index_fill(0, spoken, False)
    model.lm_head.weight.data[silent] = 0
    head = torch.nn.Parameter(model.lm_head.weight.data[spoken])
    optimizer = torch.optim.AdamW([*model.model.parameters(), head], lr=2e-3, weight_decay=0.0)
    length = max(map(len, rows))
    ids = torch.tensor([row + [row[-1]] * (length - len(row)) for row in rows])
    targets = torch.searchsorted(spoken, ids[:, 1:].contiguous())
    for _ in range(TARGET_STEPS):
        hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
        loss = torch.nn.functional.cross_entropy((hidden @ head.T).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.lm_head.weight.data[spoken] = head.data
    return model.eval(), loss.item()


@pytest.fixture(scope="session", params=FAMILIES)
def trained(request, tokenizer, tmp_path_factory) -> Trained:
    folder, config = tmp_path_factory.mktemp("family"), FAMILIES[request.param]
    target, chats, prompts = (folder / name for name in ("target", "chats.jsonl", "prompts.jsonl"))
    rows = [row for _, row in read_rows(data_file("package:heldout.jsonl"))]
    rows = sorted((row for row in rows if 40 < row["new_tokens"]), key=lambda row: row["new_tokens"])[:CHATS]
    for file, number in ((chats, 4 * CHATS), (prompts, CHATS)):
        file.write_text("".join(json.dumps(rows[i % CHATS]) + "\n" for i in range(number)))
    roles = {"human": "user", "gpt": "assistant"}
    turns = [[{"role": roles[t["from"]], "content": t["value"]} for t in row["conversations"]] for row in rows]
    config.vocab_size, config.bos_token_id = len(tokenizer), tokenizer.bos_token_id
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, None
    model, loss = learn_by_heart(config, tokenizer, turns)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    settings = f"""target.path={target} target.dtype=float32 data.train=[{chats}] data.heldout=[] data.deduplicate=none
        data.prepared={folder / "data"} data.row_length=128 data.draft_vocab_size=256 loss.ttt_length=3 xla.device=cpu
        xla.autocast=false train.out={folder / "run"} train.epochs=40 train.batch_size=4 train.lr=1e-3
        train.tracker=none""".split()
    settings += HEADS.get(request.param, [])
    settings = [f"--{setting}" for setting in settings]
    assert main(["prepare", *settings]) == 0
    assert main(["train", *settings, "--max-steps", str(HEAD_STEPS)]) == 0
    assert main(["export", "--checkpoint", str(folder / "run"), "--out", str(folder / "head"), "--dtype=float32"]) == 0
    assert doctor(folder / "head", str(target))["ok"]
    ids = prompt_ids(load_tokenizer(str(target)), str(prompts), OPTIONS, 10**6)
    assert min(map(len, ids)) > ORIGINAL_CONTEXT
    pair = load_pair(str(target), str(folder / "head"), OPTIONS)
    answers = decode_all(pair, ids, stop_token_ids(str(target), tokenizer), OPTIONS)
    print(f"\n{request.param}: the target's loss {loss:.3f}, eval {tau(answers):.4f}")
    assert tau(answers) > 1.3  # else 2% of it would be little of what the head does
    return Trained(request.param, target, folder / "head", ids, [answer.tokens for answer in answers], tau(answers))


def served(engine, trained, head):
    context = LONGROPE_CONTEXT if is_longrope(AutoConfig.from_pretrained(trained.target)) else None
    with serve(engine, trained.target, head, context=context) as server:
        answers, drafts, _ = run_prompts(connect(server.url), trained.prompts, Request(OPTIONS.max_new_tokens), 1)
    return [answer.tokens for answer in answers], drafts and drafts.acceptance_length


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_output_and_acceptance(engine, trained):
    if engine == "sglang" and trained.family == VLLM_ALONE:
        architecture = json.loads((trained.head / "config.json").read_text())["architectures"][0]
        models = engine_python(engine).parent.parent.glob("lib/*/site-packages/sglang/srt/models/*.py")
        assert not any(architecture in file.read_text() for file in models)  # as `doctor` says
        return
    without, none = served(engine, trained, None)
    tokens, acceptance_length = served(engine, trained, trained.head)
    print(f"\n{engine}: served {acceptance_length:.4f}, eval {trained.tau:.4f}")
    assert none is None and tokens == without == trained.tokens
    assert acceptance_length == pytest.approx(trained.tau, rel=0.02)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SCALINGS = [
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "llama3", "original_max_position_embeddings": 32, **LLAMA3},
    YARN,
    YARN | {"truncate": False, "beta_fast": 16.0, "beta_slow": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
]


def test_heads_are_rotated_alike(tmp_path):
    """Up to four times the original context; and dynamic scaling, which is refused, differs in every engine."""
    job, longest = tmp_path / "job.json", 128
    tables = {"theta": 5e5, "head_dim": 32, "longest": longest, "scalings": SCALINGS}
    job.write_text(json.dumps(tables))
    ours = []
    for scaling in SCALINGS:
        config = LlamaConfig(**SIZES | {"max_position_embeddings": longest}, rope_theta=5e5, rope_scaling=dict(scaling))
        head = Eagle3Head(draft_config(config, 8))
        cos, sin = head.rotary(torch.zeros(1), torch.arange(longest)[None])
        ours.append(torch.cat([cos[0, :, :16], sin[0, :, :16]], -1))
    theirs = {}
    for engine in ("sglang", "vllm"):
        out = tmp_path / f"{engine}.safetensors"
        script = [Path(__file__).parent / "rope_tables.py", engine, job, out]
        environment = engine_environment(engine, False) | {"SGLANG_USE_CPU_ENGINE": "1"}
        if engine == "sglang":
            environment["PYTHONPATH"] = str(Path(__file__).parent / "stand_ins")
        subprocess.run([*map(str, [engine_python(engine), *script])], check=True, env=environment)
        theirs[engine] = [table[:longest] for _, table in sorted(load_file(out).items())]
        for scaling, expected, table in list(zip(SCALINGS, ours, theirs[engine], strict=True))[:-1]:
            assert torch.allclose(table, expected, atol=1e-5, rtol=1e-5), (engine, scaling)
    dynamic = [ours[-1], theirs["sglang"][-1], theirs["vllm"][-1]]
    print(f"\ndynamic: {[float((a - b).abs().max()) for a, b in itertools.combinations(dynamic, 2)]}")
    assert not torch.allclose(dynamic[0], dynamic[1], atol=0.1) and not torch.allclose(dynamic[1], dynamic[2], atol=0.1)
