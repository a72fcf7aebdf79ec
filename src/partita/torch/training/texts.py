"""Training text as a tensor; `partita.training` reads it, the same on either engine."""

from __future__ import annotations

import torch
from torch import Tensor

from partita.generation import Tokenizer
from partita.training.data.texts import read_ids


def load_tokens(source: str, tokenizer: Tokenizer, *, limit_bytes: int | None = None) -> Tensor:
    """The whole text of a source as one row of ids, int64 `[tokens]`; see `partita.training.data.texts.read_ids`."""
    return torch.from_numpy(read_ids(source, tokenizer, limit_bytes=limit_bytes))
