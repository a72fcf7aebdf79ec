"""Packing before use: a small model of the family must give each document of a packed row what it gives the document alone."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from partita.core.model.spec import text_config
from partita.core.plan import Plan
from partita.errors import ModelError, PartitaError
from partita.mlx.collectives.threads import run_as_threads
from partita.mlx.mlx_lm_internals import grows_with_tokens, make_cache, parts_of
from partita.mlx.model.mlx_lm_models import config_of, describe
from partita.mlx.model.packing import PackedRows, positions_by_token, rotary_limit
from partita.mlx.model.parts import main_output
from partita.mlx.proof.compare import relative_error
from partita.mlx.proof.family import TOLERANCES, sample_inputs, small_model

LENGTHS = (7, 1, 5, 3)
"""Lengths of the documents of the row. The last stands for the padding behind the others."""

_BY_PLACE = ("attention_chunk_size", "attn_temperature_tuning", "llama_4_scaling_beta")
"""Keys of configs whose attention depends on a token's place in the row, which a small row does not show."""


def prove_packing(model: nn.Module, plan: Plan, length: int) -> None:
    """Measure on a small random model whether documents of one row, given as `PackedRows`, are independent.

    Args:
        model: The model, split or not.
        plan: Its plan.
        length: Tokens of a row.

    Raises:
        ModelError: They are not, or the model computes otherwise for longer rows.
    """
    why = _reason(model, plan, length)
    if why:
        raise ModelError(
            f"{plan.spec.family} cannot be trained with packing (--packing) on MLX: {why} Leave it out, so that each document "
            "has a row of its own."
        )


def _reason(model: nn.Module, plan: Plan, length: int) -> str:
    text = text_config(plan.spec.config)
    named = {**text, **(text.get("rope_parameters") or {}), **(text.get("rope_scaling") or {})}
    if name := next((name for name in _BY_PLACE if named.get(name)), None):
        return f"its attention depends on a token's place in the row ({name} in its config)."
    limit = rotary_limit(model)
    if limit is not None and length > limit:
        return f"its rotary frequencies change beyond {limit} tokens, but a row has {length}."
    cls: Any = getattr(type(model), "partita_unsplit", type(model))
    config = config_of(model)
    config.pop("quantization", None)
    key = cls, json.dumps(config, sort_keys=True)
    if key not in _known:
        # In a separate thread, which does not change the user's random state.
        (_known[key],) = run_as_threads(1, lambda _: _measured(cls, config, plan.spec.num_heads))
    return _known[key]


_known: dict[Any, str] = {}


def _measured(cls: type[nn.Module], config: Mapping[str, Any], num_heads: int) -> str:
    """Why documents of one row are not independent; empty if they are."""
    try:
        small = small_model(cls, config, num_heads)
        if any(parts_of(entry) or not grows_with_tokens(entry) for entry in make_cache(small.model)):
            return "it keeps a state besides keys and values."
        ids = sample_inputs(small.model, batch=2, length=sum(LENGTHS))
        positions = mx.concatenate([mx.arange(length) for length in LENGTHS])[None]
        edges = [sum(LENGTHS[:number]) for number in range(len(LENGTHS) + 1)]
        alone = [main_output(small.model(ids[:, a:b])) for a, b in itertools.pairwise(edges)]
        with positions_by_token(small.model):
            packed = main_output(small.model(ids, cache=packed_cache(small.model, mx.repeat(positions, 2, axis=0))))
        mx.eval(alone, packed)
    except PartitaError as error:
        return str(error)
    except Exception as error:
        return f"its forward fails on a packed row: {describe(error)}"
    if packed.shape[:2] != ids.shape:
        return f"its logits of a packed row have the shape {list(packed.shape)}."
    for number, (one, start) in enumerate(zip(alone, edges, strict=False), 1):
        difference = relative_error(one, packed[:, start : start + one.shape[1]])
        if not difference <= TOLERANCES[small.dtype]:
            return (
                f"the logits of document {number} of a row differ from those of the document alone by {difference:.1e} of the "
                "largest."
            )
    return ""


def packed_cache(model: nn.Module, positions: mx.array) -> list[Any]:
    """The cache of a call with rows whose documents have these positions `[batch, tokens]`."""
    return [PackedRows(positions)] * len(make_cache(model))
