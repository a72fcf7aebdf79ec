"""The text to train on, checked: what is no row of ids, or has an id that the model has not, would fail late or not at all."""

from __future__ import annotations

from typing import Any

import numpy as np

from partita.errors import PlanError


def check_ids(tokens: np.ndarray[Any, Any], vocab_size: int) -> None:
    """Refuse what is no row of ids of a vocabulary.

    Args:
        tokens: The text.
        vocab_size: Ids that the model has; 0 where that is not known.

    Raises:
        PlanError: It is not int `[tokens]`, or an id is not the model's.
    """
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise PlanError(f"tokens must be whole numbers [tokens], but are {tokens.dtype} of shape {tokens.shape}.")
    if len(tokens) and not 0 <= (low := int(tokens.min())) <= (high := int(tokens.max())) < (vocab_size or 1 << 62):
        raise PlanError(f"tokens must be ids from 0 to {vocab_size - 1}, but are from {low} to {high}.")
