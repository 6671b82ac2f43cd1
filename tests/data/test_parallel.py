"""Chunks through processes: every one, in order."""

import pytest

from eagle3_xla.data.parallel import ordered_map


def make(add):
    return add.__add__


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 9])
def test_every_chunk_comes_back_in_order(workers, count):
    assert list(ordered_map(make, (100,), iter(range(count)), workers)) == list(range(100, 100 + count))
