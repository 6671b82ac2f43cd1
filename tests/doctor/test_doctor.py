"""One good export, broken in one thing at a time: each known failure is named, and mended where that is safe."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    CohereConfig,
    Gemma3TextConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3MoeConfig,
)

from eagle3_xla.data.tokenizer import load_config
from eagle3_xla.doctor.config_rules import dtype, engines
from eagle3_xla.doctor.engines import served_by
from eagle3_xla.doctor.files import Target
from eagle3_xla.doctor.position_rules import max_positions, window
from eagle3_xla.doctor.run import doctor
from eagle3_xla.draft.saved import expected_shapes, layers_of, read_head
from eagle3_xla.errors import UserError
from eagle3_xla.evaluate.options import EvalOptions
from eagle3_xla.evaluate.run import evaluate
from eagle3_xla.target.families import SGLANG, VLLM
from eagle3_xla.target.known import plan_config

IDS = "eagle_aux_hidden_state_layer_ids"


def edit(folder, change, foreign: bool = False) -> None:
    """change(config, tensors) in place. foreign: without the record that only our exports carry."""
    config = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = {"format": "pt"} if foreign else file.metadata()
    change(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors", metadata)


def setting(**fields):
    return lambda config, tensors: config.update(fields)


def without(*fields):
    return lambda config, tensors: [config.pop(field) for field in fields]


def weights(name, make):
    """Replace a tensor by make(it); None drops it."""

    def change(config, tensors):
        tensors[name] = make(tensors[name])
        if tensors[name] is None:
            del tensors[name]

    return change


def rename(old, new):
    return lambda config, tensors: tensors.update({new: tensors.pop(old)})


def rope_alone(config, tensors):
    config.pop("rope_theta")


def biased(*names):
    """Biases of these projections, promised where all of the attention's are there."""

    def change(config, tensors):
        for name in names:
            rows = len(tensors[f"midlayer.{name}_proj.weight"])
            tensors[f"midlayer.{name}_proj.bias"] = torch.ones(rows)
        config["attention_bias"] = "self_attn.o" in names

    return change


def three_heads(config, tensors):
    """Of which a width of 64 is no multiple."""
    config |= {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16}
    for name, rows in {"q": 48, "k": 16, "v": 16}.items():
        tensors[f"midlayer.self_attn.{name}_proj.weight"] = torch.ones(rows, 128)
    tensors["midlayer.self_attn.o_proj.weight"] = torch.ones(64, 48)


def whole_vocabulary(config, tensors):
    size = config["draft_vocab_size"] = config["vocab_size"]
    tensors |= {"d2t": torch.zeros(size, dtype=torch.int64), "t2d": torch.ones(size, dtype=torch.bool)}
    tensors["lm_head.weight"] = torch.ones(size, 64)


def absolute(d2t):
    return d2t + torch.arange(len(d2t))


