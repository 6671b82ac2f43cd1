"""`prepare --show N`: rows as text, what is trained on in colour (in ⟦brackets⟧ where there is no terminal)."""

import sys
from itertools import groupby
from typing import Any

import numpy as np

from eagle3_xla.checks import in_colour, printable
from eagle3_xla.config import Recipe
from eagle3_xla.data.packing import PADDING
from eagle3_xla.data.prepare import load_prepared
from eagle3_xla.data.tokenizer import load_tokenizer

COLOUR, BRACKETS = ("\033[1;32m", "\033[0m"), ("⟦", "⟧")


def show_rows(recipe: Recipe, count: int) -> str:
    """The first `count` training rows of the prepared folder: each conversation's text, special tokens included."""
    train, _, _, manifest = load_prepared(recipe.data.prepared)
    tokenizer = load_tokenizer(recipe.target.path)
    marks = COLOUR if in_colour(sys.__stdout__) else BRACKETS
    parts = []
    for number in range(min(count, len(train))):
        row = {name: np.asarray(values) for name, values in train[number].items()}
        documents, tokens = int(row["document_ids"].max()), int((row["document_ids"] != PADDING).sum())
        trained = int(row["loss_mask"].sum())
        parts.append(
            f"row {number} of {len(train)}: {documents} conversation{'s' * (documents > 1)}, "
            f"{tokens} tokens, {trained} trained on"
        )
        for document in range(1, documents + 1):
            mine = row["document_ids"] == document
            parts.append(f"  conversation {document}")
            text = marked(tokenizer, row["input_ids"][mine], row["loss_mask"][mine], marks)
            parts.append("\n".join(f"    {line}" for line in text.split("\n")))
    return "\n".join(parts)


def marked(tokenizer: Any, ids: np.ndarray, mask: np.ndarray, marks: tuple[str, str]) -> str:
    """The text of ids [n]; each run of tokens with mask [n] true stands between the marks."""
    text = ""
    for trained, run in groupby(zip(ids.tolist(), mask.tolist(), strict=True), key=lambda pair: pair[1]):
        words = printable(tokenizer.decode([token for token, _ in run]))
        if trained:  # the colour starts anew on each line, so that a pager shows it
            words = "\n".join(f"{marks[0]}{line}{marks[1]}" for line in words.split("\n"))
        text += words
    return text
