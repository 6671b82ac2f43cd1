"""The EAGLE3 head, LlamaForCausalLMEagle3 as SGLang and vLLM load it; parameter names are the exported ones."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import LlamaConfig, PretrainedConfig
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from eagle3_xla.draft.attention import merge_own_rows
from eagle3_xla.draft.config import DraftConfig
from eagle3_xla.errors import UserError
from eagle3_xla.target.families import is_longrope


def draft_config(
    target_config: PretrainedConfig, draft_vocab_size: int, shape: DraftConfig | None = None
) -> LlamaConfig:
    """A one-layer Llama config with the target's sizes, RoPE and context length, but for the attention of `shape`.

    Of a longrope target, which is used within its original context, the head has the base alone. What `shape` adds has
    the names under which engines read it (`Eagle3Head`), but for `qk_norm`, which is an architecture there.

    Raises UserError when the attention's heads don't fit each other.
    """
    shape = shape or DraftConfig()
    heads = shape.attention_heads or target_config.num_attention_heads
    kv_heads = shape.key_value_heads or target_config.num_key_value_heads
    of_target = getattr(target_config, "head_dim", None)
    of_target = of_target or target_config.hidden_size // target_config.num_attention_heads
    head_dim = shape.head_dim or of_target
    # That the width be a multiple of the heads is what the engines' reader of config.json asks, whatever head_dim is.
    if heads % kv_heads or head_dim % 2 or target_config.hidden_size % heads:
        raise UserError(
            f"settings draft.attention_heads, key_value_heads and head_dim: {heads} heads, {kv_heads} key-value heads, "
            f"head_dim {head_dim}; the first must be a multiple of the second and divide the hidden size "
            f"{target_config.hidden_size}, and head_dim even"
        )
    more: dict[str, bool | int] = dict.fromkeys(("fc_norm", "norm_output"), True) if shape.variant == "eagle3.1" else {}
    more |= {"sliding_window": shape.window} if shape.window else {}
    more |= {"qk_norm": True} if shape.qk_norm else {}
    return LlamaConfig(
        hidden_size=target_config.hidden_size,
        intermediate_size=target_config.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=target_config.vocab_size,
        draft_vocab_size=draft_vocab_size,
        max_position_embeddings=target_config.max_position_embeddings,
        rms_norm_eps=target_config.rms_norm_eps,
        rope_theta=target_config.rope_theta,
        rope_scaling=None if is_longrope(target_config) else getattr(target_config, "rope_scaling", None),
        bos_token_id=target_config.bos_token_id,
        eos_token_id=target_config.eos_token_id,
        tie_word_embeddings=False,
        **more,
    )


class Attention(nn.Module):
    """q, k, v from concat(embedding, hidden) [.., 2H] without bias; with `qk_norm` each attention head's query and key
    are normed before RoPE.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(2 * config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(2 * config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(2 * config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)
        if getattr(config, "qk_norm", False):
            self.q_norm = LlamaRMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(config.head_dim, config.rms_norm_eps)

    def embedded(self, embeds: torch.Tensor) -> list[torch.Tensor]:
        """embeds [.., H], normed -> their share of the query, the key and the value, [.., heads * D] each."""
        return [linear(embeds, proj.weight[:, : embeds.shape[-1]]) for proj in (self.q_proj, self.k_proj, self.v_proj)]

    def project(
        self, embedded: Sequence[torch.Tensor], hidden: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """embedded: as above, of [B, T]; hidden [B, T, H], normed -> query [B, T, heads, D], key and value
        [B, T, kv_heads, D], rotated."""
        rotated = []
        for share, proj in zip(embedded, (self.q_proj, self.k_proj, self.v_proj)):
            x = share + linear(hidden, proj.weight[:, hidden.shape[-1] :])
            rotated.append(x.view(*x.shape[:-1], -1, self.head_dim))
        query, key, value = rotated
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = apply_rotary_pos_emb(query, key, *rope, unsqueeze_dim=2)
        return query, key, value


class MidLayer(nn.Module):
    """The head's decoder layer; its attention reads the embedding of the next token beside the hidden state."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(
        self,
        embedded: Sequence[torch.Tensor],
        hidden: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """embedded: `Eagle3Head.embedded` of [B, T]; hidden [B, T, H] -> hidden [B, T, H], pre-norm.

        attend(query, key, value) -> [B, T, heads, D] is the caller's attention: TTT in training, a KV cache in
        decoding.
        """
        attended = attend(*self.self_attn.project(embedded, self.hidden_norm(hidden), rope)).flatten(-2)
        hidden = hidden + self.self_attn.o_proj(attended)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Eagle3Head(nn.Module):
    """fc [3H -> H], one MidLayer, final norm, lm_head to the draft vocabulary. The embedding is the target's.

    As SGLang 0.5.21 and vLLM 0.32 read config.json (their llama_eagle3.py): `fc_norm`: RMSNorm on each of the three aux
    states before fc; `norm_output`: a step's state is fed back to the next one after the final norm, not before it.
    EAGLE-3.1 is both. `sliding_window`: a row attends to that many positions, its own the last of them. `qk_norm`:
    vLLM's qwen3_eagle3.py.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        size = config.hidden_size
        if getattr(config, "fc_norm", False):
            self.fc_norm = nn.ModuleList([LlamaRMSNorm(size, config.rms_norm_eps) for _ in range(3)])
        self.fc = nn.Linear(3 * size, size, bias=False)
        self.midlayer = MidLayer(config)
        self.norm = LlamaRMSNorm(size, config.rms_norm_eps)
        self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False)
        self.rotary = LlamaRotaryEmbedding(config)  # (hidden, positions [B, T]) -> cos and sin [B, T, D]
        self.window: int | None = getattr(config, "sliding_window", None)

    def normed_aux(self, aux: torch.Tensor) -> torch.Tensor:
        """aux [.., 3H] -> what fc reads, [.., 3H]."""
        if not hasattr(self, "fc_norm"):
            return aux
        return torch.cat([norm(third) for norm, third in zip(self.fc_norm, aux.chunk(3, dim=-1))], dim=-1)

    def features(self, aux: torch.Tensor) -> torch.Tensor:
        """aux [.., 3H] -> the hidden state of step 0 [.., H]."""
        return self.fc(self.normed_aux(aux))

    def fed_back(self, hidden: torch.Tensor, normed: torch.Tensor | None = None) -> torch.Tensor:
        """hidden [.., H], pre-norm, of a step -> the hidden state of the next one; normed: after the final norm, where
        it is known."""
        if not getattr(self.config, "norm_output", False):
            return hidden
        return self.norm(hidden) if normed is None else normed

    def embedded(self, embeds: torch.Tensor) -> list[torch.Tensor]:
        """embeds [.., H] -> what they add to query, key and value [.., heads * D], the same at every TTT step.

        The layer's projections read concat(embedding, hidden); a sum of two products is the same product.
        """
        return self.midlayer.self_attn.embedded(self.midlayer.input_layernorm(embeds))

    def context(
        self, embedded: Sequence[torch.Tensor], hidden: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value of step 0 for every row, [B, T, kv_heads, D]: what all steps see causally.

        embedded: of the tokens [B, T]; hidden [B, T, H]; position_ids [B, T].
        """
        layer, rope = self.midlayer, self.rotary(hidden, position_ids)
        _, key, value = layer.self_attn.project(embedded, layer.hidden_norm(hidden), rope)
        return key, value

    def ttt_step(
        self,
        step: int,
        embedded: Sequence[torch.Tensor],
        hidden: torch.Tensor,
        position_ids: torch.Tensor,
        attend_context: Callable[[torch.Tensor], Iterable[torch.Tensor]],
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """Step number `step` of the unroll, on the rows that count.

        embedded: of the tokens [G, R]; hidden [G, R, H]; position_ids [G, R]; attend_context(query) -> (output,
        logsumexp), the causal part over `context` (attention.causal_attention); keys, values: the rows' own of the
        steps 1 to step - 1.
        Returns hidden [G, R, H], pre-norm, and this step's own key and value [G, R, kv_heads, D].
        """
        made: list[torch.Tensor] = []

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            made.extend((key, value))
            *rows, heads, head_dim = query.shape
            query = query.view(*rows, key.shape[2], heads // key.shape[2], head_dim) * head_dim**-0.5
            output, logsumexp = attend_context(query)
            if step > 0:  # step 0's own key is part of the causal context
                output = merge_own_rows(query, output, logsumexp, [*keys, key], [*values, value])
            return output.reshape(*rows, heads, head_dim)

        hidden = self.midlayer(embedded, hidden, self.rotary(hidden, position_ids), attend)
        return hidden, *made

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [.., H], pre-norm -> logits over the draft vocabulary [.., D]."""
        return self.lm_head(self.norm(hidden))