WINDOWED = setting(sliding_window=12, layer_types=["sliding_attention"])
TWOFOLD = {"rope_type": "linear", "factor": 2.0}
# what is broken, rule, status, mended by --fix
BROKEN = {
    "shifted layer ids": (setting(eagle_config={IDS: [2, 4, 5]}), "aux_layers", "fail", True),
    "ids for SGLang, none for vLLM": (setting(eagle_config={IDS: [1, 3, 4]}), "aux_layers", "fail", True),
    "two layer ids": (setting(eagle_config={IDS: [1, 3]}), "aux_layers", "fail", False),
    "no aux states": (setting(eagle_config={"use_aux_hidden_state": False}), "aux_layers", "fail", True),
    "dropped d2t": (weights("d2t", lambda d2t: None), "d2t", "fail", False),
    "d2t of target ids": (weights("d2t", absolute), "d2t", "fail", False),
    "d2t as floats": (weights("d2t", torch.Tensor.float), "d2t", "fail", False),
    "d2t of another head": (weights("d2t", torch.zeros_like), "d2t", "fail", False),
    "d2t over the whole vocabulary": (whole_vocabulary, "d2t", "warn", False),
    "wrong theta": (setting(rope_theta=1e6), "rope_theta", "fail", True),
    "theta where old readers don't look": (rope_alone, "rope_theta", "fail", True),
    "other RoPE scaling": (setting(rope_scaling=TWOFOLD), "rope_scaling", "fail", True),
    "2048 positions": (setting(max_position_embeddings=512), "max_position_embeddings", "fail", True),
    "no positions": (without("max_position_embeddings"), "max_position_embeddings", "fail", True),
    "normed output": (setting(norm_output=True), "norm_flags", "fail", True),
    "norm before residual": (setting(norm_before_residual=True), "norm_flags", "fail", True),
    "random embeddings": (
        lambda config, tensors: tensors.update({"embed_tokens.weight": torch.randn(config["vocab_size"], 64)}),
        "embedding",
        "fail",
        False,
    ),
    "tied lm_head": (setting(tie_word_embeddings=True), "tie_word_embeddings", "fail", True),
    "no draft vocabulary": (without("draft_vocab_size"), "draft_vocab_size", "fail", True),
    "other vocabulary": (setting(vocab_size=152064), "vocab_size", "fail", True),
    "target size twice": (setting(target_hidden_size=64), "target_size", "warn", True),
    "plain Llama": (setting(architectures=["LlamaForCausalLM"]), "architecture", "fail", True),
    "layers of the target": (setting(num_hidden_layers=8), "one_layer", "fail", True),
    "other heads, same sizes": (
        setting(num_attention_heads=4, num_key_value_heads=2, head_dim=16),
        "heads",
        "fail",
        True,
    ),
    "heads that don't divide the width": (three_heads, "heads", "fail", False),
    "no head_dim": (setting(head_dim=None, num_attention_heads=16), "heads", "fail", True),
    "other eps": (setting(rms_norm_eps=1e-3), "activation", "fail", True),
    "biases": (setting(attention_bias=True), "biases", "fail", True),
    "biases that SGLang drops": (biased(*(f"self_attn.{name}" for name in "qkv")), "biases", "fail", False),
    "biases for vLLM": (biased(*(f"self_attn.{name}" for name in "qkvo")), "biases", "warn", False),
    "scaled for new readers": (setting(rope_parameters=TWOFOLD), "rope_scaling", "fail", True),
    "renamed weights": (rename("norm.weight", "model.norm.weight"), "tensor_names", "fail", False),
    "fc_norm without its flag": (
        lambda config, tensors: tensors.update({f"fc_norm.{i}.weight": torch.ones(64) for i in range(3)}),
        "fc_norm",
        "fail",
        True,
    ),
    "NaN": (weights("fc.weight", lambda fc: fc * float("nan")), "tensor_values", "fail", False),
    "zeros": (weights("lm_head.weight", torch.zeros_like), "tensor_values", "fail", False),
    "a head for another target": (weights("fc.weight", lambda fc: fc[:, :96]), "target_size", "fail", False),
    "wrong dtype": (setting(torch_dtype="bfloat16"), "torch_dtype", "warn", True),
    "no t2d": (weights("t2d", lambda t2d: None), "t2d", "warn", False),
    "t2d of another vocabulary": (weights("t2d", lambda t2d: t2d[:1000]), "t2d", "fail", False),
}


def status(result, rule):
    return next(found["status"] for found in result["rules"] if found["rule"] == rule)


def settings(folder) -> dict:
    config = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in config.items() if value is not None}


def test_a_good_head(exported_head, small_target):
    result = doctor(exported_head, str(small_target))
    assert result["ok"] and {found["status"] for found in result["rules"]} == {"pass"}, result["screen"]
    assert len(result["rules"]) >= 24


@pytest.mark.parametrize("name", BROKEN)
def test_broken(name, exported_head, small_target, tmp_path):
    change, rule, expected, mended = BROKEN[name]
    head = tmp_path / "head"
    shutil.copytree(exported_head, head)
    edit(head, change)
    broken = (head / "config.json").read_text()
    result = doctor(head, str(small_target))
    assert status(result, rule) == expected, result["screen"]
    assert result["fixable"] == (mended and expected == "fail")
    assert result["ok"] == (expected != "fail")
    others = [found["rule"] for found in result["rules"] if found["status"] == "fail" and found["rule"] != rule]
    assert len(others) <= 1, result["screen"]  # a broken size may show in the shapes too
    assert (head / "config.json").read_text() == broken
    before = (head / "model.safetensors").read_bytes()
    result = doctor(head, str(small_target), fix=True)
    assert (status(result, rule) == "pass") == mended or rule == "fc_norm", result["screen"]
    assert (head / "model.safetensors").read_bytes() == before
    if mended:
        assert result["ok"] and result["fixed"]
        config, original = settings(head), settings(exported_head)
        assert config == original or rule in ("fc_norm", "aux_layers")
    else:
        assert (head / "config.json").read_text() == broken


