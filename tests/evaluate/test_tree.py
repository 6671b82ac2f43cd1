"""Trees and sampling: the output stays the target's own, a tree accepts more than its chain, figures are the law's."""

import pytest
import torch

from eagle3_xla.draft.saved import LAYER_IDS, SavedHead, layers_of
from eagle3_xla.errors import UserError
from eagle3_xla.evaluate.decode import Choice, Decoder, SpeculativeDecoder
from eagle3_xla.evaluate.options import EvalOptions
from eagle3_xla.evaluate.run import tau
from eagle3_xla.evaluate.tree import Tree


def test_tree_by_hand():
    """Root 7; children a (0.6), b (0.3); below a: c (0.9), d (0.05); below b: e (0.99)."""
    tree = Tree([7])
    a, b = tree.add(10, 0, -0.51), tree.add(11, 0, -1.2)
    c, d, e = tree.add(12, a, -0.1), tree.add(13, a, -3.0), tree.add(14, b, -0.01)
    assert tree.path(d) == [0, a, d] and tree.best([c, d, e], 2) == [c, e]
    pruned = tree.pruned(3)
    assert pruned.tokens == [7, 10, 11, 12] and pruned.parents == [-1, 0, 0, 1]
    nodes = [0, 1, 2, 3]
    assert pruned.visible(nodes, nodes) == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
    certain = Tree([7])
    certain.add(1, certain.add(2, certain.add(3, 0, 0.0), 0.0), 0.0)  # equal scores: no child without its parent
    assert certain.pruned(2).parents == [-1, 0, 1]


def test_trees_keep_the_targets_output(trained, small_pair):
    target, head, d2t = small_pair
    chain_accepted, tree_accepted = [], []
    for length, seed in ((5, 8), (30, 4)):
        prompt = torch.randint(0, 1000, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        golden = Decoder(target).decode(prompt, 40, set()).tokens
        for topk, steps, drafts in ((1, 4, 4), (2, 3, 6), (4, 4, 15), (3, 1, 3)):
            ours = SpeculativeDecoder(target, head, d2t, drafts, topk, steps).decode(prompt, 40, set())
            assert ours.tokens == golden, (topk, steps, drafts)
            assert max(ours.accepted) <= steps
            if (topk, steps) == (1, 4):
                chain_accepted.append(ours)
            if (topk, steps) == (4, 4):
                tree_accepted.append(ours)
    assert tau(tree_accepted) > tau(chain_accepted) > 1.0  # a wide tree holds the chain


def test_the_head_attends_by_rank(small_pair):
    """As SGLang drafts: rank j of a step sees rank j of all steps so far, whatever its parent."""
    seen = []

    class Recording(SpeculativeDecoder):
        def _head_rows(self, first, tokens, hidden, known, own, positions):
            seen.append((own, positions))
            return super()._head_rows(first, tokens, hidden, known, own, positions)

    Recording(*small_pair, draft_tokens=15, topk=4, steps=4).decode([*range(5, 15)], 2, set())
    for step, (own, positions) in enumerate(seen[-3:]):  # of the one round
        assert own.tolist() == [[[row % 4 == rank for row in range(4 * (step + 1))] for rank in range(4)]]
        assert positions.tolist() == [[10 + step] * 4]


def test_another_seed_is_another_answer(small_pair):
    """That drafts don't change it is in test_batch.py."""
    choices = [Choice(temperature=1.2, top_p=0.9, seed=seed) for seed in range(2)]
    first, second = (Decoder(small_pair[0]).decode([*range(5, 15)], 24, set(), choose).tokens for choose in choices)
    assert first != second


def test_samples_follow_the_distribution():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    counts = torch.zeros(4)
    for position in range(4000):
        counts[Choice(temperature=0.8, seed=1)(logits, position)] += 1
    assert torch.allclose(counts / 4000, (logits / 0.8).softmax(-1), atol=0.03)
    kept = {Choice(temperature=0.8, top_p=0.9, seed=2)(logits, position) for position in range(500)}
    assert kept == {0, 1}  # 0.74 + 0.21 reach 0.9
    assert Choice()(logits, 0) == 0


def test_calls_count_whole(trained, small_pair):
    """The last call counts all that it accepted, although the length limit or an end token cuts the answer there."""
    target, head, d2t = small_pair
    decoder = SpeculativeDecoder(target, head, d2t, 5)
    prompt = torch.randint(0, 1000, (40,), generator=torch.Generator().manual_seed(8)).tolist()
    whole = decoder.decode(prompt, 40, set())
    tokens, calls = whole.tokens, 0
    length = 1  # of the answer before a call
    for accepted in whole.accepted:
        calls, length = calls + 1, length + 1
        if accepted and tokens[length - 1] not in tokens[: length - 1]:
            break  # ends inside this call, with a draft that it accepts
        length += accepted
    else:
        pytest.fail("no call accepts a draft of a token that is new")
    cut = decoder.decode(prompt, length, set())
    assert len(cut.tokens) == length and cut.accepted == whole.accepted[:calls]
    assert decoder.decode(prompt, 40, {tokens[length - 1]}).accepted == whole.accepted[:calls]


@pytest.mark.parametrize(
    "settings, part",
    [
        ({"topk": 4, "steps": 9}, "--steps 9: choose 1 to"),
        (
            {"topk": 2, "steps": 2, "draft_tokens": 7},
            "a tree of --topk 2 and --steps 2 has at most 6 drafts",
        ),
        ({"steps": 2}, "a chain of 5 drafts takes as many steps"),
    ],
)
def test_bad_shapes_are_refused(settings, part):
    with pytest.raises(UserError, match=part):
        EvalOptions(**settings)


def test_layer_ids_of_both_engines(tmp_path):
    def layers(**config):
        return layers_of(SavedHead(tmp_path, config), 28)

    assert layers(eagle_config={LAYER_IDS: [1, 14, 26]}) == (1, 14, 26)
    assert layers(**{LAYER_IDS: [2, 15, 27]}) == (1, 14, 26)
    assert layers() is None
