"""The draft vocabulary: the most frequent answer tokens, and the two maps between it and the target's vocabulary."""

import numpy as np
import torch


def draft_vocabulary(counts: np.ndarray, size: int, always: set[int]) -> np.ndarray:
    """Target ids of the draft vocabulary, ascending, [size] int64.

    counts [vocab_size]: how often the assistant wrote each token in the training split; always: ids that are in
    whatever their count (special and end-of-turn tokens). Ties and unseen tokens are filled by the lowest id.
    """
    priority: np.ndarray = counts.astype(np.float64)
    priority[sorted(always)] = np.inf
    order = np.argsort(-priority, kind="stable")
    return np.sort(order[:size]).astype(np.int64)


def coverage(counts: np.ndarray, draft_ids: np.ndarray) -> float:
    """Share of the counted tokens that the draft vocabulary holds, 0..1."""
    return float(counts[draft_ids].sum() / max(counts.sum(), 1))


def d2t_t2d(draft_ids: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The maps as every engine reads them: d2t [draft] int64 offsets (target id = i + d2t[i]), t2d [vocab] bool."""
    d2t = draft_ids - torch.arange(len(draft_ids))
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[draft_ids] = True
    return d2t, t2d


def draft_ids_of(d2t: torch.Tensor) -> torch.Tensor:
    """Target ids of the draft vocabulary from the offsets, [draft] int64."""
    return d2t + torch.arange(len(d2t))
