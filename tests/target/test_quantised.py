"""Quantised checkpoints are the weights that they stand for, in load_target and tensor by tensor."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from target.family_models import small_model
from target.test_families import DRAFT_IDS, packed_rows
from transformers import AutoModelForCausalLM, Mxfp4Config

from eagle3_xla.errors import UserError
from eagle3_xla.target.experts import route_experts
from eagle3_xla.target.model import Target, load_target, open_target

BLOCK = (48, 40)  # divides no matrix of the small models
WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True}


def by_block(weight):
    """(float8, scale of each block, what they stand for)"""
    rows, columns = (torch.arange(size) // of for size, of in zip(weight.shape, BLOCK))
    scale = torch.rand(int(rows[-1]) + 1, int(columns[-1]) + 1) + 0.5
    quantised = (weight / scale[rows][:, columns]).to(torch.float8_e4m3fn)
    return quantised, scale, quantised.float() * scale[rows][:, columns]


def by_channel(weight):
    scale = torch.rand(weight.shape[0], 1) + 0.5
    quantised = (weight / scale).to(torch.float8_e4m3fn)
    return quantised, scale, quantised.float() * scale


def by_tensor(weight):
    quantised = (weight / 0.75).to(torch.float8_e4m3fn)
    return quantised, torch.tensor([0.75]), quantised.float() * 0.75


def compressed(strategy, **more):
    weights = WEIGHTS | {"strategy": strategy, **more}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}


ROTATED = {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}
HADAMARD = {"transform_config": {"config_groups": {"R1": ROTATED}}}
FORMS = {
    "block": (by_block, "_scale_inv", {"quant_method": "fp8", "weight_block_size": BLOCK}),
    "compressed, channels": (by_channel, "_scale", compressed("channel")),
    "compressed, tensors": (by_tensor, "_scale", compressed("tensor") | {"transform_config": {}}),
    "compressed, blocks": (by_block, "_scale", compressed("block", block_structure=BLOCK)),
}


def states_of(target) -> list[torch.Tensor]:
    return list(target.states(**packed_rows()))


@pytest.mark.parametrize("family", ["qwen3, yarn", "qwen3_moe"])
@pytest.mark.parametrize("form", FORMS)
def test_fp8(form, family, tmp_path):
    quantise, suffix, config = FORMS[form]
    model = small_model(family)
    model.save_pretrained(tmp_path)
    tensors, meant = load_file(tmp_path / "model.safetensors"), {}
    for name in [name for name in tensors if "_proj.weight" in name]:
        tensors[name], tensors[f"{name}{suffix}"], meant[name] = quantise(tensors[name])
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": config}
    (tmp_path / "config.json").write_text(json.dumps(written))
    model.load_state_dict(meant, strict=False)
    model.config._attn_implementation = "sdpa"
    expected = states_of(Target(model, DRAFT_IDS))
    opened = open_target(str(tmp_path), torch.float32, DRAFT_IDS)
    route_experts(opened.model, 2, 1)  # as over a tp of 2
    for target in (Target(load_target(str(tmp_path), torch.float32), DRAFT_IDS), opened.place(lambda tensor: tensor)):
        for ours, theirs in zip(states_of(target), expected):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path):
    model = small_model("gpt_oss")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, outer = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, outer, inner // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(120, 125, (experts, outer, inner // 32), dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | {"quantization_config": {"quant_method": "mxfp4"}}))
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True), attn_implementation="eager"
    )
    ours = load_target(str(tmp_path), torch.float32)
    for (name, expected), (_, parameter) in zip(theirs.named_parameters(), ours.named_parameters()):
        assert torch.equal(parameter, expected), name
    opened = open_target(str(tmp_path), torch.float32, DRAFT_IDS)
    prints = {opened.fingerprint()}
    route_experts(opened.model, 2, 1)
    for x, y in zip(states_of(opened.place(lambda tensor: tensor)), states_of(Target(ours, DRAFT_IDS))):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
    for changed in ("blocks", "scales"):
        tensors[f"model.layers.1.mlp.experts.down_proj_{changed}"] ^= 1
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        prints.add(open_target(str(tmp_path), torch.float32, DRAFT_IDS).fingerprint())
    assert len(prints) == 3


@pytest.mark.parametrize(
    "config, line",
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised by GPTQ, which is not read here; take the bfloat16 original"),
        ({"quant_method": "awq", "bits": 4}, "quantised by AWQ"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantised by bitsandbytes"),
        (compressed("group", type="int", num_bits=4), "compressed-tensors with int4 weights in groups"),
        (compressed("channel") | HADAMARD, r"with rotations in the forward pass \(transform_config\)"),
        ({"quant_method": "fp8"}, "model.layers.0.self_attn.q_proj.weight is FP8 without"),
        (None, "model.layers.0.self_attn.q_proj.weight is int8, of an unknown quantisation"),
    ],
    ids=["GPTQ", "AWQ", "bitsandbytes", "int4", "rotations", "no scales", "integers"],
)
def test_refused(config, line, tmp_path):
    small_model("qwen2").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn if config else torch.int8)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | ({"quantization_config": config} if config else {})))
    with pytest.raises(UserError, match=line):
        open_target(str(tmp_path), torch.float32, DRAFT_IDS).place(lambda tensor: tensor)
