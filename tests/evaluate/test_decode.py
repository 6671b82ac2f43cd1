"""Draft-and-verify decoding: the target's own greedy output, and figures that count what happened."""

import copy
import json

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from eagle3_xla.draft.attention import causal_attention
from eagle3_xla.draft.config import DraftConfig
from eagle3_xla.draft.model import Eagle3Head, draft_config
from eagle3_xla.draft.saved import load_head
from eagle3_xla.evaluate.decode import Choice, Decoder, Generation, SpeculativeDecoder
from eagle3_xla.evaluate.options import EvalOptions
from eagle3_xla.evaluate.run import acceptance_by_position, evaluate, load_pair, prompt_ids, summary
from eagle3_xla.loss.metrics import AcceptanceSums
from eagle3_xla.loss.rows import shift_left
from eagle3_xla.target.model import Target, load_target


def test_output_is_the_targets_own(trained, small_target, tokenizer):
    head, d2t = load_head(trained)
    model = load_target(str(small_target), torch.float32)
    target = Target(model, torch.arange(len(d2t)) + d2t)
    for length, seed in ((3, 6), (30, 4)):  # some drafts are accepted after each
        prompt = torch.randint(0, 1000, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        golden = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=-1)[
            0, length:
        ].tolist()
        assert Decoder(target).decode(prompt, 40, set()).tokens == golden
        for chain in (1, 5):
            ours = SpeculativeDecoder(target, head, d2t, chain).decode(prompt, 40, set())
            assert ours.tokens == golden
            # Every target call gives its accepted drafts and one token more; the first token is prefill's.
            assert sum(ours.accepted) + len(ours.accepted) >= 39
            assert all(a <= chain for a in ours.accepted)
            assert sum(ours.accepted) > 0
        stop = golden[20]
        end = golden.index(stop) + 1
        assert SpeculativeDecoder(target, head, d2t, 5).decode(prompt, 40, {stop}).tokens == golden[:end]


class _Always(Choice):
    def __init__(self, token: int):
        super().__init__()
        self.token = token

    def __call__(self, logits, position: int) -> int:
        return self.token


SHAPES = [DraftConfig(), DraftConfig(variant="eagle3.1"), DraftConfig(window=6), DraftConfig(qk_norm=True)]


@pytest.mark.parametrize("shape", SHAPES, ids=["eagle3", "eagle3.1", "window", "qk_norm"])
def test_drafts_are_the_unrolls_drafts(trained, small_target, shape):
    """The KV-cache decoding drafts what the TTT unroll predicts at the same row: training and serving agree."""
    head, d2t = load_head(trained)
    target = Target(load_target(str(small_target), torch.float32), torch.arange(len(d2t)) + d2t)
    if shape != DraftConfig():
        weights = head.state_dict()
        head = Eagle3Head(draft_config(target.model.config, len(d2t), shape)).eval().requires_grad_(False)
        norms = {name: 1 + torch.rand_like(w) for name, w in head.state_dict().items() if "norm" in name}
        head.load_state_dict(head.state_dict() | weights | norms)
    ids = torch.randint(0, 1000, (1, 24), generator=torch.Generator().manual_seed(1))
    states = target.states(ids, torch.arange(24)[None], torch.ones_like(ids))
    decoder = SpeculativeDecoder(target, head, d2t, 4)
    prompt = ids[0, :20].tolist()
    rows = 19  # the last row has the embedding of token 19
    drafts = decoder.decode(prompt[:rows], 2, set(), _Always(prompt[rows])).rounds[0][0].tokens[1:]
    # Unroll over the same text, with the head's own drafts where it would read tokens it does not know.
    text = torch.tensor([[*prompt[: rows + 1], *drafts]])
    length = text.shape[1]
    aux = torch.zeros(1, length, states.aux.shape[-1])
    aux[:, :rows] = states.aux[:, :rows]
    hidden, positions, keys, values = head.features(aux), torch.arange(length)[None], [], []
    key0, value0 = head.context(head.embedded(target.embed_tokens(shift_left(text, 1))), hidden, positions)

    def attend_context(query):
        return causal_attention(query, key0, value0, torch.ones_like(text), head.window and head.window - k)

    for k, draft in enumerate(drafts):
        embedded = head.embedded(target.embed_tokens(shift_left(text, 1 + k)))
        hidden, key, value = head.ttt_step(k, embedded, hidden, positions + k, attend_context, keys, values)
        if k > 0:
            keys, values = [*keys, key], [*values, value]
        choice = int(head.logits(hidden)[0, rows - 1].argmax())
        hidden = head.fed_back(hidden)
        assert choice + int(d2t[choice]) == draft


def test_bfloat16_keeps_the_rotations(trained, small_target):
    options = EvalOptions(dtype="bfloat16")
    target, head = load_pair(str(small_target), str(trained), options).on(options)
    assert head.fc.weight.dtype == target.draft_rows.dtype == torch.bfloat16
    for frequencies in (head.rotary.inv_freq, target.model.model.rotary_emb.inv_freq):
        assert frequencies.dtype == torch.float32
        assert torch.equal(frequencies, LlamaRotaryEmbedding(head.config).inv_freq)


def test_figures_by_hand():
    plain, conditional = acceptance_by_position([2, 0, 1], depth=3)
    assert plain == [2 / 3, 1 / 3, 0.0] and conditional == [2 / 3, 1 / 2, 0.0]
    runs = [Generation([1] * 6, 1.0, [2, 0, 1])]
    sums = AcceptanceSums(*(torch.tensor(column) for column in ([4, 4], [2, 1], [4, 2], [2, 1])))
    options = EvalOptions(draft_tokens=2, top_p=0.9, draft_window=8)
    figures = summary(runs, [Generation([1] * 6, 2.0)], [(sums, sums)], options)
    assert figures["acc_all_positions"] == [0.5, 0.25] and figures["speedup"] == 2.0
    assert figures["expected_acceptance_conditional"] == [0.5, 0.5] and figures["expected_tau"] == 1.75
    assert figures["tau"] == 2.0 and figures["target_calls_per_token"] == 3 / 5
    assert figures["tokens_per_second"] == 5.0 and figures["baseline_tokens_per_second"] == 2.5
    others = summary(runs, [Generation([1] * 5 + [2], 2.0)], [(sums, sums)], options)
    assert others["identical"] is False and others["speedup"] is None and others["baseline_tokens_per_second"] == 2.5
    assert figures["top_p"] == 0.9 and figures["draft_window"] == 8


def test_a_head_for_another_target_is_refused(trained, embedded_target, chat_file):
    from eagle3_xla.errors import UserError

    with pytest.raises(UserError, match="vocab_size is 4096 and the target.s 49152"):
        evaluate(str(embedded_target), str(trained), str(chat_file), EvalOptions(limit=1))


def test_prompts_do_not_depend_on_the_day(tokenizer, tmp_path):
    """As the rows of training don't (tests/data/test_templates.py)."""
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = "{{ strftime_now('%d %b %Y') }}: {{ messages[0]['content'] }}"
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "hello"}))
    (ids,) = prompt_ids(dated, str(file), EvalOptions(), 10**6)
    assert dated.decode(ids) == "26 Jul 2024: hello"
