"""A step as bytes: all that the ranks of a replica receive from the one that decides. Nothing is pickled."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from partita.generation import Sampling
from partita.serving.requests import Input, ServeRequest


@dataclass(frozen=True)
class Admission:
    """A request that starts to run.

    Attributes:
        request: The request.
        blocks: Its cache blocks, in order of its tokens; enough for all tokens that it may get.
        cached: Tokens of its prompt that are in the first of its blocks already.
    """

    request: ServeRequest
    blocks: tuple[int, ...]
    cached: int = 0


@dataclass(frozen=True)
class Row:
    """Tokens of one request that a forward computes.

    Attributes:
        id: The request.
        start: The index of the first token, prompt included.
        count: The number of tokens.
        chooses: Whether the next token is chosen after the last of them.
    """

    id: int
    start: int
    count: int
    chooses: bool


@dataclass(frozen=True)
class Step:
    """What a replica does in one step.

    Attributes:
        ended: Requests whose state is released, before anything else.
        tokens: Requests and the tokens that earlier steps chose for them, which are appended before the forwards.
        admitted: Requests that start.
        batches: The forwards, each of rows with the same adapters. Under pp a row may be divided over several, in order.
        ends: Whether the loop ends after this step.
        following: What is served after the end, as text; empty for nothing.
    """

    ended: tuple[int, ...] = ()
    tokens: tuple[tuple[int, int], ...] = ()
    admitted: tuple[Admission, ...] = ()
    batches: tuple[tuple[Row, ...], ...] = ()
    ends: bool = False
    following: str = ""

    @property
    def choosing(self) -> list[Row]:
        """The rows for which a token is chosen, in order."""
        return [row for batch in self.batches for row in batch if row.chooses]


def encode(step: Step) -> bytes:
    """A step as bytes, which `decode` reads."""
    batches = [[[row.id, row.start, row.count, row.chooses] for row in batch] for batch in step.batches]
    admitted = [[plain_request(one.request), one.blocks, one.cached] for one in step.admitted]
    plain = [step.ended, step.tokens, admitted, batches, step.ends, step.following]
    return json.dumps(plain, separators=(",", ":"), allow_nan=False).encode()


def decode(data: bytes) -> Step:
    """A step from the bytes of `encode`."""
    ended, tokens, admitted, batches, ends, following = json.loads(data)
    return Step(
        tuple(ended),
        tuple((number, token) for number, token in tokens),
        tuple(Admission(read_request(*request), tuple(blocks), cached) for request, blocks, cached in admitted),
        tuple(tuple(Row(*row) for row in batch) for batch in batches),
        ends,
        following,
    )


def plain_request(request: ServeRequest) -> list[Any]:
    """A request as JSON's values, which `read_request` takes as its arguments."""
    default = Sampling()
    given = {name: value for name, value in asdict(request.sampling).items() if value != getattr(default, name)}
    inputs = [[one.name, one.dtype, one.shape, base64.b64encode(one.data).decode("ascii")] for one in request.inputs]
    return [
        request.id, request.prompt, given, request.logprobs, request.top_logprobs, request.grammar, request.adapter, inputs
    ]  # fmt: skip


def read_request(
    number: int,
    prompt: list[int],
    sampling: dict[str, Any],
    logprobs: bool,
    top: int,
    grammar: str,
    adapter: str,
    inputs: list[list[Any]],
) -> ServeRequest:
    """The request of the values of `plain_request`."""
    known = {field.name for field in fields(Sampling)}
    given = {name: _tuples(value) for name, value in sampling.items() if name in known}
    arrays = tuple(Input(name, dtype, tuple(shape), base64.b64decode(data)) for name, dtype, shape, data in inputs)
    return ServeRequest(number, tuple(prompt), Sampling(**given), logprobs, top, grammar, adapter, arrays)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
