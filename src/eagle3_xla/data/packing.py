"""Conversations into rows of fixed lengths: several documents a row, so that little is padding, or one a row."""

import bisect

import numpy as np

PADDING = 0  # document id of padding; documents of a row count from 1
MOST_DOCUMENTS = 32_767  # of a row: their ids are int16


def pack(lengths: list[int], row_length: int) -> list[list[int]]:
    """Best-fit decreasing: indices of the conversations of each row. Every length must be at most `row_length`."""
    rows: list[list[int]] = []
    spaces: list[int] = []  # numbers of free tokens that some row has, sorted: at most row_length of them
    with_space: dict[int, list[int]] = {}  # rows by their free tokens
    for index in np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist():
        at = bisect.bisect_left(spaces, lengths[index])
        if at == len(spaces):
            rows.append([])
            free, row = row_length, len(rows) - 1
        else:
            free = spaces[at]
            row = with_space[free].pop()
            if not with_space[free]:
                del with_space[free], spaces[at]
        rows[row].append(index)
        left = free - lengths[index]
        if left and len(rows[row]) < MOST_DOCUMENTS:
            if left not in with_space:
                bisect.insort(spaces, left)
            with_space.setdefault(left, []).append(row)
    return rows


def bucket(lengths: list[int], row_lengths: list[int]) -> dict[int, list[int]]:
    """Indices of the conversations for each row length: the shortest that holds them. Empty lengths are left out."""
    row_lengths = sorted(row_lengths)
    rows: dict[int, list[int]] = {length: [] for length in row_lengths}
    for index, length in enumerate(lengths):
        rows[row_lengths[bisect.bisect_left(row_lengths, length)]].append(index)
    return {length: indices for length, indices in rows.items() if indices}


def row_arrays(rows: list[list[tuple]], row_length: int, pad_id: int) -> dict[str, np.ndarray]:
    """Packed rows from the (ids, mask) documents of each.

    input_ids [R, T] int32; loss_mask [R, T] bool; document_ids [R, T] int16, 1, 2, ... and 0 on padding; position_ids
    [R, T] int32, from 0 in each document.
    """
    shape = (len(rows), row_length)
    arrays: dict[str, np.ndarray] = {
        "input_ids": np.full(shape, pad_id, np.int32),
        "loss_mask": np.zeros(shape, bool),
        "document_ids": np.full(shape, PADDING, np.int16),
        "position_ids": np.zeros(shape, np.int32),
    }
    for number, documents in enumerate(rows):
        start = 0
        for document, (ids, mask) in enumerate(documents, 1):
            span = slice(start, start + len(ids))
            arrays["input_ids"][number, span] = ids
            arrays["loss_mask"][number, span] = mask
            arrays["document_ids"][number, span] = document
            arrays["position_ids"][number, span] = np.arange(len(ids))
            start += len(ids)
        assert start <= row_length
    return arrays