@pytest.mark.parametrize("name", ["wrong theta", "other eps", "other heads, same sizes", "normed output"])
def test_a_doubt_about_a_foreign_head_is_not_mended(name, exported_head, small_target, tmp_path):
    """Without a record of its training, only its maker knows."""
    change, rule, *_ = BROKEN[name]
    head = tmp_path / "head"
    shutil.copytree(exported_head, head)
    edit(head, setting(), foreign=True)
    assert doctor(head, str(small_target))["ok"]
    edit(head, change, foreign=True)
    broken = (head / "config.json").read_text()
    result = doctor(head, str(small_target), fix=True)
    assert status(result, rule) in ("warn", "fail") and not result["fixed"], result["screen"]
    assert (head / "config.json").read_text() == broken


def test_what_no_engine_makes_of_a_foreign_head(exported_head, small_target, tmp_path):
    """Its maker may have trained it so all the same."""
    for change, rule, mended in (
        (setting(hidden_act="gelu"), "activation", False),
        (setting(rope_parameters=TWOFOLD), "rope_scaling", True),
    ):
        head = shutil.copytree(exported_head, tmp_path / rule)
        edit(head, change, foreign=True)
        assert status(doctor(head, str(small_target)), rule) == "fail"
        result = doctor(head, str(small_target), fix=True)
        assert (status(result, rule) != "fail") == mended, result["screen"]


def test_a_head_of_its_own_hidden_size(exported_head, small_target, chat_file, tmp_path):
    """As yuhuili/EAGLE3-LLaMA3.3-Instruct-70B is, 6144 for a target of 8192."""
    head = shutil.copytree(exported_head, tmp_path / "head")
    own = {"hidden_size": 32, "target_hidden_size": 64, "intermediate_size": 96}
    config = json.loads((head / "config.json").read_text())
    sized = SimpleNamespace(**config | own, qk_norm=False)
    tensors = {name: torch.rand(shape) for name, shape in expected_shapes(sized).items()}
    assert tensors["fc.weight"].shape == (32, 192)
    tensors["embed_tokens.weight"] = torch.rand(config["vocab_size"], 32)
    edit(head, lambda config, saved: (config.update(own), saved.update(tensors)), foreign=True)
    before = (head / "config.json").read_text()
    result = doctor(head, str(small_target), fix=True)
    assert result["ok"] and status(result, "target_size") == "warn", result["screen"]
    assert (status(result, "embedding"), (head / "config.json").read_text()) == ("pass", before)
    with pytest.raises(UserError, match="hidden_size is 32 and target_hidden_size 64: SGLang and vLLM serve"):
        evaluate(str(small_target), str(head), str(chat_file), EvalOptions())
    edit(head, setting(target_hidden_size=96), foreign=True)
    assert status(doctor(head, str(small_target)), "target_size") == "fail"
    assert doctor(head, str(small_target), fix=True)["fixed"] == {"target_hidden_size": [96, 64]}
    edit(head, weights("embed_tokens.weight", lambda own: None), foreign=True)
    assert status(doctor(head, str(small_target)), "embedding") == "fail"


