"""Aux states and teacher against transformers' own outputs."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from eagle3_xla.errors import UserError
from eagle3_xla.target.model import Target, aux_layers, load_target

SIZES = dict(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=9,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
KINDS = [(Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM), (LlamaConfig, LlamaForCausalLM)]


@pytest.fixture(params=KINDS, ids=lambda kind: kind[1].__name__)
def model(request):
    config, kind = request.param
    torch.manual_seed(0)
    return kind(config(**SIZES, tie_word_embeddings=False)).eval()


def test_states_and_teacher(model):
    draft_ids = torch.arange(0, 300, 3)
    target = Target(model, draft_ids)
    ids = torch.randint(0, 300, (2, 600))  # longer than a vocabulary chunk
    positions = torch.arange(600).expand(2, -1)
    with torch.no_grad():
        golden = model(ids, output_hidden_states=True)
        states = target.states(ids, positions, torch.ones_like(ids))
    # Layers {1, L//2-1, L-4} are Hugging Face's hidden_states [2, L//2, L-3].
    torch.testing.assert_close(
        states.aux, torch.cat([golden.hidden_states[i] for i in (2, 4, 6)], -1), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(states.logsumexp, golden.logits.logsumexp(-1), atol=1e-5, rtol=1e-5)
    assert torch.equal(states.argmax, golden.logits.argmax(-1))
    torch.testing.assert_close(
        target.teacher(states.hidden, states.argmax, states.logsumexp).logits,
        golden.logits[..., draft_ids],
        atol=1e-5,
        rtol=1e-5,
    )


def test_aux_layers():
    assert aux_layers(28) == (1, 13, 24)  # Qwen2.5-7B
    assert aux_layers(30) == (1, 14, 26)
    assert aux_layers(8) == (1, 3, 4)
    with pytest.raises(UserError, match="7 decoder layers"):
        aux_layers(7)


def test_not_a_target(tmp_path):
    from transformers import BertConfig, BertModel

    with pytest.raises(UserError, match="no target at"):
        load_target(str(tmp_path / "nothing"), torch.float32)
    BertModel(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)
    ).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="model type 'bert' is unknown here"):
        load_target(str(tmp_path / "bert"), torch.float32)
