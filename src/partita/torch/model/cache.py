"""Caches on a pipeline stage: full length, filled for the stage's own layers, token counts advanced for the others.

A transformers cache has one entry per layer, and the model asks the first entry of each kind for the number of tokens.
On a stage with other layers these entries would stay empty, and positions and masks would be wrong. So the first entry of
each kind receives keys of width 1 for every token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from partita.errors import ModelError
from partita.torch.transformers_internals import (
    grows_with_tokens,
    holds_nothing,
    is_cache,
    keeps_state,
    mark_previous_state,
    new_cache,
)


def find_cache(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a layer, or None."""
    return next((value for value in (*args, *kwargs.values()) if is_cache(value)), None)


def advance_cache(cache: Any, own: Collection[int], inputs: Mapping[str, Any]) -> None:
    """Count the tokens of one forward in the entries of layers that are not `own`."""
    check_cache(cache)
    ids = inputs.get("input_ids")
    tokens = ids if isinstance(ids, Tensor) else inputs["inputs_embeds"][..., 0]
    narrow = torch.zeros((tokens.shape[0], 1, tokens.shape[1], 1), device=tokens.device)
    if not cache.layers:
        cache.update(narrow, narrow, 0)
        return
    kinds: set[type] = set()
    for index, entry in enumerate(cache.layers):
        if index not in own:
            if keeps_state(entry):
                mark_previous_state(entry)
            if type(entry) not in kinds and grows_with_tokens(entry):
                entry.update(narrow, narrow)
        kinds.add(type(entry))


def counting_cache(model: Any, inputs: Mapping[str, Any]) -> Any:
    """A cache for the caller on a rank without layers; it counts the tokens of one forward."""
    cache = new_cache(model.config)
    advance_cache(cache, (), inputs)
    return cache


def check_cache(cache: Any) -> None:
    """Check that every entry of a cache can count tokens on a rank without its layer. Every rank checks before the forward
    begins.

    Raises:
        ModelError: An entry cannot.
    """
    for entry in cache.layers:
        if not (grows_with_tokens(entry) or keeps_state(entry) or holds_nothing(entry)):
            raise ModelError(
                f"a cache of {type(entry).__name__} cannot be kept consistent across pipeline stages. Use the default "
                "dynamic cache, or pp=1."
            )
