"""Heads, targets and results that someone else made or broke: one line each, which names the file and the field."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from eagle3_xla import cli
from eagle3_xla.doctor.run import doctor
from eagle3_xla.draft.saved import LAYER_IDS, RECORD, layers_of, load_head, read_head
from eagle3_xla.errors import UserError
from eagle3_xla.evaluate.fingerprint import measured
from eagle3_xla.evaluate.results import read_results
from eagle3_xla.export import export
from eagle3_xla.serve.gap import _complete


def line(capsys, *arguments, code: int = 2) -> str:
    """What the command line says of it, in this process and without its last net."""
    assert cli.main([str(argument) for argument in arguments]) == code
    said = [words for words in capsys.readouterr().err.splitlines() if words.startswith("eagle3-xla")]
    assert len(said) == 1, said
    return said[0]


def edited(head: Path, folder: Path, change, metadata: dict | None = None) -> Path:
    """A copy of the head after change(config, tensors); config.json becomes what it returns, a text as it is."""
    folder.mkdir()
    config = json.loads((head / "config.json").read_text())
    with safe_open(head / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = (file.metadata() or {}) | (metadata or {})
    returned = change(config, tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors", metadata)
    (folder / "config.json").write_text(returned if isinstance(returned, str) else json.dumps(config))
    return folder


def fields(**values):
    return lambda config, tensors: config.update(values)


def tensor(name, make):
    return lambda config, tensors: tensors.update({name: make(tensors[name])})


def text(words):
    return lambda config, tensors: words


def without(name):
    return lambda config, tensors: config.pop(name) and None


def ids(values):
    return fields(eagle_config={LAYER_IDS: values})


def both_thetas(config, tensors):
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 5.0


# what is wrong; what `eval` says, which is `doctor`'s line where that fails; what `load_head` says (None: it loads)
NOT_TRAINED = "with which a head computes something else"
HEADS = {
    "truncated": (text('{"architectures": ["Llama'), "config.json is not JSON", "is not JSON"),
    "a list": (text("[1]"), r"config.json is not a JSON object but \[1\]", "not a JSON object"),
    "deep": (text("[" * 100_000), "config.json is not readable JSON: RecursionError", "RecursionError"),
    "no draft_vocab_size": (
        without("draft_vocab_size"),
        "draft_vocabulary|draft_vocab_size",
        "draft_vocab_size is missing",
    ),
    "other hidden_size": (fields(hidden_size=32), "sizes: hidden_size is 32", r"\[64, 192\]; \[32, 96\] by config"),
    "hidden_size null": (
        fields(hidden_size=None),
        "sizes: hidden_size is None, the weights' 64",
        "hidden_size is missing",
    ),
    "hidden_size text": (fields(hidden_size="64"), "hidden_size is '64'; a whole number from 1", "hidden_size is '64'"),
    "hidden_size huge": (fields(hidden_size=10**12), "hidden_size is 1000000000000; a whole number", "hidden_size"),
    "other heads": (
        fields(num_attention_heads=3),
        "heads: heads, KV heads",
        "3 attention heads, 4 KV heads, head_dim 8",
    ),
    "rope type": (
        fields(rope_scaling={"rope_type": "spiral"}),
        "rope_scaling: rope_scaling is",
        "rope_scaling is of type 'spiral'; one of .*yarn",
    ),
    "rope factor": (
        fields(rope_scaling={"rope_type": "linear", "factor": "two"}),
        "rope_scaling",
        "rope_scaling .*can't be used",
    ),
    "rope list": (fields(rope_scaling=[1]), r"rope_scaling is \[1\]; a mapping", "a mapping is expected"),
    "theta text": (fields(rope_theta="1e6"), "rope_theta is '1e6'; a number above 0", "rope_theta is '1e6'"),
    "theta nan": (fields(rope_theta=float("nan")), "rope_theta is nan; a number above 0", "rope_theta is nan"),
    "theta twice": (fields(rope_theta=5.0), "rope_theta: rope_theta is 5.0", "5.0 at the top level and 10000.0 in"),
    "theta of another": (both_thetas, "rope_theta: rope_theta is 5.0", None),
    "hidden_act": (fields(hidden_act="snake"), "activation: hidden_act is snake", "hidden_act is 'snake'"),
    "eps": (fields(rms_norm_eps=[1]), r"rms_norm_eps is \[1\]; a number above 0", "rms_norm_eps"),
    "d2t absolute": (
        tensor("d2t", lambda d2t: d2t + torch.arange(len(d2t))),
        "d2t: d2t holds target ids",
        "d2t holds target ids; engines add",
    ),
    "d2t short": (tensor("d2t", lambda d2t: d2t[:100]), r"d2t: d2t is \[100\]", r"d2t is \[100\]; one offset for each"),
    "d2t beyond": (tensor("d2t", lambda d2t: d2t + 4096), "d2t: d2t names ids twice or none", "in 0..4095"),
    "d2t float": (tensor("d2t", torch.Tensor.float), "d2t: d2t is float32", "d2t is float32; int64 offsets"),
    "d2t column": (tensor("d2t", lambda d2t: d2t[:, None]), r"d2t: d2t is \[128, 1\]", r"d2t is \[128, 1\]"),
    "two layers": (ids([1, 3]), r"aux_layers: .* is \[1, 3\]; three distinct layers in 0..7", "three distinct"),
    "layers of text": (ids(["1", "3", "4"]), r"aux_layers: .*\['1', '3', '4'\]", "three distinct"),
    "layer 99": (ids([1, 3, 99]), r"aux_layers: .*\[1, 3, 99\]", "three distinct"),
    "layers 0 0 0": (ids([0, 0, 0]), r"aux_layers: .*\[0, 0, 0\]", "three distinct"),
    "layer -1": (ids([1, 3, -1]), r"aux_layers: .*\[1, 3, -1\]", "three distinct"),
    "vLLM's layer 0": (fields(**{LAYER_IDS: [0, 3, 4]}), r"\[0, 3, 4\]; three distinct layers in 1..8", "in 1..8"),
    "norm_output": (fields(norm_output=True), "norm_flags: norm_output True", f"norm_output is True, {NOT_TRAINED}"),
    "norm_before_residual": (
        fields(norm_before_residual=True),
        "norm_flags: norm_before_residual True",
        "norm_before_residual is True",
    ),
    "attention_bias": (fields(attention_bias=True), "biases: attention_bias set", "attention_bias is True"),
    "tied": (fields(tie_word_embeddings=True), "tie_word_embeddings: tie_word", "tie_word_embeddings is True"),
    "quantised": (fields(quantization_config={"quant_method": "fp8"}), "quantization_config", "quantization_config is"),
    "NaN": (
        tensor("fc.weight", lambda fc: fc.index_fill(0, torch.tensor(0), float("nan"))),
        "tensor_values: fc.weight has NaN",
        "fc.weight has NaN or infinity",
    ),
    "FP8": (
        tensor("fc.weight", lambda fc: fc.to(torch.float8_e4m3fn)),
        "tensor_dtypes: weights of float8_e4m3fn",
        "fc.weight is float8_e4m3fn; bfloat16, float16",
    ),
    "fc_norm": (fields(fc_norm=True), "fc_norm: fc_norm is set and its weights are missing", "fc_norm is set"),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head(name, exported_head, small_target, chat_file, tmp_path, capsys):
    change, of_eval, of_load = HEADS[name]
    head = edited(exported_head, tmp_path / "head", change)
    arguments = ["eval", "--target", small_target, "--draft", head, "--prompts", chat_file, "--limit", 1]
    said = line(capsys, *arguments)
    assert re.search(of_eval, said), said
    if of_load is None:
        load_head(head)
        return
    with pytest.raises(UserError, match=of_load):
        saved = read_head(head)
        load_head(saved)
        layers_of(saved, 8)
    try:
        rules = doctor(head, str(small_target))["rules"]  # what every other rule says of it
        assert any(rule["status"] != "pass" for rule in rules)
    except UserError as error:
        assert str(error) in said


def test_force_measures_what_doctor_fails(exported_head, small_target, chat_file, tmp_path, capsys):
    head = edited(exported_head, tmp_path / "head", fields(norm_output=True))
    arguments = ["eval", "--target", small_target, "--draft", head, "--prompts", chat_file, "--limit", 1, "--json"]
    assert "--force measures it all the same" in line(capsys, *arguments)
    assert cli.main([*map(str, arguments), "--force", "--max-new-tokens", "4"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (
        figures["identical"]
        and figures["measured"]["head"] != measured("eval", str(exported_head), "", __file__)["head"]
    )
    assert "--topk 129: the draft vocabulary" in line(capsys, *arguments, "--force", "--topk", 129, "--draft-tokens", 4)


def test_a_missing_d2t_is_rebuilt_for_gap_alone(exported_head, tmp_path):
    head = edited(exported_head, tmp_path / "head", lambda config, tensors: tensors.pop("d2t") is None or None)
    with pytest.raises(UserError, match="d2t is missing"):
        load_head(head)
    saved = read_head(head)
    assert _complete(saved) and torch.equal(load_head(saved)[1], load_head(exported_head)[1])


@pytest.mark.parametrize(
    "record, part",
    [("[1]", "a mapping"), ("7", "a mapping"), ("{}", "num_attention_heads is null"), ("{", "not JSON")],
)
def test_an_engine_record(record, part, exported_head, small_target, tmp_path):
    head = edited(exported_head, tmp_path / "head", lambda config, tensors: None, {RECORD: record})
    result = doctor(head, str(small_target))
    said = next(rule for rule in result["rules"] if rule["rule"] == "weight_file")
    assert said["status"] == "fail" and part in said["message"] and "model.safetensors is damaged" in said["message"]
    with pytest.raises(UserError, match=part):
        load_head(head)


def target_with(small_target: Path, folder: Path, **files) -> Path:
    """The target with some files replaced; None leaves one out."""
    folder.mkdir()
    for file in small_target.iterdir():
        os.symlink(file, folder / file.name)
    for name, content in files.items():
        file = folder / name.replace("__", ".")
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_text(content)
    return folder


BROKEN_TEMPLATE = "the target's chat template fails on prompt 1 of"
TARGETS = {
    "config truncated": ({"config__json": "{"}, "no target at"),
    "config a list": ({"config__json": "[]"}, "no target at"),
    "hidden_size text": ({"config__json": '{"model_type": "qwen2", "hidden_size": "64"}'}, "hidden_size is '64'"),
    "rope a list": ({"config__json": '{"model_type": "qwen2", "rope_scaling": [1]}'}, r"rope_scaling is \[1\]"),
    "tokenizer_config broken": ({"tokenizer_config__json": "{"}, "target_tokenizer: .*is not JSON"),
    "tokenizer_config a list": ({"tokenizer_config__json": "[]"}, "target_tokenizer: .*not a JSON object"),
    "tokenizer broken": ({"tokenizer__json": "{"}, "no tokenizer at"),
    "no eos": (
        {"generation_config__json": '{"eos_token_id": ["x"]}'},
        "generation_config.json: eos_token_id is 'x'; a whole number",
    ),
    "eos beyond": ({"generation_config__json": '{"eos_token_id": 99999}'}, "99999; a whole number from 0 to 4095"),
    "generation_config broken": (
        {"generation_config__json": "{"},
        "end_of_turn: .*generation_config.json' is not a valid JSON",
    ),
    "template that raises": ({"chat_template__jinja": "{{ raise_exception('no') }}"}, BROKEN_TEMPLATE),
    "template that divides": ({"chat_template__jinja": "{{ 1 // 0 }}"}, BROKEN_TEMPLATE),
    "template that is none": ({"chat_template__jinja": "{% if %}"}, BROKEN_TEMPLATE),
    "template of nothing": ({"chat_template__jinja": "{# nothing #}"}, "makes nothing of prompt 1"),
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_target(name, exported_head, small_target, chat_file, tmp_path, capsys):
    files, part = TARGETS[name]
    target = target_with(small_target, tmp_path / "target", **files)
    arguments = ["eval", "--target", target, "--draft", exported_head, "--prompts", chat_file, "--limit", 1]
    said = line(capsys, *arguments)
    assert re.search(part, said), said


def test_an_index_that_is_none(exported_head, small_target, tmp_path):
    embedding = torch.zeros(4096, 64)
    head = edited(
        exported_head, tmp_path / "head", lambda _, tensors: tensors.update({"embed_tokens.weight": embedding})
    )
    for content, part in (
        ("{}", "weight_map is null"),
        ('{"weight_map": [1]}', r"weight_map is \[1\]"),
        ("{", "not JSON"),
        ('{"weight_map": {"model.norm.weight": "../other.safetensors"}}', "which is no file beside it"),
        ('{"weight_map": {"model.norm.weight": "of a base.safetensors"}}', "has both model.safetensors and"),
    ):
        target = tmp_path / f"target-{len(content)}"
        target_with(small_target, target, **{"model__safetensors__index__json": content})
        rules = doctor(head, str(target))["rules"]
        said = next(rule for rule in rules if rule["rule"] == "embedding")
        assert said["status"] == "fail" and part.replace("\\", "") in said["message"]


def test_a_prompt_with_half_a_character(exported_head, small_target, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "\\ud83d"}\n')
    said = line(capsys, "eval", "--target", small_target, "--draft", exported_head, "--prompts", prompts)
    assert "prompts.jsonl:1: a user turn holds NUL or half characters" in said


EVAL, BENCH = ["eval", "--target", "t", "--draft", "d", "--prompts", "p"], ["bench", "--server", "u", "--prompts", "p"]
NUMBERS = [
    ([*EVAL, "--limit", "-1"], "--limit -1: a whole number from 0 is expected"),
    ([*BENCH, "--limit", "-3"], "--limit -3: a whole number from 0"),
    (["gap", *BENCH[1:], "--target", "t", "--draft", "d", "--limit", "-1"], "--limit -1: a whole number from 0"),
    ([*EVAL, "--temperature", "nan"], "--temperature nan: a number from 0 to 100"),
    ([*EVAL, "--temperature", "inf"], "--temperature inf: a number from 0 to 100"),
    ([*BENCH, "--temperature", "nan"], "--temperature nan: a number"),
    ([*BENCH, "--temperature", "-1"], "--temperature -1: a number from 0"),
    ([*EVAL, "--top-p", "0"], "--top-p 0: a number above 0 up to 1"),
    ([*EVAL, "--max-new-tokens", "0"], "--max-new-tokens 0: a whole number from 1"),
    ([*EVAL, "--max-new-tokens", "1e3"], "--max-new-tokens 1e3: a whole number from 1"),
    ([*EVAL, "--draft-tokens", "9999999"], "--draft-tokens 9999999: a whole number from 1 to 1024"),
    ([*EVAL, "--topk", "0"], "--topk 0: a whole number from 1 to 1024"),
    ([*EVAL, "--seed", "-1"], "--seed -1: a whole number from 0"),
    ([*BENCH, "--concurrency", "1,x"], "--concurrency x: a whole number from 1 to 10000"),
    ([*BENCH, "--concurrency", "0"], "--concurrency 0: a whole number from 1"),
    ([*BENCH, "--concurrency", ""], "--concurrency : a whole number from 1 to 10000"),
    *(
        (["quickstart", "--minutes", words], f"--minutes {words}: a number from 0.1 to 100000 is expected")
        for words in ("nan", "inf", "-1", "0", "0.000001", "1e9")
    ),
    (["prepare", "--show", "-2"], "--show -2: a whole number from 1"),
    (["train", "--max-steps", "-1"], "--max-steps -1: a whole number from 0"),
    (["regenerate", "--out", "o", "--limit", "-1"], "--limit -1: a whole number from 0"),
    (["regenerate", "--out", "o", "--timeout", "nan"], "--timeout nan: a number above 0"),
    (["regenerate", "--out", "o", "--timeout", "0"], "--timeout 0: a number above 0"),
    (["regenerate", "--out", "o", "--concurrency", "0"], "--concurrency 0: a whole number from 1"),
    (["regenerate", "--out", "o", "--max-tokens", "0"], "--max-tokens 0: a whole number from 1"),
    (["regenerate", "--out", "o", "--temperature", "inf"], "--temperature inf: a number"),
    (["export", "--checkpoint", "c", "--out", "o", "--dtype", "int8"], "--dtype invalid choice: 'int8' (choose from"),
    (["trian"], "no verb 'trian'; did you mean train?"),
]


@pytest.mark.parametrize("arguments, part", NUMBERS)
def test_numbers_of_the_command_line(arguments, part, capsys):
    assert part in line(capsys, *arguments)


def test_export_takes_nobodys_folder(exported_head, small_target, tmp_path, capsys):
    """The target's own folder, someone's head, someone's notes; a head of ours is replaced whole."""
    checkpoint = next((exported_head.parent / "checkpoints").glob("step-*"))
    target = shutil.copytree(small_target, tmp_path / "target")
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    assert f"{target} is not ours to write to" in line(capsys, "export", "--checkpoint", checkpoint, "--out", target)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    shutil.copy(exported_head / "config.json", foreign)
    save_file({"d2t": torch.zeros(1)}, foreign / "model.safetensors")
    (tmp_path / "file").write_text("mine")
    for out in (foreign, tmp_path / "file"):
        line(capsys, "export", "--checkpoint", checkpoint, "--out", out)
    ours = shutil.copytree(exported_head, tmp_path / "ours")
    (ours / ".partial-model").write_text("of a killed export")
    export(checkpoint, ours, "float16")
    assert json.loads((ours / "config.json").read_text())["torch_dtype"] == "float16"
    assert sorted(file.name for file in ours.iterdir()) == ["config.json", "model.safetensors"]


