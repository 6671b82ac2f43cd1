"""Real tokenizers with the published chat templates of ten families.

Qwen2.5 and SmolLM2 (ChatML) have their own tokenizer; the others (templates/README.md) are over the first tokens of
Qwen2.5's, with the special tokens that they need.
"""

import json
import lzma
from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast, Qwen2Config

QWEN25 = Path(__file__).parent / "qwen25"
TEMPLATES = Path(__file__).parent / "templates"
FIRST_TOKENS = 16_384  # of 151,643, which took eight times as long to read
# Of each template there: the special tokens that it needs, and those that end an answer.
SPECIAL = {
    "qwen3": ([], ["<|im_end|>"]),
    "llama-3": (["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"], ["<|eot_id|>"]),
    "llama-3.1": (["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"], ["<|eot_id|>"]),
    "llama-3.2": (["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"], ["<|eot_id|>"]),
    "gemma-3": (["<bos>", "<start_of_turn>"], ["<end_of_turn>"]),
    "mistral": (["<s>", "[INST]", "[/INST]"], ["</s>"]),
    "phi-3": (["<s>", "<|system|>", "<|user|>"], ["<|endoftext|>", "<|assistant|>", "<|end|>"]),
    "gpt-oss": (["<|startoftext|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>"], ["<|return|>", "<|call|>"]),
}


@pytest.fixture(scope="session")
def qwen25_target(tmp_path_factory) -> Path:
    """A folder with Qwen2.5's tokenizer and a config, without weights: all that `prepare` reads of a target."""
    folder = tmp_path_factory.mktemp("qwen25")
    (folder / "tokenizer.json").write_bytes(lzma.decompress((QWEN25 / "tokenizer.json.xz").read_bytes()))
    (folder / "tokenizer_config.json").write_text((QWEN25 / "tokenizer_config.json").read_text())
    config = Qwen2Config(vocab_size=152_064, hidden_size=64, num_hidden_layers=8, architectures=["Qwen2ForCausalLM"])
    config.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [151645, 151643]}))
    return folder


@pytest.fixture(scope="session")
def template_targets(qwen25_target, embedded_target, tmp_path_factory) -> dict[str, Path]:
    """Folders of targets by the name of their chat template's family."""
    folders = {"qwen2.5": qwen25_target, "smollm2": embedded_target}
    whole = json.loads((qwen25_target / "tokenizer.json").read_text())
    model = whole["model"]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < FIRST_TOKENS}
    model["merges"] = model["merges"][: FIRST_TOKENS - 256]  # the first tokens are the bytes, then one of each merge
    for number, token in enumerate(whole["added_tokens"], FIRST_TOKENS):
        token["id"] = number
    first_tokens = tmp_path_factory.mktemp("first-tokens") / "tokenizer.json"
    first_tokens.write_text(json.dumps(whole))
    for name, (tokens, stops) in SPECIAL.items():
        folders[name] = tmp_path_factory.mktemp(name)
        special = [*tokens, *stops]
        if name == "phi-3":  # the whitespace after most of them is theirs, as in its own tokenizer
            plain = ("<s>", "<|endoftext|>")
            special = [AddedToken(token, rstrip=token not in plain, special=True) for token in special]
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(first_tokens),
            bos_token=tokens[0] if tokens else None,
            eos_token=stops[0],
            pad_token="<|endoftext|>",
            additional_special_tokens=special,
        )
        if name == "qwen3":  # known to the tokenizer, but no special tokens: they survive `skip_special_tokens`
            tokenizer.add_tokens(["<think>", "</think>"])
        tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
        tokenizer.save_pretrained(folders[name])
        config = Qwen2Config(vocab_size=len(tokenizer), hidden_size=64, architectures=["Qwen2ForCausalLM"])
        config.save_pretrained(folders[name])
        ends = json.dumps({"eos_token_id": tokenizer.convert_tokens_to_ids(stops)})
        (folders[name] / "generation_config.json").write_text(ends)
    return folders
