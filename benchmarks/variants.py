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
from eagle3_xla.train.optimizer import Optimizer


def _plain_start(recipe, backend, data, target, head, warm_head, lm_head_rows, states_of):
    """torch's own initialisation, no learning rate of its own for fc's inputs."""
    torch.manual_seed(recipe.train.seed)
    for module in head.modules():
        if isinstance(module, torch.nn.Linear):
            module.reset_parameters()
    return {}


class _FrozenLmHead(Optimizer):
    def step(self) -> torch.Tensor:
        self.parameters["lm_head.weight"].grad.zero_()
        return super().step()


class _Ema(Optimizer):
    """Weights averaged over about the last 100 steps; `write_averages` exports them."""

    averages: dict[str, torch.Tensor] = {}  # of the newest run

    def __init__(self, head, config, total_steps, backend, lr_scale, state=None):
        super().__init__(head, config, total_steps, backend, lr_scale, state)
        _Ema.averages = {name: backend.like(p.detach().clone(), p) for name, p in self.parameters.items()}

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
    "frozen_lm_head": lambda: patch.object(setup, "Optimizer", _FrozenLmHead),
    "ema": lambda: patch.object(setup, "Optimizer", _Ema),
    "noise": lambda: _on_aux(_noise),
    "dropout": lambda: _on_aux(_dropout),
}
KEPT_IN_MEMORY = ("ema",)  # what these patches keep is in no checkpoint


def write_averages(file: Path) -> None:
    """Put the averages of `_Ema` into an exported head."""
    with safe_open(file, framework="pt") as saved:
        tensors, about = {name: saved.get_tensor(name) for name in saved.keys()}, saved.metadata()
    for name, average in _Ema.averages.items():
        tensors[name] = average.to("cpu", tensors[name].dtype).contiguous()
    save_file(tensors, file, metadata=about)