def test_foreign_layer_ids(exported_head, small_target, tmp_path):
    head = tmp_path / "head"
    shutil.copytree(exported_head, head)
    for inner, top, expected, mended in (
        ([1, 3, 4], [2, 4, 5], "pass", True),
        ([1, 3, 4], None, "fail", True),  # SGLang reads the default layers, vLLM those before
        ([2, 4, 5], None, "fail", False),
        ([0, 2, 5], [1, 3, 6], "warn", False),
        (None, [2, 4, 5], "pass", True),
        (None, [1, 3, 4], "fail", True),
        ([4, 1, 3], [5, 2, 4], "warn", False),  # every engine hands on 1, 3, 4
        ([0, 2, 7], [1, 3, 8], "warn", False),  # SGLang has no output of this target's last layer
        ([1, 3, "4"], None, "fail", False),
    ):
        edit(head, setting(**{"eagle_config": {IDS: inner}, IDS: top}), foreign=True)
        assert status(doctor(head, str(small_target)), "aux_layers") == expected, (inner, top)
        assert (status(doctor(head, str(small_target), fix=True), "aux_layers") == "pass") == mended, (inner, top)
        engines = served_by(read_head(head), load_config(str(small_target))) if expected != "fail" else {SGLANG: {}}
        assert (SGLANG in engines) == (inner != [0, 2, 7])


def test_eval_reads_layers_in_the_engines_order(exported_head, tmp_path):
    head = shutil.copytree(exported_head, tmp_path / "head")
    edit(head, setting(eagle_config={IDS: [5, 0, 2]}), foreign=True)
    assert layers_of(read_head(head), 8) == (0, 2, 5)
    edit(head, setting(**{"eagle_config": None, IDS: [6, 1, 3]}), foreign=True)
    assert layers_of(read_head(head), 8) == (0, 2, 5)


def test_foreign_layer_ids_that_a_runner_of_vllm_reads_alone(exported_head, small_target, tmp_path):
    head = shutil.copytree(exported_head, tmp_path / "head")
    for nested, says, layers in (
        ({"layer_ids": [2, 4, 5]}, "the default ones", (1, 3, 4)),
        (
            {"layer_ids": [1, 3, 6]},
            r"SGLang .* \[1, 3, 4\], vLLM \[1, 3, 4\] by its V1 .* \[0, 2, 5\] by its V2",
            (0, 2, 5),
        ),
        ({IDS: [1, 3, 5]}, r"SGLang .* \[1, 3, 5\], vLLM \[0, 2, 4\] by its V1 .* \[1, 3, 4\] by its V2", (1, 3, 5)),
        ({"layer_ids": [0, 2, 5]}, r"layer_ids of eagle_config is \[0, 2, 5\]; three distinct layers in 1..8", None),
    ):
        edit(head, setting(eagle_config=nested), foreign=True)
        rules = doctor(head, str(small_target))["rules"]
        found = next(rule for rule in rules if rule["rule"] == "aux_layers")
        assert re.search(says, found["message"]) and (found["status"] == "pass") == (layers == (1, 3, 4)), found
        if layers:
            assert layers_of(read_head(head), 8) == layers


