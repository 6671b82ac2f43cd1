"""Conversations into rows of one fixed length: several documents a row, so that little is padding."""

import bisect

import numpy as np

PADDING = 0  # document id of padding; documents of a row count from 1


def pack(lengths: list[int], row_length: int) -> list[list[int]]:
    """Best-fit decreasing: indices of the conversations of each row. Every length must be at most `row_length`."""
    rows: list[list[int]] = []
    space: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(space, (lengths[index], -1))
        if at == len(space):
            rows.append([])
            free, row = row_length, len(rows) - 1
        else:
            free, row = space.pop(at)
        rows[row].append(index)
        bisect.insort(space, (free - lengths[index], row))
    return rows


def row_arrays(documents: list[tuple[list[int], list[int]]], row_length: int, pad_id: int) -> dict[str, np.ndarray]:
    """One packed row from its (ids, mask) documents.

    input_ids [T] int32; loss_mask [T] bool; document_ids [T] int16, 1, 2, ... and 0 on padding; position_ids [T]
    int32, from 0 in each document.
    """
    row = {
        "input_ids": np.full(row_length, pad_id, np.int32),
        "loss_mask": np.zeros(row_length, bool),
        "document_ids": np.full(row_length, PADDING, np.int16),
        "position_ids": np.zeros(row_length, np.int32),
    }
    start = 0
    for number, (ids, mask) in enumerate(documents, 1):
        span = slice(start, start + len(ids))
        row["input_ids"][span] = ids
        row["loss_mask"][span] = mask
        row["document_ids"][span] = number
        row["position_ids"][span] = np.arange(len(ids))
        start += len(ids)
    assert start <= row_length
    return row
