"""`/v1/embeddings`."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from partita.serving.http.errors import ApiError, as_api_error
from partita.serving.http.inbox import Embeds
from partita.serving.http.openai.bodies import EmbeddingsBody, parse
from partita.serving.http.service import Service
from partita.serving.pooling import Vectors

MOST_TEXTS = 2048
"""The largest number of texts of one HTTP request, as at OpenAI."""

NO_VECTORS = (
    "this model continues text: each of its tokens sees only those before it, and its folder does not say how they become one "
    "vector (modules.json of sentence-transformers). Serve an encoder, or a folder that has one."
)


async def embeddings(request: Request, service: Service) -> Response:
    """Compute a vector of each text."""
    body = parse(EmbeddingsBody, await request.body())
    model = service.model_of(body.model)
    inbox = service.embeddings
    if inbox is None:
        raise ApiError(400, NO_VECTORS, param="model")
    if body.dimensions is not None and body.dimensions > service.width:
        text = f"dimensions must be at most {service.width}, the width of this model's vectors; got {body.dimensions}."
        raise ApiError(400, text, param="dimensions")
    texts = await service.encode(lambda: _texts(service, body), "input")
    vectors = await _computed(service, inbox, texts)
    if not np.isfinite(vectors).all():
        raise ApiError(500, "the model's output is not finite.")
    if body.dimensions is not None:
        vectors = vectors[:, : body.dimensions]
        vectors = service.pooling.normalized(vectors) if service.pooling.normalizes else vectors
    count = sum(map(len, texts))
    service.metrics.embeddings.inc(len(texts))
    service.metrics.prompt_tokens.inc(count)
    data = [
        {"object": "embedding", "index": index, "embedding": _written(vector, body.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": count, "total_tokens": count}
    return JSONResponse({"object": "list", "data": data, "model": model, "usage": usage})


def _texts(service: Service, body: EmbeddingsBody) -> list[tuple[int, ...]]:
    """The ids of each text.

    Raises:
        ApiError: There are none or too many, or a text is empty, too long, or has ids that the model does not have.
    """
    given: Any = body.input
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not 1 <= len(given) <= MOST_TEXTS:
        raise ApiError(400, f"input must have from 1 to {MOST_TEXTS} texts; got {len(given)}.", param="input")
    found = []
    for place, one in enumerate(given):
        ids = tuple(_encoded(service, one) if isinstance(one, str) else one)
        strange = next((i for i in ids if not 0 <= i < service.vocab_size), None)
        if strange is not None:
            text = f"input.{place}: the model has ids 0 to {service.vocab_size - 1}; got {strange}."
            raise ApiError(400, text, param="input")
        if not ids or one == "":
            raise ApiError(400, f"input.{place} is empty. Give at least one token.", param="input")
        if len(ids) > service.context:
            text = f"input.{place} has {len(ids)} tokens, but this model takes at most {service.context}. Shorten it."
            raise ApiError(400, text, param="input", code="context_length_exceeded")
        found.append(ids)
    return found


def _encoded(service: Service, text: str) -> list[int]:
    pooling = service.pooling
    text = pooling.prefix + text
    return service.tokenizer.encode(text.lower() if pooling.lowers else text)


async def _computed(service: Service, inbox: Embeds, texts: list[tuple[int, ...]]) -> Vectors:
    """The vectors of texts, `[texts, width]`.

    Raises:
        ApiError: The server is shutting down, or a rank was lost.
    """
    if why := service.closed:
        raise ApiError(503, f"no request is accepted any more: {why}.", code="unavailable")
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()

    def on_vectors(result: Vectors | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the server has ended
            loop.call_soon_threadsafe(queue.put_nowait, result)

    try:
        inbox.embed(texts, on_vectors)
    except Exception as error:
        raise as_api_error(error) from error
    result = await queue.get()
    if isinstance(result, Exception):
        raise ApiError(503, str(result), code="unavailable") from result
    vectors: Vectors = result
    return vectors


def _written(vector: Vectors, form: str | None) -> Any:
    """A vector as numbers, or as the base64 of float32 in little-endian order."""
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
    return vector.tolist()
