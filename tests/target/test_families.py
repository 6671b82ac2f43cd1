"""Every supported family against transformers' own forward, and what is refused."""

import inspect
import json
import shutil
from pathlib import Path

import pytest
import torch
from target.family_models import CONFIGS, LLAMA3, SHALLOW, SHALLOW_AUX, VOCABULARY, WINDOW, YARN, small_model
from transformers import CONFIG_MAPPING, AutoConfig

from eagle3_xla.cli import main
from eagle3_xla.config import load_recipe
from eagle3_xla.data.prepare import prepare
from eagle3_xla.draft.model import Eagle3Head, draft_config
from eagle3_xla.errors import UserError
from eagle3_xla.evaluate.decode import Decoder, SpeculativeDecoder
from eagle3_xla.plan.depth import layer_kinds, with_layers
from eagle3_xla.target.families import (
    FAMILIES,
    ONLY,
    SHAPE,
    WITHOUT_EFFECT,
    check,
    load_target_config,
    refuse_longer_rows,
)
from eagle3_xla.target.model import Target, TargetStates, Teacher, load_target
from eagle3_xla.target.packed import pack
from eagle3_xla.train.loop import train

LENGTHS = (19, 25, 12)  # documents of a row, then 4 of padding
DRAFT_IDS = torch.arange(1, VOCABULARY, 2)


def packed_rows() -> dict[str, torch.Tensor]:
    """Two rows [2, 60] of several documents and padding."""
    torch.manual_seed(1)
    rows = []
    for lengths in (LENGTHS, LENGTHS[::-1]):
        padding = 60 - sum(lengths)
        positions = torch.cat([*map(torch.arange, lengths), torch.zeros(padding, dtype=torch.long)])
        documents = torch.tensor([i + 1 for i, n in enumerate(lengths) for _ in range(n)] + [0] * padding)
        rows.append((torch.randint(0, VOCABULARY, (60,)), positions, documents))
    return dict(zip(("input_ids", "position_ids", "document_ids"), map(torch.stack, zip(*rows))))


@torch.no_grad()
def golden(model, batch, layers=(1, 3, 4)) -> list[torch.Tensor]:
    """aux, argmax, logsumexp, draft-vocabulary probabilities by transformers' forward of each document alone, [n, ..]
    over all documents."""
    found = []
    for ids, documents in zip(batch["input_ids"], batch["document_ids"]):
        for document in range(1, len(LENGTHS) + 1):
            output = model(input_ids=ids[documents == document][None], output_hidden_states=True, use_cache=False)
            aux = torch.cat([output.hidden_states[i + 1] for i in layers], -1)
            logits = output.logits
            probabilities = logits.softmax(-1)[..., DRAFT_IDS]
            found.append([x[0] for x in (aux, logits.argmax(-1), logits.logsumexp(-1), probabilities)])
    return [torch.cat(column) for column in zip(*found)]


def of_documents(states, teacher, batch) -> list[torch.Tensor]:
    """The same of packed rows."""
    probabilities = (teacher.logits - teacher.logsumexp[..., None]).exp()
    columns = states.aux, states.argmax, states.logsumexp, probabilities
    return [
        torch.cat([x[row][batch["document_ids"][row] == d] for row in range(2) for d in range(1, len(LENGTHS) + 1)])
        for x in columns
    ]


