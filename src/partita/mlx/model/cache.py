"""Caches on a pipeline stage: full length, filled for the stage's own layers, token counts advanced for the others.

To compute positions and masks, a model reads the token count from entries of its cache: the first of each kind, or others by
family. On a stage with other layers these entries would stay empty. So they receive keys of width 1 for
every token: one entry of each kind, whose state the others share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from partita.mlx.mlx_lm_internals import add_tokens, grows_with_tokens, keys_of, kind_of, parts_of


def count_tokens(cache: Sequence[Any], filled: Sequence[Any], count: int) -> None:
    """Count the `count` tokens of one forward in the entries of `cache` that are not in `filled`, which no layer received."""
    given = {id(entry) for entry in filled}
    first: dict[Any, Any] = {}
    for entry in cache:
        if entry is not None and id(entry) not in given:
            _count(entry, count, first)
    mx.eval([keys for entry in first.values() if (keys := keys_of(entry)) is not None])


def _count(entry: Any, count: int, first: dict[Any, Any]) -> None:
    for part in parts_of(entry):
        _count(part, count, first)
    if grows_with_tokens(entry) and not parts_of(entry):
        leader = first.setdefault(kind_of(entry), entry)
        if leader is entry:
            narrow = mx.zeros((1, 1, count, 1))
            add_tokens(entry, narrow, narrow)
        else:
            entry.state = leader.state
