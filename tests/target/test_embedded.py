"""The embedded target is SmolLM2: the same logits as the Llama original, the same tokens as its own tokenizer."""

import functools

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from eagle3_xla.data.tokenizer import load_tokenizer
from eagle3_xla.target.embedded import embedded_gguf


def test_logits_equal_the_llama_original(embedded_target, monkeypatch):
    monkeypatch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))  # transformers reads the file twice
    file = embedded_gguf()
    llama = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16).float()
    qwen = AutoModelForCausalLM.from_pretrained(embedded_target, dtype=torch.float32)
    assert type(qwen).__name__ == "Qwen2ForCausalLM"
    ids = torch.randint(0, llama.config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # The Llama's rotary table was made in bfloat16-rounded config space too: both come from the same theta.
        assert torch.equal(llama(ids).logits, qwen(ids).logits)


@pytest.fixture(scope="module")
def tokenizer(embedded_target):
    return load_tokenizer(str(embedded_target))


def test_tokenizer_round_trip_and_digits(tokenizer):
    text = "Hello, world! 3.14 naïve café\n\n\tdef f(x): return x**2  # 你好"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    # SmolLM2 splits digits one by one; a splitter that was lost merges them.
    assert [tokenizer.decode(i) for i in tokenizer("1234")["input_ids"]] == ["1", "2", "3", "4"]


def test_it_answers(embedded_target, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(embedded_target, dtype=torch.float32)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
