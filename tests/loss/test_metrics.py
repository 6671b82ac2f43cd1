"""The rows at which decoding drafts, against a loop that decodes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle3_xla.loss.metrics import decoding_rows


@given(st.integers(0, 2**32), st.integers(1, 70), st.integers(1, 9))
@settings(deadline=None)
def test_the_rows_at_which_decoding_drafts(seed, rows, depth):
    draw = torch.Generator().manual_seed(seed)
    accepted = torch.randint(depth + 1, (3, rows), generator=draw)
    drafted, begins = torch.rand(3, rows, generator=draw) < 0.8, torch.rand(3, rows, generator=draw) < 0.1
    previous = torch.cat([torch.zeros(3, 1, dtype=torch.bool), drafted[:, :-1]], 1)
    first = drafted & (~previous | begins)  # listed rows of two answers may lie side by side
    expected = torch.zeros_like(drafted)
    for group in range(3):
        for start in first[group].nonzero()[:, 0].tolist():
            at = start
            while at < rows and drafted[group, at] and (at == start or not first[group, start + 1 : at + 1].any()):
                expected[group, at] = True
                at += 1 + int(accepted[group, at])
    assert torch.equal(decoding_rows(accepted, drafted, first, depth), expected)
