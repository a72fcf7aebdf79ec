"""Small MLX models behind a serving loop, whose answers are compared with `generate` for each request alone."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from partita.generation import Sampling, byte_tokenizer
from partita.mlx.collectives.groups import single_groups
from partita.mlx.generate import generate
from partita.mlx.load import shard
from partita.mlx.model.mlx_lm_models import build
from partita.mlx.proof.family import fill
from partita.mlx.serving import serving_loop
from partita.serving import ServeSettings
from tests.support.mlx_models import tiny_config
from tests.support.serving import VOCABULARY, random_requests, served


def unsplit_model(family: str, changes: dict[str, Any], dtype: str) -> nn.Module:
    """A small model of a family over bytes."""
    mx.random.seed(2)
    config = {**tiny_config(family), **changes, "vocab_size": VOCABULARY}
    if "text_config" in config:
        config["text_config"] = {**config["text_config"], "vocab_size": VOCABULARY}
    return fill(build(config), getattr(mx, dtype))


def split_model(unsplit: nn.Module, where: dict[str, int]) -> nn.Module:
    groups = {} if where else {"groups": single_groups()}
    return shard(copy.deepcopy(unsplit), **where, **groups)  # type: ignore[arg-type]


def alone(model: nn.Module, prompt: tuple[int, ...], sampling: Sampling) -> tuple[tuple[int, ...], str, str]:
    """The tokens, the text and the reason of a request in a call of `generate` of its own."""
    (one,) = generate(model, [prompt], sampling, tokenizer=byte_tokenizer())
    return one.tokens, one.text, {"eos": "stop"}.get(one.finish_reason, one.finish_reason)


def compare(
    family: str,
    changes: dict[str, Any],
    where: dict[str, int],
    settings: ServeSettings,
    count: int,
    seed: int,
    dtype: str = "float64",
    bits: int = 0,
) -> tuple[list[str], int]:
    """Serve random requests. The first rank describes each whose answer is not the one that it gets alone.

    Returns:
        The descriptions, and the number of prompt tokens that were taken from earlier requests.
    """
    unsplit = unsplit_model(family, changes, dtype)
    if bits:
        nn.quantize(unsplit, group_size=32, bits=bits)
    loop = serving_loop(split_model(unsplit, where), settings, tokenizer=byte_tokenizer())
    requests = random_requests(count, seed)
    cancelled = tuple(request.id for request in requests[::7])
    heard = served(loop, requests, cancelled=cancelled)
    if not loop.rows.decides:
        return [], 0
    reference, wrong = split_model(unsplit, {}), []
    for request in requests:
        tokens, text, reason = alone(reference, request.prompt, request.sampling)
        one = heard[request.id]
        if request.id in cancelled and one.finished.reason == "cancelled":
            if one.tokens != tokens[: len(one.tokens)] or not text.startswith(one.text):
                wrong.append(f"cancelled {request}: {one.tokens} instead of {tokens}")
        elif (one.tokens, one.text, one.finished.reason) != (tokens, text, reason):
            wrong.append(f"{request}: {one.tokens} {one.text!r} {one.finished} instead of {tokens} {text!r} {reason}")
    stats = loop.inbox.stats()
    if stats.running or stats.queued or stats.blocks_used:
        wrong.append(f"left behind: {stats}")
    return wrong, stats.cached_tokens
