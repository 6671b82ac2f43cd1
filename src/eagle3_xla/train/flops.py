"""The arithmetic that a step's maths needs, whatever a compiler makes of it: the numerator of MFU."""

from typing import Any

from eagle3_xla.config import Recipe
from eagle3_xla.draft.model import draft_config
from eagle3_xla.target.families import inner_widths


def flops_per_token(target: Any, recipe: Recipe, ttt_length: int | None = None) -> float:
    """FLOPs of one position of a micro-step; target: its Hugging Face config; ttt_length: `loss.ttt_length` by default.

    A matmul with an [m, n] weight is 2 m n. The target runs forward, unless `train.reuse_states`: its layers, the
    full vocabulary's logits; I is then as wide as what a token's chosen experts have together. The head runs forward
    and backward (3 times forward, nothing for rematerialisation): fc once, its layer and the draft vocabulary's logits
    at every TTT step, all of which but the first only at the anchors. Causal attention sees half of T keys on average,
    with a window w of the head w - w^2 / 2T of them. Target and head have each their own A and K.

        target = 2 (L (H (2 A + 2 K) + 3 H I) + H V) + 2 L A T        A = heads * head_dim, K = kv_heads * head_dim
        draft  = 3 (2 * 3 H H + (1 + (ttt - 1) anchors) (2 (2 H (A + 2 K) + A H + 3 H I + H D) + 4 A keys))
        MFU    = flops_per_token * tokens per second / (chips * peak bf16 FLOP/s of a chip)
    """
    hidden, inner, length, ttt = (
        target.hidden_size,
        target.intermediate_size,
        recipe.data.row_length,
        ttt_length or recipe.loss.ttt_length,
    )
    head_dim = getattr(target, "head_dim", None) or hidden // target.num_attention_heads
    queries, keys = target.num_attention_heads * head_dim, target.num_key_value_heads * head_dim
    attention = target.num_hidden_layers * hidden * (2 * queries + 2 * keys)
    frozen = 2 * (attention + 3 * hidden * sum(inner_widths(target)) + hidden * target.vocab_size)
    frozen += target.num_hidden_layers * 2 * queries * length
    frozen = 0 if recipe.train.reuse_states else frozen
    draft = draft_config(target, recipe.data.draft_vocab_size, recipe.draft)
    queries, keys = draft.num_attention_heads * draft.head_dim, draft.num_key_value_heads * draft.head_dim
    step = 2 * hidden * (queries + 2 * keys) + queries * hidden + 3 * hidden * inner
    window = min(recipe.draft.window or length, length)
    step = 2 * (step + hidden * recipe.data.draft_vocab_size) + 4 * queries * (window - window**2 / (2 * length))
    return frozen + 3 * (2 * 3 * hidden * hidden + (1 + (ttt - 1) * recipe.loss.anchors) * step)
