"""Odd heads, maps, results and answers of servers, drawn by hypothesis: only UserError and RunError come of them."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from eagle3_xla import export as exports
from eagle3_xla.doctor.files import Target
from eagle3_xla.doctor.run import examine
from eagle3_xla.draft.model import Eagle3Head
from eagle3_xla.draft.saved import LAYER_IDS, RECORD, UNKNOWN, SavedHead, layers_of, load_head, read_d2t, read_head
from eagle3_xla.errors import RunError, UserError
from eagle3_xla.evaluate.results import read_results
from eagle3_xla.serve import replies
from eagle3_xla.serve.client import VLLM, SGLang

# derandomize: the same examples each time.
FUZZ = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
explained = contextlib.suppress(UserError, RunError)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**63, 10**30, 0, 1, 128]),
    st.floats(),
    st.text(max_size=6),
    st.sampled_from(["\ud800", "\x1b[2J", "silu", "linear", "yarn", "llama3", "dynamic", "longrope", "64"]),
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


NOTHING = st.nothing()


def changed(good: dict, names: list[str], also=NOTHING):
    """`good` with up to three of its fields, or of `names`, replaced or dropped; or any JSON at all."""
    change = st.dictionaries(st.sampled_from([*good, *names]), JSON | also | st.just(...), max_size=3)
    merged = change.map(lambda new: {k: v for k, v in (good | new).items() if v is not ...})
    return st.one_of(merged, merged, merged, JSON)


SCALING = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["default", "linear", "dynamic", "yarn", "llama3", "longrope"]) | JSON},
    optional={
        "factor": JSON,
        "low_freq_factor": JSON,
        "high_freq_factor": JSON,
        "original_max_position_embeddings": JSON,
        "short_factor": JSON,
        "long_factor": JSON,
        "beta_fast": JSON,
        "attention_factor": JSON,
        "rope_theta": JSON,
    },
)
IDS = st.fixed_dictionaries(
    {}, optional={LAYER_IDS: st.lists(st.integers(-2, 9), max_size=4) | JSON, "norm_output": JSON}
)
CONFIG = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "head_dim": 4}
CONFIG |= {"num_key_value_heads": 2, "rms_norm_eps": 1e-6, "max_position_embeddings": 128, "bos_token_id": 0}
CONFIG |= {"eos_token_id": 1, "rope_theta": 10000.0, "rope_scaling": None}
OTHERS = [*UNKNOWN, LAYER_IDS, "eagle_config", "rope_parameters", "target_hidden_size", "fc_norm", "dtype"]
TARGET = SimpleNamespace(
    dtype="float32",
    **CONFIG | {"model_type": "qwen2", "num_hidden_layers": 8, "hidden_act": "silu", "tie_word_embeddings": False},
)


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A sound head of 32 draft tokens: its folder, config.json and tensors."""
    folder = tmp_path_factory.mktemp("fuzz")
    config = exports.serving_config(CONFIG, 32, "float32")
    (folder / "config.json").write_text(json.dumps(config))
    from transformers import LlamaConfig

    module = Eagle3Head(LlamaConfig(**CONFIG, draft_vocab_size=32))
    d2t, t2d = torch.arange(32), torch.arange(64) % 2 == 0
    tensors = {**module.state_dict(), "d2t": d2t, "t2d": t2d}
    save_file(tensors, folder / "model.safetensors", {"format": "pt", RECORD: json.dumps(_record(config))})
    load_head(folder)
    return folder, config, tensors


def _record(config):
    return {name: config[name] for name in exports.TRAINED}


@FUZZ
@given(data=st.data())
def test_head_configs(head, tmp_path_factory, data):
    folder, config, _ = head
    content = data.draw(changed(config, OTHERS, SCALING | IDS))
    broken = tmp_path_factory.getbasetemp() / "fuzz-config"
    broken.mkdir(exist_ok=True)
    (broken / "model.safetensors").unlink(missing_ok=True)
    (broken / "model.safetensors").symlink_to(folder / "model.safetensors")
    (broken / "config.json").write_text(json.dumps(content), errors="surrogatepass")
    with explained:
        saved = read_head(broken)
        examine(saved, Target("t", TARGET, Path("/nowhere")))
        layers_of(saved, 8)
        load_head(saved)[0].rotary(torch.zeros(1), torch.arange(4)[None])


KINDS = [
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.float32,
    torch.bfloat16,
    torch.bool,
    torch.float8_e5m2,
]