RESULT = {"tau": 2.0, "acceptance": [0.6, 0.4], "acc_all_positions": [0.5], "tokens_per_second": 30.0, "prompts": 3}
RESULT |= {"baseline_tokens_per_second": 20.0, "draft_tokens": 2, "topk": 1, "temperature": 0.0}
RESULTS = {
    "a list": ([1], r"r.json is not a JSON object but \[1\]"),
    "null": (None, "r.json is not a JSON object but null"),
    "a number": (7, "r.json is not a JSON object but 7"),
    "temperature": ({"temperature": "hot"}, "r.json: temperature is 'hot'; a number from 0"),
    "acceptance null": ({"acceptance": None}, "r.json: acceptance is null; a list"),
    "acceptance of text": ({"acceptance": ["0.5"]}, r"r.json: acceptance\[0\] is '0.5'; a number from 0 to 1"),
    "tau": ({"tau": float("nan")}, "r.json: tau is nan; a number from 1"),
    "speed": ({"tokens_per_second": 0}, "r.json: tokens_per_second is 0; a number above 0"),
    "no fingerprints": ({"measured": None}, "r.json: measured is null; a mapping"),
    "whose head": ({"measured": {"target": "t"}}, "measured.head is null: it does not say which head it measured"),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results(name, tmp_path):
    content, part = RESULTS[name]
    good = RESULT | {"measured": {"head": "h", "target": "t", "prompts": {"name": "p"}, "date": "d"}}
    file = tmp_path / "r.json"
    file.write_text(json.dumps(good | content if isinstance(content, dict) else content))
    with pytest.raises(UserError, match=part):
        read_results(file)
    for whole in (good, {"minutes": 8.0, "eval": good}):  # the second: the quickstart's result.json
        file.write_text(json.dumps(whole))
        assert read_results(file)[0].speedup == 1.5
    file.write_text(json.dumps(good | {"identical": False}))
    assert read_results(file)[0].speedup is None


def test_push_takes_figures_of_this_head_alone(exported_head, small_target, chat_file, tmp_path, capsys):
    head = shutil.copytree(exported_head, tmp_path / "head")
    file = tmp_path / "r.json"

    def push(*more, code=2, **changes):
        about = measured("eval", str(head), str(small_target), str(chat_file))
        file.write_text(json.dumps(RESULT | {"measured": about | changes}))
        arguments = ["push", head, "--target", small_target, "--repo", "me/head", "--results", file, "--dry-run", *more]
        if code:
            return line(capsys, *arguments, code=code)
        assert cli.main([*map(str, arguments)]) == 0
        return (head / "README.md").read_text()

    assert f"r.json: measured on another head (0123; {head} is" in push(head="0123")
    assert f"r.json: measured on another target (0123; {small_target} is" in push(target="0123")
    assert "--repo me/../x" in push("--repo", "me/../x") and "--license" in push("--license", "a b")
    assert not (head / "README.md").exists()

    card = push("--base-model", "org/model", code=0, prompts={"name": "<b>|[x](y)`\x1b[2J.jsonl"})
    assert str(small_target) not in card and str(tmp_path) not in card and "org/model" in card
    shown = card[card.index("# EAGLE3") :]
    assert "<b>" not in shown and "\x1b" not in card and r"&lt;b&gt;\|\[x\]\(y\)\`" in shown
    push(code=0)  # its own card is written again
    (head / "README.md").write_text(card.replace("A one-layer head", "My head"))
    assert "README.md was not written by `push`, or was edited since; move it, or give --overwrite" in push()
    assert "My head" in (head / "README.md").read_text()
    assert "My head" not in push("--overwrite", code=0)


def test_what_a_file_holds_does_not_drive_the_terminal(exported_head, small_target, tmp_path, capsys):
    head = edited(
        exported_head, tmp_path / "head", fields(architectures=["\x1b]0;owned\x07\x1b[2J"], hidden_act="\x9b3J")
    )
    assert cli.main(["doctor", str(head), "--target", str(small_target)]) == 1
    captured = capsys.readouterr()
    assert not {"\x1b", "\x07", "\x9b"} & set(captured.out + captured.err) and "owned" in captured.out
    cli.main(["eval", "--target", "\x1b[2J", "--draft", str(head), "--prompts", "\x1b[2J"])
    assert "\x1b" not in capsys.readouterr().err


def test_the_last_net(monkeypatch, capsys, tmp_path):
    def fails(options, overrides):
        raise KeyError("what nobody expected\nin two lines")

    monkeypatch.setitem(cli.VERBS, "doctor", fails)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    arguments = ["doctor", "http://user:secret@host", "--target", "t"]
    with pytest.raises(KeyError):
        cli.main(arguments)
    monkeypatch.delenv(cli.RAISE)
    said = line(capsys, *arguments, code=1)
    file = next(tmp_path.glob("eagle3-xla-*.txt"))
    assert said.startswith("eagle3-xla doctor: an error that it should have explained, KeyError") and str(file) in said
    assert "Traceback" in file.read_text() and "doctor http://host --target t" in file.read_text()
    assert "secret" not in file.read_text()
