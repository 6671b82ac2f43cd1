"""The optimizer's updates beside torch's own."""

import pytest
import torch

from eagle3_xla.train.config import TrainConfig
from eagle3_xla.train.optimizer import MOMENTUM, Optimizer
from eagle3_xla.xla.config import XlaConfig
from eagle3_xla.xla.plain import PlainBackend

SHAPES = {"fc.weight": (24, 72), "midlayer.mlp.down_proj.weight": (40, 24), "lm_head.weight": (64, 24)}
SHAPES["norm.weight"] = (24,)
STEPS = 6


def made(config: TrainConfig, lr_scale: dict | None = None, autocast: bool = False) -> Optimizer:
    generator = torch.Generator().manual_seed(0)
    parameters = {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    return Optimizer(
        parameters, config, STEPS, PlainBackend(XlaConfig(device="cpu", autocast=autocast)), lr_scale or {}
    )


def gradients(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def stepped_beside(ours: Optimizer, peer: torch.optim.Optimizer, of_peer: dict[str, torch.nn.Parameter]) -> None:
    """Both through STEPS updates, the peer with torch's clipping and our learning rate."""
    copies = {name: of_peer.get(name, torch.nn.Parameter(p.detach().clone())) for name, p in ours.parameters.items()}
    for step in range(STEPS):
        for name, gradient in gradients(step).items():
            ours.parameters[name].grad, copies[name].grad = gradient, gradient.clone()
        norm = ours.step()
        clipped = torch.nn.utils.clip_grad_norm_(copies.values(), ours.config.max_grad_norm)
        assert torch.allclose(norm, clipped)
        for group in peer.param_groups:
            group["lr"] = ours.lr_at(step + 1)
        peer.step()


def test_adamw_is_torchs():
    config = TrainConfig(lr=1e-2, warmup=0.4, weight_decay=0.1, beta2=0.99)
    ours = made(config)
    copies = {name: torch.nn.Parameter(p.detach().clone()) for name, p in ours.parameters.items()}
    decayed = [p for p in copies.values() if p.ndim > 1]
    groups = [{"params": decayed}, {"params": [copies["norm.weight"]], "weight_decay": 0.0}]
    peer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay)
    stepped_beside(ours, peer, copies)
    for name, parameter in ours.parameters.items():
        torch.testing.assert_close(parameter, copies[name])


@pytest.mark.parametrize("autocast", [False, True])
def test_muon_is_torchs_for_inner_matrices(autocast):
    """torch's multiplies in bfloat16 throughout, which moves singular values by a few hundredths."""
    config = TrainConfig(lr=1e-2, warmup=0.4, optimizer="muon")
    ours = made(config, autocast=autocast)
    start = {name: p.detach().clone() for name, p in ours.parameters.items()}
    inner = {name: torch.nn.Parameter(start[name].clone()) for name in [*SHAPES][:2]}
    assert ours.by_muon == {*inner} and {*ours.second} == {*SHAPES} - {*inner}
    peer = torch.optim.Muon(inner.values(), weight_decay=0.0, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
    stepped_beside(ours, peer, inner)
    for name, parameter in inner.items():
        ours_moved, moved = (p.detach() - start[name] for p in (ours.parameters[name], parameter))
        assert (ours_moved - moved).norm() < (0.04 if autocast else 0.02) * moved.norm()

    adamw = made(TrainConfig(lr=1e-2, warmup=0.4))
    for step in range(STEPS):
        for name, gradient in gradients(step).items():
            adamw.parameters[name].grad = gradient
        adamw.step()
    for name in {*SHAPES} - {*inner}:
        assert torch.equal(ours.parameters[name], adamw.parameters[name])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_columns_rate_scales_its_update(optimizer):
    scale = torch.linspace(0.5, 4, SHAPES["fc.weight"][1])
    moved = []
    for lr_scale in ({}, {"fc.weight": scale}):
        ours = made(TrainConfig(lr=1e-2, optimizer=optimizer), lr_scale)
        before = ours.parameters["fc.weight"].detach().clone()
        for name, gradient in gradients(0).items():
            ours.parameters[name].grad = gradient
        ours.step()
        moved.append(ours.parameters["fc.weight"].detach() - before)
    expected = scale / scale.mean() if optimizer == "muon" else scale
    torch.testing.assert_close(moved[1], moved[0] * expected, rtol=1e-3, atol=1e-6)
