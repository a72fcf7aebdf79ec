"""Training text as tensors; `partita.training` selects it, the same on either engine."""

from __future__ import annotations

import torch
from torch import Tensor

from partita.generation import Tokenizer
from partita.training import row_starts
from partita.training.data.texts import read_ids


def load_tokens(source: str, tokenizer: Tokenizer, *, limit_bytes: int | None = None) -> Tensor:
    """The whole text of a source as one row of ids, int64 `[tokens]`; see `partita.training.data.texts.read_ids`."""
    return torch.from_numpy(read_ids(source, tokenizer, limit_bytes=limit_bytes))


def batch(tokens: Tensor, step: int, batch_size: int, sequence_length: int, seed: int) -> Tensor:
    """The sequences of one step. They depend on the seed and the step, not on the mesh.

    Returns:
        int64 ids `[batch_size, sequence_length + 1]`: the inputs, and shifted by one the targets.
    """
    starts = row_starts(len(tokens), step, batch_size, sequence_length, seed)
    return torch.stack([tokens[start : start + sequence_length + 1] for start in starts])
