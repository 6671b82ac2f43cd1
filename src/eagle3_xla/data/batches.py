"""Which rows a step sees: a pure function of (seed, step), so that a resumed run continues exactly where it was."""

import numpy as np
import torch


def steps_per_epoch(rows: int, global_batch: int) -> int:
    """Full micro-batches in an epoch; the remainder is left out (another one each epoch)."""
    return rows // global_batch


def batch_indices(step: int, rows: int, global_batch: int, seed: int) -> np.ndarray:
    """Row numbers [global_batch] of micro-step `step`, counted from 0 over the whole run."""
    epoch, position = divmod(step, steps_per_epoch(rows, global_batch))
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    return order[position * global_batch : (position + 1) * global_batch]


def to_tensors(rows: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Packed rows as host tensors [B, T]: ids int32, loss_mask bool."""
    return {
        name: torch.from_numpy(np.ascontiguousarray(values)).to(torch.bool if name == "loss_mask" else torch.int32)
        for name, values in rows.items()
    }
