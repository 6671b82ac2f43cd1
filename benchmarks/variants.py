"""Variants of the training that are not in the product: each replaces something of it for one run (recipes.py)."""

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from eagle3_xla.draft.model import Eagle3Head
from eagle3_xla.train import setup
from eagle3_xla.train.optimizer import AdamW


def _plain_start(recipe, backend, data, target, head, warm_head, lm_head_rows, states_of):
    """torch's own initialisation, no learning rate of its own for fc's inputs."""
    torch.manual_seed(recipe.train.seed)
    for module in head.modules():
        if isinstance(module, torch.nn.Linear):
            module.reset_parameters()
    return {}


class _FrozenLmHead(AdamW):
    def step(self) -> torch.Tensor:
        self.parameters["lm_head.weight"].grad.zero_()
        return super().step()


class _Muon(AdamW):
    """Muon (Jordan et al., 2024) on the 2-D weights of fc and the layer, AdamW on lm_head and the norms."""

    def __init__(self, parameters, config, total_steps, backend, lr_scale, state=None):
        super().__init__(parameters, config, total_steps, backend, lr_scale, state)
        inner = {name: p for name, p in parameters.items() if p.ndim == 2 and name != "lm_head.weight"}
        self.momentum = {name: backend.like(torch.zeros(p.shape), p) for name, p in inner.items()}

    def changing(self):
        return [*super().changing(), *self.momentum.values()]

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        before = {name: self.parameters[name].clone() for name in self.momentum}
        gradients = {name: self.parameters[name].grad.clone() for name in self.momentum}
        norm = super().step()
        lr = self.lr(self.step_count)
        for name, moment in self.momentum.items():
            moment.mul_(0.95).add_(gradients[name])
            update = _orthogonal(gradients[name] + 0.95 * moment)
            scale = 0.2 * max(update.shape) ** 0.5  # the RMS of an update is AdamW's (Moonlight)
            rate = lr * self.lr_scale[name] / self.lr_scale[name].mean() if name in self.lr_scale else lr
            self.parameters[name].copy_(before[name] - rate * scale * update)
        return norm


def _orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz iteration towards the nearest orthogonal matrix."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x.bfloat16() if x.is_cuda else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).float()


class _Ema(AdamW):
    """Weights averaged over about the last 100 steps; `write_averages` exports them."""

    averages: dict[str, torch.Tensor] = {}  # of the newest run

    def __init__(self, parameters, config, total_steps, backend, lr_scale, state=None):
        super().__init__(parameters, config, total_steps, backend, lr_scale, state)
        _Ema.averages = {name: backend.like(p.detach().clone(), p) for name, p in parameters.items()}

    def changing(self):
        return [*super().changing(), *_Ema.averages.values()]

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        norm = super().step()
        for name, p in self.parameters.items():
            _Ema.averages[name].lerp_(p, 1 - 0.99)
        return norm


def _on_aux(change):
    """A features() of the head that sees changed aux states while it learns."""
    plain = Eagle3Head.features

    def features(self, aux):
        return plain(self, change(aux) if torch.is_grad_enabled() else aux)

    return patch.object(Eagle3Head, "features", features)


def _noise(aux):
    scale = aux.square().mean((0, 1), keepdim=True).sqrt()
    return aux + 0.1 * scale * torch.randn_like(aux)


def _dropout(aux):
    return torch.nn.functional.dropout(aux, 0.1)


OF_START = {  # the settings that the weights before the first step depend on, of sections that have others too
    "train": ("init", "init_rows", "batch_size", "seed"),
    "loss": ("rows",),
    "xla": ("device", "autocast"),
}


@contextlib.contextmanager
def shared_starts(folder: Path, code: str):
    """Runs whose heads begin alike solve their start once; `folder` keeps it. code: fingerprint of what solves it."""
    solve = setup._initialise

    def initialise(recipe, backend, data, target, head, *given):
        settings = dataclasses.asdict(recipe)
        of_start = {section: {name: settings[section][name] for name in names} for section, names in OF_START.items()}
        of_start |= {section: settings[section] for section in ("target", "data", "draft")}
        what = json.dumps([of_start, code], sort_keys=True)
        file = folder / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.pt"
        if file.exists():
            weights, lr_scale = torch.load(file)
            head.load_state_dict(weights)
            return lr_scale
        lr_scale = solve(recipe, backend, data, target, head, *given)
        folder.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{recipe.train.out.replace('/', '-')}")  # another run may solve the same
        torch.save((head.state_dict(), lr_scale), partial)
        partial.replace(file)
        return lr_scale

    with patch.object(setup, "_initialise", initialise):
        yield


PATCHES = {
    "plain_start": lambda: patch.object(setup, "_initialise", _plain_start),
    "frozen_lm_head": lambda: patch.object(setup, "AdamW", _FrozenLmHead),
    "muon": lambda: patch.object(setup, "AdamW", _Muon),
    "ema": lambda: patch.object(setup, "AdamW", _Ema),
    "noise": lambda: _on_aux(_noise),
    "dropout": lambda: _on_aux(_dropout),
}
KEPT_IN_MEMORY = ("muon", "ema")  # what these patches keep is in no checkpoint


def write_averages(file: Path) -> None:
    """Put the averages of `_Ema` into an exported head."""
    with safe_open(file, framework="pt") as saved:
        tensors, about = {name: saved.get_tensor(name) for name in saved.keys()}, saved.metadata()
    for name, average in _Ema.averages.items():
        tensors[name] = average.to("cpu", tensors[name].dtype).contiguous()
    save_file(tensors, file, metadata=about)
