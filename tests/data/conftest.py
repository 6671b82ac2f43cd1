"""Real tokenizers with the chat templates of four families: Qwen2.5, Qwen3, Llama-3 and SmolLM2 (ChatML).

Qwen2.5's tokenizer and template are the published ones. Qwen3's and Llama-3's templates are written here to render
what the published ones render, over the same tokenizer with the special tokens that they need.
"""

import json
import lzma
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast, Qwen2Config

QWEN25 = Path(__file__).parent / "qwen25"
# Thoughts of earlier turns are left out; an answer after the last question gets a thought, an empty one if it has none;
# a generation prompt that forbids thinking holds the empty thought.
QWEN3 = """{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- set content = m.content -%}{%- set thought = '' -%}
{%- if m.role == 'assistant' and '</think>' in content -%}
{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) -%}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') -}}
{%- else -%}{{- content -}}{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}"""
LLAMA3 = """{%- for m in messages -%}
{{- bos_token if loop.first -}}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + (m.content | trim) + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"""
LLAMA3_TOKENS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


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
    for name, template, tokens, eos in (
        ("qwen3", QWEN3, [], "<|im_end|>"),
        ("llama-3", LLAMA3, LLAMA3_TOKENS, "<|eot_id|>"),
    ):
        folders[name] = tmp_path_factory.mktemp(name)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(qwen25_target / "tokenizer.json"),
            bos_token="<|begin_of_text|>" if tokens else None,
            eos_token=eos,
            pad_token="<|endoftext|>",
            additional_special_tokens=tokens,
        )
        if name == "qwen3":  # known to the tokenizer, but no special tokens: they survive `skip_special_tokens`
            tokenizer.add_tokens(["<think>", "</think>"])
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folders[name])
        config = Qwen2Config(vocab_size=len(tokenizer), hidden_size=64, architectures=["Qwen2ForCausalLM"])
        config.save_pretrained(folders[name])
    return folders
