"""Packed linear layers: the same logits, the target's weights not twice in memory."""

import copy

import torch

from eagle3_xla.draft.model import Eagle3Head, draft_config
from eagle3_xla.target.model import load_target
from eagle3_xla.target.packed import pack


def test_the_logits_are_those_of_the_plain_layers(small_target):
    plain = load_target(str(small_target), torch.float32)
    packed, head = copy.deepcopy(plain), torch.nn.Sequential(torch.nn.Linear(64, 96))
    plain_head = copy.deepcopy(head)
    pack(packed, head)
    pack(packed, head)
    ids = torch.arange(24).view(2, 12) * 101
    with torch.inference_mode():
        torch.testing.assert_close(packed(ids).logits, plain(ids).logits, atol=2e-4, rtol=2e-4)
        hidden = torch.randn(3, 64)
        torch.testing.assert_close(head(hidden), plain_head(hidden), atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in packed.model.layers.parameters()) < 0.1 * sum(
        p.numel() for p in plain.model.layers.parameters()
    )
    assert torch.equal(packed.get_output_embeddings().weight, plain.get_output_embeddings().weight)
    assert torch.equal(head[0].weight, plain_head[0].weight)


def test_of_a_head_what_it_calls_is_packed(small_target):
    model = load_target(str(small_target), torch.float32)
    head = Eagle3Head(draft_config(model.config, 96))
    pack(model, head)
    packed = [name for name, module in head.named_modules() if "forward" in vars(module)]
    layer = ["self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert packed == ["fc", *(f"midlayer.{name}" for name in layer), "lm_head"]


def test_other_types_are_left_alone(small_target):
    model = load_target(str(small_target), torch.bfloat16)
    pack(model, torch.nn.Linear(4, 4, dtype=torch.bfloat16))
    assert all(p.numel() for p in model.parameters())
