"""The optimizer's updates beside torch's own."""

from collections.abc import Iterator

import pytest
import torch
from transformers import Qwen2Config

from eagle3_xla.draft.model import Eagle3Head, draft_config
from eagle3_xla.train.config import TrainConfig
from eagle3_xla.train.optimizer import MOMENTUM, Optimizer
from eagle3_xla.xla.config import XlaConfig
from eagle3_xla.xla.plain import PlainBackend

STEPS = 6
HEADS, HEAD_DIM = 3, 8


def head() -> Eagle3Head:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": HEADS, "num_key_value_heads": 1}
    torch.manual_seed(0)
    return Eagle3Head(draft_config(Qwen2Config(vocab_size=64, num_hidden_layers=8, **sizes), 32))


SHAPES = {name: p.shape for name, p in head().named_parameters()}
INNER = [name for name, shape in SHAPES.items() if len(shape) > 1 and name != "lm_head.weight"]


def made(config: TrainConfig, lr_scale: dict | None = None, autocast: bool = False) -> Optimizer:
    return Optimizer(head(), config, STEPS, PlainBackend(XlaConfig(device="cpu", autocast=autocast)), lr_scale or {})


def of_heads(name: str, weight: torch.Tensor) -> list[torch.Tensor]:
    """The matrices that Muon makes orthogonal: each attention head's share, or the whole."""
    if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
        return [*weight.split(HEAD_DIM)]
    return [*weight.split(HEAD_DIM, dim=1)] if name.endswith("o_proj.weight") else [weight]


def gradients(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def stepped(ours: Optimizer) -> Iterator[int]:
    for step in range(STEPS):
        for name, gradient in gradients(step).items():
            ours.parameters[name].grad = gradient
        ours.step()
        yield step


def clipped(step: int, config: TrainConfig) -> dict[str, torch.Tensor]:
    leaves = {name: torch.nn.Parameter(torch.zeros_like(x)) for name, x in gradients(step).items()}
    for name, gradient in gradients(step).items():
        leaves[name].grad = gradient
    torch.nn.utils.clip_grad_norm_(leaves.values(), config.max_grad_norm)
    return {name: leaf.grad for name, leaf in leaves.items()}


def test_adamw_is_torchs():
    config = TrainConfig(lr=1e-2, warmup=0.4, weight_decay=0.1, beta2=0.99)
    ours = made(config)
    copies = {name: torch.nn.Parameter(p.detach().clone()) for name, p in ours.parameters.items()}
    matrices, norms = ([p for p in copies.values() if (p.ndim > 1) is decayed] for decayed in (True, False))
    groups = [{"params": matrices}, {"params": norms, "weight_decay": 0.0}]
    peer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay)
    for step in stepped(ours):
        for name, gradient in clipped(step, config).items():
            copies[name].grad = gradient
        for group in peer.param_groups:
            group["lr"] = ours.lr_at(step + 1)
        peer.step()
    for name, parameter in ours.parameters.items():
        torch.testing.assert_close(parameter, copies[name])


@pytest.mark.parametrize("autocast", [False, True])
def test_muon_is_torchs_for_inner_matrices(autocast):
    """torch's multiplies in bfloat16 throughout, which moves singular values by a few hundredths."""
    config = TrainConfig(lr=1e-2, warmup=0.4, optimizer="muon")
    ours = made(config, autocast=autocast)
    start = {name: p.detach().clone() for name, p in ours.parameters.items()}
    parts = {name: [torch.nn.Parameter(x.clone()) for x in of_heads(name, start[name])] for name in INNER}
    assert ours.by_muon == {*INNER} and {*ours.second} == {*SHAPES} - {*INNER}
    everything = [part for of_one in parts.values() for part in of_one]
    peer = torch.optim.Muon(everything, weight_decay=0.0, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
    for step in stepped(ours):
        of_step = clipped(step, config)
        for name in INNER:
            for part, gradient in zip(parts[name], of_heads(name, of_step[name]), strict=True):
                part.grad = gradient
        peer.param_groups[0]["lr"] = ours.lr_at(step + 1)
        peer.step()
    for name in INNER:
        before, after = of_heads(name, start[name]), of_heads(name, ours.parameters[name].detach())
        for was, is_now, part in zip(before, after, parts[name], strict=True):
            moved = part.detach() - was
            assert (is_now - was - moved).norm() < (0.04 if autocast else 0.02) * moved.norm(), name

    adamw = made(TrainConfig(lr=1e-2, warmup=0.4))
    assert len([*stepped(adamw)]) == STEPS
    for name in {*SHAPES} - {*INNER}:
        assert torch.equal(ours.parameters[name], adamw.parameters[name])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_columns_rate_scales_its_update(optimizer):
    scale = torch.linspace(0.5, 4, SHAPES["fc.weight"][1])
    moved = []
    for lr_scale in ({}, {"fc.weight": scale}):
        ours = made(TrainConfig(lr=1e-2, optimizer=optimizer), lr_scale)
        before = ours.parameters["fc.weight"].detach().clone()
        next(stepped(ours))
        moved.append(ours.parameters["fc.weight"].detach() - before)
    expected = scale / scale.mean() if optimizer == "muon" else scale
    torch.testing.assert_close(moved[1], moved[0] * expected, rtol=1e-3, atol=1e-6)