@FUZZ
@given(
    values=st.lists(st.integers(-70, 70), max_size=33) | st.just(list(range(32))),
    edge=st.sampled_from([0, 1, 2**63 - 1, -(2**63)]),
    kind=st.sampled_from(KINDS),
    shape=st.sampled_from(["flat", "column", "row", "scalar"]),
    which=st.sampled_from(["d2t", "t2d", "lm_head.weight", "midlayer.self_attn.q_proj.weight", "record"]),
    record=JSON,
)
def test_maps_and_weights(head, values, edge, kind, shape, which, record):
    folder, config, tensors = head
    value = torch.tensor([edge, *values[1:]], dtype=torch.int64).to(kind)
    value = {"flat": value, "column": value[:, None], "row": value[None], "scalar": value[:1].reshape(())}[shape]
    saved = SavedHead(folder, config, tensors | ({which: value} if which != "record" else {}), _record(config))
    with explained:
        examine(saved, Target("t", TARGET, Path("/nowhere")))
        read_d2t(saved, 64, 32)
        load_head(saved)
    if which == "record":
        from eagle3_xla.draft.saved import _record as read_record

        with explained:
            examine(
                SavedHead(folder, config, tensors, read_record(json.dumps(record), "f")),
                Target("t", TARGET, Path("/nowhere")),
            )


RESULT = {"tau": 2.0, "acceptance": [0.6], "acc_all_positions": [0.5], "tokens_per_second": 30.0, "prompts": 3}
RESULT |= {"baseline_tokens_per_second": 20.0, "draft_tokens": 2, "topk": 1, "temperature": 0.0, "max_new_tokens": 8}
RESULT |= {"measured": {"head": "h", "target": "t", "prompts": {"name": "p"}, "version": "1", "date": "d"}}
SERVED = {k: v for k, v in RESULT.items() if k != "tau"} | {"acceptance_length": 2.0, "engine": "vllm", "version": "1"}
SERVED |= {"speedup": 1.5, "concurrency": [{"concurrency": 2}], "top_p": 0.9, "draft_window": 64}


@FUZZ
@given(content=changed(RESULT, []) | changed(SERVED, ["tau"]))
def test_results(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "fuzz-results.json"
    file.write_text(json.dumps(content), errors="surrogatepass")
    with explained:
        assert all(figures.how for figures in read_results(file))


META = {
    "completion_tokens": 2,
    "spec_verify_ct": 1,
    "spec_num_correct_drafts": 1,
    "spec_correct_drafts_histogram": [0, 1],
}
CHUNK = {"output_ids": [5, 6], "meta_info": META}
CHOICE = {"choices": [{"token_ids": [5, 6]}]}
INFO = {"model_path": "m", "version": "1", "speculative_algorithm": "EAGLE3", "speculative_draft_model_path": "d"}
INFO |= {"speculative_num_steps": 2, "speculative_eagle_topk": 1, "speculative_num_draft_tokens": 3, "dtype": "auto"}
EVENTS = st.one_of(
    changed(CHUNK, ["error"], changed(META, [])).map(lambda chunk: b"data: " + json.dumps(chunk).encode()),
    changed(CHOICE, ["error"]).map(lambda chunk: b"data:" + json.dumps(chunk).encode()),
    st.sampled_from([b"", b"data: [DONE]", b": ping", b"event: x", b"data:", b"data: {", b"\xff\xfe", b"data: nan"]),
    st.binary(max_size=12),
)
ENGINES = [
    SGLang("u", None, replies.sglang_info(INFO, "u")),
    SGLang("u", None, replies.sglang_info(INFO | {"speculative_algorithm": None}, "u")),
]


class _Quiet(VLLM):
    def _read(self):
        return None


ENGINES.append(_Quiet("u", None, "1", ("m", "m")))


@FUZZ
@given(lines=st.lists(EVENTS, max_size=5), cut=st.integers(1, 40), engine=st.sampled_from(ENGINES))
def test_streams(lines, cut, engine):
    stream = b"\n\n".join(lines)
    parts = [stream[i : i + cut] for i in range(0, len(stream), cut)]
    with explained:
        chunks = list(replies.events(replies.lines_of(parts, "u"), "u"))
        if chunks:
            answer = engine.answer(chunks, 0.1, "u")
            assert all(isinstance(token, int) for token in answer.tokens)


@FUZZ
@given(
    info=changed(INFO, ["served_model_name"]),
    models=changed({"data": [{"id": "m", "root": "r", "owned_by": "vllm"}]}, []),
    labels=st.text(max_size=12),
    value=st.text(max_size=6) | st.floats().map(str),
    answer=changed({"usage": {"prompt_tokens": 3}}, []),
)
def test_what_a_server_says_of_itself(info, models, labels, value, answer):
    if isinstance(info, dict):
        with explained:
            replies.sglang_info(info, "u")
    with explained:
        replies.vllm_model(models, "u")
    with explained:
        replies.prompt_tokens(answer, "u")
    with explained:
        name = "vllm:spec_decode_num_drafts_total"
        drafts = replies.vllm_drafts(f'{name}{{{labels}}} {value}\n{name}{{position="1"}} 3\n', "u")
        assert drafts is None or drafts.calls >= 0
