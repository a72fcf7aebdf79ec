"""Serving with the MLX engine: each request in forwards of its own, with the cache that `generate` uses."""

from __future__ import annotations

import mlx.nn as nn

from partita.generation import Tokenizer
from partita.mlx.serving.rows import MlxRows
from partita.serving import ServeSettings, ServingLoop

__all__ = ["serving_loop"]


def serving_loop(
    model: nn.Module, settings: ServeSettings | None = None, *, tokenizer: Tokenizer | None = None
) -> ServingLoop:
    """A loop that serves requests with a split model; every rank of the run calls it, then `run()`.

    Requests join and leave at any step. Each runs in forwards of its own, so its tokens do not depend on the other requests.
    They are those of `generate` for it alone, bit for bit if its prompt is computed in one chunk and shares no prefix with an
    earlier one; chunks and shared prefixes change the rounding of sums.

    Args:
        model: A split causal language model.
        settings: The limits of the loop, the same on every rank.
        tokenizer: Decodes text, finds stop texts and names end tokens; the same on every rank.

    Raises:
        ModelError: The model does not generate, or the cache budget has no room for a single block.

    Examples:
        >>> model = pm.load("./model", tp=2)
        >>> loop = pm.serving_loop(model)
        >>> if is_first:
        ...     loop.inbox.submit(ServeRequest(0, (7, 8, 9)), print)
        >>> loop.run()  # on every rank, until loop.inbox.shutdown()
    """
    settings = settings or ServeSettings()
    return ServingLoop(MlxRows(model, settings, tokenizer), settings)
