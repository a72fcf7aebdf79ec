"""Serving with the torch engine: rows of many requests in one forward, their keys and values in one pool of blocks."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import nn

from partita.generation import Tokenizer
from partita.serving import ServeSettings, ServingLoop
from partita.serving.embedding import EmbeddingLoop
from partita.serving.pooling import Pooling
from partita.torch.serving.adapters import ServedAdapters
from partita.torch.serving.encoder import TorchEncoder, is_encoder
from partita.torch.serving.rows import TorchRows

__all__ = ["embedding_loop", "serving_loop"]


def embedding_loop(model: nn.Module, pooling: Pooling, settings: ServeSettings | None = None) -> EmbeddingLoop | None:
    """A loop that computes vectors of texts with a split model; every rank of the run calls it, then `run()`.

    Texts of the same length share a forward, so that no row is padded: in float64 a vector is within 1e-12 of that of the text
    alone.

    Args:
        model: A split model.
        pooling: How hidden states become a vector.
        settings: The limits of the loop, the same on every rank; `max_sequences` texts share a forward.

    Returns:
        The loop; None for a model that continues text and whose folder says nothing of pooling.
    """
    if not pooling.is_given and not is_encoder(model):
        return None
    return EmbeddingLoop(TorchEncoder(model), pooling, settings or ServeSettings())


def serving_loop(
    model: nn.Module,
    settings: ServeSettings | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
) -> ServingLoop:
    """A loop that serves requests with a split model; every rank of the run calls it, then `run()`.

    Requests join and leave the running batch at any step. In float64 each gets the tokens that `generate` gives for it alone;
    in narrower dtypes the number of rows changes the rounding of sums. Measured with a random Llama of 8 layers, 16 requests at
    once against each alone: in float32 all of 384 greedy tokens were the same, and log probabilities differed by at most 2e-6;
    in bfloat16 by at most 8e-3, and 10 of 16 texts took another token somewhere. `exact_rows=True` gives each request
    the bits of the request alone.

    Args:
        model: A split causal language model.
        settings: The limits of the loop, the same on every rank.
        tokenizer: Decodes text, finds stop texts and names end tokens; the same on every rank.
        adapters: Folders of LoRA adapters by the names that requests choose them by (`ServeRequest.adapter`), as
            `load_adapters` reads them. Requests with different adapters run in forwards of their own within a step.

    Raises:
        ModelError: The model does not generate, has adapters already, or the cache budget has no room for a single block.
        CheckpointError: A folder holds no adapters for this model.

    Examples:
        >>> model = pt.load("./model", tp=2)
        >>> loop = pt.serving_loop(model)
        >>> if loop.rows.decides:  # the first rank of each replica
        ...     loop.inbox.submit(ServeRequest(0, (7, 8, 9)), print)
        >>> loop.run()  # on every rank, until loop.inbox.shutdown()
    """
    settings = settings or ServeSettings()
    return ServingLoop(TorchRows(model, settings, tokenizer, ServedAdapters(model, adapters or {})), settings)
