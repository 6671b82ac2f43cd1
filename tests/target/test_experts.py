"""RoutedExperts against transformers' own modules, in float32."""

import pytest
import torch
from target.family_models import small_model

from eagle3_xla.target.experts import RoutedExperts

MOE = {"qwen3_moe": "mlp", "qwen3_moe, weights as they are": "mlp", "mixtral": "block_sparse_moe", "gpt_oss": "mlp"}


@pytest.mark.parametrize("name", MOE)
@pytest.mark.parametrize("parts, groups", [(1, 1), (4, 2)])
@pytest.mark.parametrize("crowded", [False, True], ids=["random", "all tokens to one expert"])
def test_experts_are_transformers_module(name, parts, groups, crowded):
    module = getattr(small_model(name).model.layers[1], MOE[name])
    hidden = torch.randn(4, 37, 64)
    if crowded:
        hidden = hidden * 0.01 + hidden[:1, :1]
    expected, _ = module(hidden)
    ours, _ = RoutedExperts(module, parts, groups)(hidden)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
