"""A target's config with fewer layers, for figures that grow evenly with their number."""

import copy
from typing import Any

from eagle3_xla.target.families import routed_layers

BY_LAYER = ("layer_types", "no_rope_layers")  # lists with an entry for each layer


def layer_kinds(config: Any) -> list[tuple]:
    """What distinguishes each layer from others: mixture of experts or not, its window, its rotation."""
    every = config.num_hidden_layers
    return list(zip(routed_layers(config), *(getattr(config, name, None) or [None] * every for name in BY_LAYER)))


def layer_period(config: Any) -> int:
    """After how many layers their kinds repeat: 1 where all are alike, 2 where every other one has a window."""
    kinds = layer_kinds(config)
    return next(p for p in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % p] for i in range(len(kinds))))


def with_layers(config: Any, layers: int) -> Any:
    """A copy of the config with the first `layers` layers."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    for name in BY_LAYER:
        if getattr(config, name, None):
            setattr(config, name, getattr(config, name)[:layers])
    if getattr(config, "mlp_only_layers", None):
        config.mlp_only_layers = [layer for layer in config.mlp_only_layers if layer < layers]
    return config
