"""Check the ids to train on: other shapes or dtypes, or unknown ids, would fail late or not at all."""

from __future__ import annotations

from typing import Any

import numpy as np

from partita.errors import PlanError


def check_ids(tokens: np.ndarray[Any, Any], vocab_size: int) -> None:
    """Raise an error unless `tokens` is one row of ids of a vocabulary.

    Args:
        tokens: The ids of the text.
        vocab_size: Number of ids of the model; 0 if unknown.

    Raises:
        PlanError: The ids are not int `[tokens]`, or an id is out of range.
    """
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise PlanError(f"tokens must be whole numbers [tokens], but are {tokens.dtype} of shape {tokens.shape}.")
    if len(tokens) and not 0 <= (low := int(tokens.min())) <= (high := int(tokens.max())) < (vocab_size or 1 << 62):
        raise PlanError(f"tokens must be ids from 0 to {vocab_size - 1}, but are from {low} to {high}.")
