"""The sequences that a step of `train` sees of one row of ids."""

from __future__ import annotations

import torch
from torch import Tensor

from partita.training import row_starts


def batch(tokens: Tensor, step: int, batch_size: int, sequence_length: int, seed: int) -> Tensor:
    """The sequences of one step. They depend on the seed and the step, not on the mesh.

    Returns:
        int64 ids `[batch_size, sequence_length + 1]`: the inputs, and shifted by one the targets.
    """
    starts = row_starts(len(tokens), step, batch_size, sequence_length, seed)
    return torch.stack([tokens[start : start + sequence_length + 1] for start in starts])