def assert_equal(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    torch.testing.assert_close(ours[0], expected[0], atol=1e-4, rtol=1e-4)
    assert torch.equal(ours[1], expected[1])
    torch.testing.assert_close(ours[2], expected[2], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours[3], expected[3], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_rows_are_transformers_documents(name, tmp_path):
    model, batch = small_model(name), packed_rows()
    model.save_pretrained(tmp_path)
    target = Target(load_target(str(tmp_path), torch.float32), DRAFT_IDS)
    states = target.states(**batch)
    teacher = target.teacher(states.hidden, states.argmax, states.logsumexp)
    assert_equal(of_documents(states, teacher, batch), golden(model, batch))


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_with_drafts_is_transformers_greedy(name, tmp_path):
    """A prompt longer than the windows; a tree, so that rows of the cache are taken back and moved."""
    model, prompt = small_model(name), packed_rows()["input_ids"][0, :20]
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    expected = model.generate(prompt[None], max_new_tokens=16, do_sample=False)[0, 20:].tolist()
    target = Target(load_target(str(tmp_path), torch.float32), DRAFT_IDS)
    head = Eagle3Head(draft_config(target.model.config, len(DRAFT_IDS))).eval()
    pack(target.model, head)  # as `eval` does
    d2t = DRAFT_IDS - torch.arange(len(DRAFT_IDS))
    decoder = SpeculativeDecoder(target, head, d2t, draft_tokens=12, topk=3, steps=4)
    assert decoder.decode(prompt.tolist(), 16, set()).tokens == expected
    assert Decoder(target).decode(prompt.tolist(), 16, set()).tokens == expected


@pytest.fixture(scope="module")
def saved_models(tmp_path_factory) -> dict[str, Path]:
    folders = {}
    for name in CONFIGS:
        folders[name] = tmp_path_factory.mktemp("family")
        small_model(name, SHALLOW).save_pretrained(folders[name])
        torch.save(packed_rows() | {"draft_ids": DRAFT_IDS}, folders[name] / "inputs.pt")
    return folders


SPLIT = """
import os, sys
import torch, torch_xla
from transformers import AutoModelForCausalLM
from target.family_models import CONFIGS, SHALLOW, SHALLOW_AUX
from eagle3_xla.plan.depth import with_layers
from eagle3_xla.target.experts import PARTED, RoutedExperts
from eagle3_xla.target.model import Target
from eagle3_xla.xla.aot import AotBackend
from eagle3_xla.xla.config import XlaConfig

backend = AotBackend(XlaConfig(tp=2))
for name, config in CONFIGS.items():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(with_layers(config, SHALLOW))
        backend.place_target(Target(model, torch.zeros(8, dtype=torch.int64), SHALLOW_AUX))
    for path, module in model.model.layers.named_modules():
        wanted = PARTED if isinstance(module, RoutedExperts) else ("weight",) if path.endswith("_proj") else ()
        for leaf, weight in module.named_parameters(recurse=False):
            if leaf in wanted:
                print(name, "|", path, leaf, torch_xla._XLAC._get_xla_sharding_spec(weight))
sys.stdout.flush()
os._exit(0)
"""


def test_every_matrix_of_a_layer_is_split(forks):
    """Over tp=2: attention's and the MLP's, experts included."""
    done = forks.run_code(SPLIT, environment={"CPU_NUM_DEVICES": "2"})
    assert done.returncode == 0, done.stderr[-3000:]
    placed = done.stdout.splitlines()
    assert {line.partition(" | ")[0] for line in placed} == {*CONFIGS} and len(placed) >= 4 * SHALLOW * len(CONFIGS)
    assert [line for line in placed if "replicated" in line] == []


@pytest.mark.slow
def test_through_spmd_they_are_the_same(forks, saved_models):
    """On 2x2 and on 1x4; three training steps, or three calls, are compiled once (spmd_families.py)."""
    script = Path(__file__).with_name("spmd_families.py").read_text()
    done = forks.run_code(script, *saved_models.values(), environment={"CPU_NUM_DEVICES": "4"})
    assert done.returncode == 0, done.stderr[-3000:]
    for name, folder in saved_models.items():
        expected = golden(small_model(name, SHALLOW), packed_rows(), SHALLOW_AUX)
        for mesh in ("2x2", "1x4"):
            *states, logits = torch.load(folder / f"{mesh}.pt")
            states, teacher = TargetStates(*states), Teacher(logits, states[3], states[2])
            assert_equal(of_documents(states, teacher, packed_rows()), expected)


def test_every_family_is_here():
    assert {config.model_type for config in CONFIGS.values()} == set(FAMILIES)
    assert WINDOW < min(LENGTHS)


def test_a_shallow_model_has_every_kind_of_layer():
    for name, config in CONFIGS.items():
        assert {*layer_kinds(with_layers(config, SHALLOW))} == {*layer_kinds(config)}, name


QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": 8, "vocab_size": 64}
WINDOWED = ["full_attention"] * 7 + ["sliding_attention"]
LLAMA_31 = {"rope_type": "llama3", **LLAMA3}
EIGHTFOLD = {"rope_type": "linear", "factor": 8.0}
GEMMA2 = {  # as Google writes it
    "model_type": "gemma2",
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
}
GEMMA3 = {  # as transformers 5 writes it, and at the top level too
    "model_type": "gemma3_text",
    "rope_theta": 1e6,
    "rope_scaling": EIGHTFOLD,
    "rope_local_base_freq": 1e4,
    "rope_parameters": {
        "full_attention": EIGHTFOLD | {"rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
REFUSED = [
    ({"model_type": "cohere"}, "Cohere scales its logits and shares one norm"),
    ({"model_type": "gpt_neox"}, "GPT-NeoX has LayerNorm"),
    ({"model_type": "starcoder2"}, "StarCoder-2 has LayerNorm"),
    ({"model_type": "glm4"}, "GLM-4 rotates pairs"),
    ({"model_type": "deepseek_v3", "auto_map": {"AutoModelForCausalLM": "m.Model"}}, "latent attention"),
    ({"model_type": "qwen2_moe"}, "a shared expert"),
    ({"model_type": "own", "auto_map": {"AutoConfig": "configuration.Own"}}, "'own' brings its own code"),
    ({"model_type": "not-yet-known"}, "model type 'not-yet-known' is unknown here; known: qwen2"),
    ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
    ({"model_type": "gemma3", "vision_config": {}}, "vision tower"),
    ({"model_type": "qwen2_audio", "audio_config": {}}, "audio tower"),
    ({"architectures": ["Qwen2ForSequenceClassification"]}, "not a causal LM"),
    ({"num_hidden_layers": 7}, "7 decoder layers"),
    ({"logit_scale": 0.5}, r"logit_scale \(0.5\) in config.json is no field of qwen2"),
    ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
    ({"residual_multiplier": 0.2}, "residual_multiplier"),
    ({"layer_types": ["full_attention"] * 7 + ["chunked_attention"]}, "layer_types has chunked_attention"),
    ({"layer_types": WINDOWED}, "has sliding_attention, and sliding_window or use_sliding_window says"),
    ({"layer_types": WINDOWED, "use_sliding_window": True, "sliding_window": None}, "has sliding_attention, and"),
    ({"model_type": "smollm3", "layer_types": WINDOWED, "sliding_window": 4}, "has sliding_attention, and"),
    (GEMMA2 | {"sliding_window": None}, "has sliding_attention, and"),
    ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ({"model_type": "gemma3_text", "attn_logit_softcapping": 30.0}, "is no field of gemma3_text"),
    (GEMMA2 | {"hidden_act": "gelu"}, "hidden_act is 'gelu' and hidden_activation, .*, 'gelu_pytorch_tanh'"),
    ({"model_type": "gemma2", "hidden_act": "gelu"}, "hidden_act is 'gelu' and hidden_activation, .*, None"),
    ({"model_type": "gpt_oss", "swiglu_limit": 5.0}, "swiglu_limit is 5.0 in config.json; only 7.0"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling 'dynamic': transformers changes"),
    ({"rope_scaling": {"rope_type": ["yarn"]}}, r"rope_scaling \['yarn'\]: unknown here; known: default, linear"),
    ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "rope_scaling 'longrope' without long_factor"),
    ({"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}}, "of phi3 alone, not of qwen2"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "without original_max_position_embeddings"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 4.0, "attention_factor": 2.0}}, "has attention_factor"),
    ({"rope_parameters": {"rope_theta": 1e6}}, r"rope_parameters.rope_theta is .* reads rope_theta \(None\)"),
    ({"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e6} | LLAMA_31}, "reads rope_scaling.rope_type"),
    ({"rope_scaling": YARN, "rope_parameters": YARN | {"beta_fast": 8.0}}, "reads rope_scaling.beta_fast"),
    ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, r"rope_scaling.rope_type \('yarn'\)"),
    ({"rope_parameters": {"partial_rotary_factor": 0.75}}, r"reads partial_rotary_factor \(1.0\)"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "by layer type .* of gemma3_text alone"),
    (GEMMA3 | {"rope_scaling": None}, "rope_parameters.full_attention.rope_type is 'linear'"),
    (GEMMA3 | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "full_attention.factor is 8.0"),
    (GEMMA3 | {"rope_local_base_freq": None}, r"reads rope_local_base_freq \(None\) at the top level"),
    (
        GEMMA3 | {"rope_parameters": {"full_attention": 3, "sliding_attention": {}}},
        "rope_parameters.full_attention is 3",
    ),
    ({"is_decoder": True}, "is_decoder is True"),
]


@pytest.mark.parametrize("changes, line", REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_refused_with_its_line(changes, line, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN2 | changes))
    with pytest.raises(UserError, match=line) as raised:
        load_target_config(str(tmp_path))
    assert len(str(raised.value).splitlines()) == 1


def test_rope_that_both_transformers_read_alike():
    longrope = {"type": "longrope", "short_factor": [1.5], "long_factor": [9.0]}
    phi3 = {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 64}
    for both in (
        {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}},
        {"rope_theta": 5e5, "rope_scaling": LLAMA_31, "rope_parameters": LLAMA_31 | {"rope_theta": 5e5}},
        {"model_type": "phi3", "rope_scaling": longrope, **phi3, "rope_parameters": longrope | phi3},
        GEMMA3,
    ):
        check(QWEN2 | both, "both")


def test_an_activation_that_is_said_twice():
    check(QWEN2 | GEMMA2, "gemma-2-2b-it")


def test_rows_beyond_the_context(small_run, small_target, tmp_path, capsys):
    """A conversation may be as long as a row."""
    shutil.copytree(small_target, tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 63}))
    settings = [*small_run, f"target.path={tmp_path / 'short'}"]
    line = "rows of 64 tokens are longer than the 63 positions that the target is used with"
    assert main(["prepare", *[f"--{setting}" for setting in settings]]) == 2
    assert f"setting data.row_length: {line}" in capsys.readouterr().err and not (tmp_path / "data").exists()
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}  # 63 positions without it
    scaled = AutoConfig.for_model(**config | {"max_position_embeddings": 63, "rope_scaling": yarn})
    refuse_longer_rows(scaled, 64, "here")
    prepare(load_recipe(None, small_run))  # with a target of a longer context
    with pytest.raises(UserError, match=f"{tmp_path / 'data'}: {line}"):
        train(load_recipe(None, settings))


@pytest.mark.parametrize("verb", ["prepare", "plan", "train"])
def test_no_verb_goes_on_with_a_refused_target(verb, small_run, tmp_path, capsys, monkeypatch):
    """Before data is read: there is none."""
    monkeypatch.setenv("CPU_NUM_DEVICES", "1")  # which `plan` sets for its process
    (tmp_path / "config.json").write_text(json.dumps(QWEN2 | {"logit_scale": 0.5}))
    settings = [*small_run, f"target.path={tmp_path}", "xla.device=xla", "data.train=[/nowhere.jsonl]"]
    settings += ["xla.dp=4", "xla.tp=4", f"train.out={tmp_path / 'out'}", f"data.prepared={tmp_path / 'none'}"]
    assert main([verb, *[f"--{setting}" for setting in settings]]) == 2
    error = capsys.readouterr().err
    assert "logit_scale" in error and "Traceback" not in error and not (tmp_path / "out").exists()


def test_no_field_of_transformers_is_forgotten():
    """What the families' own configs declare is known here: a newer transformers that adds a field fails here first."""
    for kind, family in FAMILIES.items():
        declared = set(inspect.signature(CONFIG_MAPPING[kind].__init__).parameters) - {"self", "kwargs"}
        assert declared <= {*SHAPE, *WITHOUT_EFFECT, *ONLY, *family.fields, "attn_logit_softcapping"}, kind
