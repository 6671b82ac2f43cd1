"""Tokenised conversations -> a dataset of rows on disk, the same bytes for the same conversations."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from eagle3_xla.data.config import DataConfig
from eagle3_xla.data.documents import Documents
from eagle3_xla.data.packing import bucket, pack, row_arrays

ROWS_AT_ONCE, TOKENS_AT_ONCE = 1000, 1 << 25  # held in memory before they are written: what is reached first
SPLIT_FILES = ("data-*.arrow", "cache-*.arrow", "dataset_info.json", "state.json")  # that a folder of rows may hold


def write_rows(path: Path, documents: Documents, data: DataConfig, pad_id: int, split: str, digest: Any) -> dict:
    """Write the rows of a split to `path`, update `digest` with their content, return the split's part of the manifest.

    Packed: rows of data.row_length in a seeded order. Bucketed: grouped by length, `buckets` of the manifest says
    where: [[length, first row, rows], ...]. Held-out rows hold one source each, which `source` names.
    """
    groups = _rows_by_length(documents, data, split == "heldout")
    columns = {"input_ids": "int32", "loss_mask": "bool", "document_ids": "int16", "position_ids": "int32"}
    fixed = data.packing == "packed"
    writer = _Writer(path, columns, data.row_length if fixed else None, split == "heldout")
    count, slots, buckets = 0, 0, []
    for length, rows in groups:
        buckets.append([length, count, len(rows)])
        count, slots = count + len(rows), slots + len(rows) * length
        at_once = max(1, min(ROWS_AT_ONCE, TOKENS_AT_ONCE // length))
        for start in range(0, len(rows), at_once):
            some = rows[start : start + at_once]
            arrays = row_arrays([[documents.document(i) for i in row] for row in some], length, pad_id)
            if split == "heldout":
                arrays["source"] = np.array([documents.source[row[0]] for row in some], np.int32)
            for values in arrays.values():
                digest.update(values.tobytes())
            writer.writer.write_batch(arrays)
    writer.close(digest.hexdigest())
    tokens = int(documents.lengths.sum())
    report = {
        "chats": len(documents),
        "rows": count,
        "tokens": tokens,
        "answer_tokens": int(documents.answers.sum()),
        "padding": round(1 - tokens / max(slots, 1), 4),
        "cut_at_row_length": int(documents.cut.sum()),
    }
    return report if fixed else report | {"buckets": buckets}


def _rows_by_length(documents: Documents, data: DataConfig, by_source: bool) -> list[tuple[int, list[list[int]]]]:
    """(row length, rows as lists of document numbers), in a seeded order."""
    order = random.Random(data.seed)
    if data.packing == "bucketed":
        by_length = bucket(documents.lengths.tolist(), [*data.buckets, data.row_length])
        result = [(length, [[index] for index in indices]) for length, indices in by_length.items()]
    else:
        rows = []
        groups: list[np.ndarray] = [np.arange(len(documents))]
        if by_source:
            in_order = np.argsort(documents.source, kind="stable")
            groups = np.split(in_order, np.flatnonzero(np.diff(documents.source[in_order])) + 1)
        for group in groups:
            packed = pack(documents.lengths[group].tolist(), data.row_length)
            rows += [[int(group[i]) for i in row] for row in packed]
        result = [(data.row_length, rows)]
    for _, rows in result:
        order.shuffle(rows)
    return result


class _Writer:
    """A `datasets` folder, written batch by batch. length: tokens in every row; None: rows of several lengths."""

    def __init__(self, path: Path, columns: dict[str, str], length: int | None, with_source: bool):
        from datasets import Dataset, Features, Sequence, Value, disable_progress_bars
        from datasets.arrow_writer import ArrowWriter

        disable_progress_bars()
        shutil.rmtree(path, ignore_errors=True)
        features = {name: Sequence(Value(kind), length or -1) for name, kind in columns.items()}
        features = Features(features | ({"source": Value("int32")} if with_source else {}))
        # `datasets` describes a folder without rows; the file of rows is added to it.
        Dataset.from_dict({name: [] for name in features}, features).save_to_disk(str(path))
        self.state, self.file = path / "state.json", path / "data-00000-of-00001.arrow"
        self.writer = ArrowWriter(features=features, path=str(self.file))

    def close(self, fingerprint: str) -> None:
        self.writer.finalize()
        with self.file.open("rb") as written:
            os.fsync(written.fileno())
        files = [{"filename": self.file.name}]
        state = json.loads(self.state.read_text()) | {"_data_files": files, "_fingerprint": fingerprint[:16]}
        self.state.write_text(json.dumps(state, indent=2, sort_keys=True))
