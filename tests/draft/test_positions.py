"""A head knows the differences of positions alone (RoPE): an offset of a whole text changes and teaches nothing."""

import torch
from transformers import LlamaConfig

from eagle3_xla.draft.attention import causal_attention
from eagle3_xla.draft.model import Eagle3Head, draft_config

OFFSET, LENGTH = 5000, 24


def test_an_offset_of_all_positions_changes_nothing():
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192, "vocab_size": 50}
    head = Eagle3Head(draft_config(LlamaConfig(hidden_size=64, intermediate_size=96, **sizes), 50)).double()
    hidden, embeds = torch.randn(2, 1, LENGTH, 64, dtype=torch.float64)
    embedded, documents = head.embedded(embeds), torch.zeros(1, LENGTH)

    def two_steps(positions: torch.Tensor) -> torch.Tensor:
        key0, value0 = head.context(embedded, hidden, positions)
        keys, values, state = [], [], hidden
        for k in range(2):
            state, key, value = head.ttt_step(
                k,
                embedded,
                state,
                positions + k,
                lambda query: causal_attention(query, key0, value0, documents),
                keys,
                values,
            )
            keys, values = [key] * k, [value] * k
        return state

    positions = torch.arange(LENGTH)[None]
    torch.testing.assert_close(two_steps(positions), two_steps(positions + OFFSET), atol=1e-3, rtol=1e-3)
    gap = positions + (positions >= LENGTH // 2) * OFFSET  # what a gap in the middle does
    assert (two_steps(positions) - two_steps(gap)).abs().max() > 0.1
