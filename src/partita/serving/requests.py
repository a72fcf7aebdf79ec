"""What a client asks for, and what the loop answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from partita.errors import PlanError
from partita.generation import Sampling

MOST_TOP_LOGPROBS = 20
"""The largest number of alternatives of a token that a request may ask for."""

Reason = Literal["stop", "length", "cancelled", "error", "lost"]


@dataclass(frozen=True)
class Input:
    """An array that a model takes beside the ids, such as the pixels of an image.

    Attributes:
        name: The argument of the model's forward.
        dtype: numpy's name of its dtype.
        shape: Its shape.
        data: Its bytes, in row-major order.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class ServeRequest:
    """A prompt to continue.

    Attributes:
        id: Identifies the request among those that are being served.
        prompt: The ids of the prompt, at least one.
        sampling: The sampling settings; the request's tokens are those of `generate` with them for this prompt alone.
        logprobs: Whether each token comes with its log probability, before any sampling setting.
        top_logprobs: The number of most likely tokens whose log probabilities come with each token, up to 20.
        grammar: A grammar in llguidance's format that the answer follows; empty for none. See `partita.serving.grammar`.
        adapter: The name of the adapters that compute the answer; empty for the model without any.
        inputs: What the model takes beside the ids. Such a prompt is computed by itself and shares no cache with others.
    """

    id: int
    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    logprobs: bool = False
    top_logprobs: int = 0
    grammar: str = ""
    adapter: str = ""
    inputs: tuple[Input, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompt:
            raise PlanError("the prompt is empty: it must have at least one token.")
        if not 0 <= self.top_logprobs <= MOST_TOP_LOGPROBS:
            raise PlanError(f"top_logprobs must be from 0 to {MOST_TOP_LOGPROBS}, but is {self.top_logprobs}.")


def refuse_beyond_context(context: int, prompt: int, wanted: int | None) -> None:
    """Raise `PlanError` for a prompt of `prompt` tokens with `wanted` new ones, or with any, that are more than `context`."""
    if prompt + (wanted or 1) > context:
        asked = f" and {wanted} new ones" if wanted else ""
        raise PlanError(
            f"this model's context has {context} tokens, but the prompt has {prompt}{asked}. Shorten the prompt, or ask for "
            "fewer tokens."
        )


@dataclass(frozen=True)
class Token:
    """A new token of a request.

    Attributes:
        id: The request.
        token: The token's id.
        text: The text that became final with it: without special tokens, incomplete characters, or the beginning of a stop
            text; often empty.
        logprob: Its log probability, if the request asked for it.
        top: The most likely tokens with their log probabilities, the most likely first.
    """

    id: int
    token: int
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Finished:
    """The end of a request.

    Attributes:
        id: The request.
        reason: `stop` after an end token or before a stop text, `length` at the limit, `cancelled`, `error`, or `lost` if the
            loop has failed, or a rank is lost.
        error: What went wrong; empty unless `reason` is `error` or `lost`.
        prompt_tokens: Tokens of the prompt.
        cached_tokens: Those of them whose keys and values were in the prefix cache.
        completion_tokens: New tokens, an end token included.
    """

    id: int
    reason: Reason
    error: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


Event = Token | Finished
OnEvent = Callable[[Event], None]
"""Receives a request's events in order, from the loop's thread; it must be quick."""


@dataclass(frozen=True)
class ServeSettings:
    """How a loop serves.

    Attributes:
        max_sequences: The largest number of requests that run at once in a replica; others wait.
        prefill_chunk: The largest number of prompt tokens that a step computes between tokens of running requests.
        cache_bytes: The memory of a rank for keys and values; None for its share of the memory that is free once the model is
            loaded, and at most what `max_sequences` requests of the model's longest text can use.
        block_tokens: Tokens of a cache block.
        keep_prefixes: Whether the blocks of earlier requests are reused for prompts that begin with the same tokens.
        exact_rows: Whether other requests may not change a request's rounding. Prompts are then computed one by one, unsplit,
            and steps as forwards of as many rows as were measured to have the bits of each row alone.
    """

    max_sequences: int = 16
    prefill_chunk: int = 256
    cache_bytes: int | None = None
    block_tokens: int = 16
    keep_prefixes: bool = True
    exact_rows: bool = False

    def __post_init__(self) -> None:
        for name in ("max_sequences", "prefill_chunk", "cache_bytes", "block_tokens"):
            value = getattr(self, name)
            if name == "cache_bytes" and value is None:
                continue
            if type(value) is not int or value < 1:
                raise PlanError(f"{name} must be a whole number of at least 1, but is {value!r}.")
