"""A small random model of every supported family: windows shorter than the rows, every scaling at an unusual value."""

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from eagle3_xla.plan.depth import with_layers

VOCABULARY, WINDOW = 256, 7
SHALLOW, SHALLOW_AUX = 4, (0, 1, 2)  # layers where compiling them is what a test costs: every kind of each family
SIZES = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=VOCABULARY,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
GEMMA = dict(head_dim=32, sliding_window=WINDOW, query_pre_attn_scalar=48, final_logit_softcapping=3.0)
CONFIGS = {
    "qwen2": Qwen2Config(**SIZES | {"tie_word_embeddings": True}),
    "qwen2, window": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    "qwen3, yarn": Qwen3Config(**SIZES, head_dim=32, rope_theta=5e5, rope_scaling=YARN, attention_bias=True),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        mlp_only_layers=[2],
        use_sliding_window=True,
        sliding_window=WINDOW,
    ),
    "qwen3_moe, weights as they are": Qwen3MoeConfig(
        **SIZES, head_dim=32, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, decoder_sparse_step=2
    ),
    "llama, llama3": LlamaConfig(**SIZES, rope_scaling={"rope_type": "llama3", **LLAMA3}),
    "llama, biases, linear": LlamaConfig(
        **SIZES, attention_bias=True, mlp_bias=True, rope_scaling={"rope_type": "linear", "factor": 3.0}
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=None, head_dim=32),
    "mistral, window": MistralConfig(**SIZES, sliding_window=WINDOW),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW),
    "phi3": Phi3Config(**SIZES, sliding_window=WINDOW, partial_rotary_factor=0.5),
    "phi3, longrope": Phi3Config(
        **SIZES,
        sliding_window=None,
        partial_rotary_factor=0.5,
        original_max_position_embeddings=64,
        rope_scaling={"type": "longrope", "short_factor": [1.5, 2.5], "long_factor": [9.0, 11.0]},
    ),
    "gemma2": Gemma2Config(**SIZES | {"tie_word_embeddings": True}, **GEMMA, attn_logit_softcapping=2.0),
    "gemma3": Gemma3TextConfig(
        **SIZES | {"tie_word_embeddings": True},
        **GEMMA,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        rope_local_base_freq=500.0,
        sliding_window_pattern=3,
    ),
    "gpt_oss": GptOssConfig(
        **SIZES,
        head_dim=32,
        num_local_experts=8,
        num_experts_per_tok=3,
        sliding_window=WINDOW,
        attention_bias=True,
        rope_scaling=YARN | {"truncate": False, "beta_fast": 32.0, "beta_slow": 1.0},
    ),
    "smollm3": SmolLM3Config(
        **SIZES, no_rope_layer_interval=3, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2
    ),
    "olmo2": Olmo2Config(**SIZES, rms_norm_eps=1e-3),
    "granite": GraniteConfig(
        **SIZES,
        logits_scaling=8.0,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.3,
        attention_bias=True,
        mlp_bias=True,
    ),
}


def small_model(name: str, layers: int = SIZES["num_hidden_layers"]):
    """Weights that matter, biases, sinks and norms included: the usual initialisation leaves most of the model flat."""
    config = with_layers(CONFIGS[name], layers)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.15)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model