def test_targets(exported_head, small_target, tmp_path):
    """What is wrong with the target's folder shows too."""
    target = tmp_path / "target"
    shutil.copytree(small_target, target)
    tokenizer = json.loads((target / "tokenizer_config.json").read_text()) | {"tokenizer_class": "TokenizersBackend"}
    (target / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    result = doctor(exported_head, str(target))
    assert status(result, "target_tokenizer") == "fail" and not result["ok"]
    config = json.loads((target / "config.json").read_text())
    scaling = {"rope_type": "linear", "factor": 2.0}
    (target / "config.json").write_text(json.dumps(config | {"rope_scaling": scaling}))
    head = shutil.copytree(exported_head, tmp_path / "head")
    edit(head, setting(rope_scaling=scaling), foreign=True)
    assert status(doctor(head, str(target)), "rope_scaling") == "warn"  # SafeAILab's code reads `type`
    edit(head, setting(rope_scaling=None), foreign=True)
    assert status(doctor(head, str(target)), "rope_scaling") == "warn"  # not the target's
    config |= {"num_hidden_layers": 6, "layer_types": None}
    (target / "config.json").write_text(json.dumps(config))
    assert status(doctor(exported_head, str(target)), "aux_layers") == "fail"


def test_unreadable(exported_head, small_target, tmp_path):
    head = tmp_path / "head"
    shutil.copytree(exported_head, head)
    file = head / "model.safetensors"
    content = file.read_bytes()
    for broken in (content[:-100], content[:20], b"", b"\x00" * 500):
        file.write_bytes(broken)
        result = doctor(head, str(small_target))
        assert status(result, "weight_file") == "fail" and not result["ok"]
    file.rename(head / "pytorch_model.bin")
    assert status(doctor(head, str(small_target)), "weight_file") == "fail"
    for text, part in (("{", "not JSON"), ("[]", "not a JSON object"), ('{"head_dim": "8"}', "head_dim is '8'")):
        (head / "config.json").write_text(text)
        with pytest.raises(UserError, match=part):
            doctor(head, str(small_target))


def test_command_line(forks, exported_head, small_target, tmp_path):
    head = tmp_path / "head"
    shutil.copytree(exported_head, head)
    edit(head, without("max_position_embeddings"))
    done = forks.run("doctor", head, "--target", small_target, "--json")
    assert done.returncode == 1 and not json.loads(done.stdout)["ok"], done.stderr
    done = forks.run("doctor", head, "--target", small_target, "--fix")
    assert done.returncode == 0 and "fixed max_position_embeddings: None -> 1024" in done.stdout, done.stdout
    done = forks.run("doctor", tmp_path, "--target", small_target)
    assert done.returncode == 2 and "no head at" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_longrope_target_is_served_within_its_original_context(exported_head):
    scaling = {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    config = Phi3Config(
        hidden_size=64, num_attention_heads=2, original_max_position_embeddings=256, rope_scaling=scaling
    )
    found = max_positions(read_head(exported_head), Target("phi3", config, None))
    assert found.status == "warn" and "--max-model-len 256" in found.message


def test_engines_that_hand_out_no_hidden_states(exported_head):
    head = read_head(exported_head)
    for config, status, part in (
        (MixtralConfig(), "warn", f"{SGLANG} and {VLLM} can't serve a head for mixtral"),
        (Gemma3TextConfig(), "warn", f"{VLLM} can't serve a head for gemma3_text: .*; {SGLANG} does"),
        (Olmo2Config(), "warn", f"^{SGLANG} can't serve .*; {VLLM} does"),
        (Phi3Config(), "pass", "hand phi3's hidden states"),
        (CohereConfig(), "pass", "not looked at"),
    ):
        found = engines(head, Target("target", config, None))
        assert found.status == status and re.search(part, found.message), found


def test_a_dtype_that_sglang_makes_of_the_target_alone(exported_head, tmp_path):
    """Of float32 it makes float16, or bfloat16 where that is Gemma's."""
    edit(shutil.copytree(exported_head, tmp_path / "head"), setting(torch_dtype=None, dtype="float32"))
    head = read_head(tmp_path / "head")
    for config, of_target in (
        (Qwen2Config(), "float16"),
        (Qwen2Config(dtype="float32"), "float16"),
        (Qwen2Config(dtype="bfloat16"), "bfloat16"),
        (Gemma3TextConfig(dtype=torch.float32), "bfloat16"),
        (plan_config("openai/gpt-oss-20b"), "bfloat16"),  # MXFP4, without a dtype
    ):
        found = dtype(head, Target("target", config, None))
        assert found.status == ("pass" if of_target == "float16" else "warn"), found
        assert found.status == "pass" or f"makes float16 of the head and {of_target} of the target" in found.message


def test_a_window_that_vllm_lends_to_the_head(exported_head, tmp_path):
    head = read_head(exported_head)
    for config, seen in (
        (MistralConfig(sliding_window=4096), 4096),
        (Qwen3MoeConfig(use_sliding_window=True, sliding_window=100), 100),
        (Qwen2Config(use_sliding_window=True, sliding_window=100, max_window_layers=0), 100),
        (MistralConfig(sliding_window=None), None),
        (Phi3Config(sliding_window=2048, max_position_embeddings=2048), None),
        (Qwen2Config(use_sliding_window=True, sliding_window=100, max_window_layers=2), None),
        (Gemma3TextConfig(), None),
    ):
        found = window(head, Target("target", config, None))
        assert found.status == ("warn" if seen else "pass"), (config, found)
        assert not seen or f"train with draft.window={seen}" in found.message
    edit(shutil.copytree(exported_head, tmp_path / "head"), WINDOWED, foreign=True)
    found = window(read_head(tmp_path / "head"), Target("target", MistralConfig(), None))
    assert "draft.window" not in found.message  # one of its own, which vLLM goes by
    assert "--speculative-draft-attention-backend fa3 --speculative-eagle-topk 1 alone" in found.message
