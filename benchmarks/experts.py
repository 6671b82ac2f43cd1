"""Mixture-of-experts layers, blocks of one expert each against every token through every expert, by the TPU compiler.

    nice -n 19 python benchmarks/experts.py [RECIPE ...]

Compiles the recipe's target alone, forward, with 8 and with 12 of its layers, in both forms; prints what one more layer
costs on its slice and the memory of 12. Needs the `plan` extra, no TPU.
"""

import argparse
import os
import subprocess
import sys
from typing import Any

import torch

from eagle3_xla.config import load_recipe
from eagle3_xla.plan.depth import with_layers
from eagle3_xla.plan.lowering import lower_target
from eagle3_xla.target.experts import RoutedExperts
from eagle3_xla.target.families import MIN_LAYERS
from eagle3_xla.target.known import plan_config

LAYERS = (MIN_LAYERS, MIN_LAYERS + 4)
FORMS = ("blocks", "every expert")
HEADS = ("recipe", "form", "ms a layer", "matmuls", "memory", "collectives", "HBM GiB")
RECIPES = ("qwen3-30b-a3b-v4-32", "gpt-oss-20b-v6e-8")


def every_expert(self: RoutedExperts, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
    """RoutedExperts.forward as three matmuls of all experts; those that a token did not choose count 0."""
    x = hidden.reshape(self.groups, -1, hidden.shape[-1])  # [G, N, H]
    weights, chosen = self._route(x)
    one_hot = (chosen[..., None] == torch.arange(self.experts, device=x.device)).to(x.dtype)
    share = torch.einsum("gnk,gnke->gne", weights, one_hot)
    gate = torch.einsum("gnh,epfh->gpnef", x, self.gate)
    up = torch.einsum("gnh,epfh->gpnef", x, self.up)
    if self.gpt_oss:
        gate = (gate + self.gate_bias.transpose(0, 1)[None, :, None]).clamp(max=7.0)
        up = (up + self.up_bias.transpose(0, 1)[None, :, None]).clamp(-7.0, 7.0)
        inner = (up + 1) * gate * torch.sigmoid(gate * 1.702)
    else:
        inner = self.activation(gate) * up
    inner = inner * share[:, None, :, :, None]
    output = torch.einsum("gpnef,ephf->gpnh", inner, self.down).sum(1)
    if self.gpt_oss:
        output = output + torch.einsum("gne,eh->gnh", share, self.down_bias)
    return output.view(hidden.shape), None


def measure(name: str, form: str) -> list[str]:
    """A row of the table. In a process of its own: it has the slice's devices."""
    recipe = load_recipe(name, [])
    os.environ.update(PJRT_DEVICE="CPU", CPU_NUM_DEVICES=str(recipe.xla.dp * recipe.xla.tp))
    from eagle3_xla.xla.time_model import model_time
    from eagle3_xla.xla.tpu import compile_for, find_topology

    topology, target = find_topology(recipe.plan.topology), plan_config(recipe.target.path)
    if form == "every expert":
        RoutedExperts.forward = every_expert

    def compiled(layers: int) -> Any:
        lowered = lower_target(recipe, with_layers(target, layers), topology.coordinates())
        return compile_for(topology, lowered.hlo, lowered.state, recipe.plan.xla_flags)

    few, more = map(compiled, LAYERS)
    times = [model_time(executable.text, topology) for executable in (few, more)]
    count = LAYERS[1] - LAYERS[0]
    parts = ("total", "matmul", "memory", "collectives")
    cost = [(getattr(times[1], part) - getattr(times[0], part)) / count * 1e3 for part in parts]
    return [f"`{name}`", form, *(f"{ms:.2f}" for ms in cost), f"{more.memory.total / 1024**3:.1f}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.form:
        return print(f"| {' | '.join(measure(options.recipes[0], options.form))} |")
    print(f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|", sep="\n", flush=True)
    for name in options.recipes:
        for form in FORMS:
            subprocess.run([sys.executable, __file__, name, "--form", form], check=True)


if __name__ == "__main__":
    main()
