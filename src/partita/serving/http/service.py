"""What the routes share: the step loop's inbox, the model's tokenizer and limits, and the metrics."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, TypeVar

import anyio.to_thread

from partita.errors import PlanError
from partita.generation import Sampling, Tokenizer
from partita.serving.http.answers import Answers
from partita.serving.http.errors import ApiError, as_api_error
from partita.serving.http.inbox import Embeds, Inbox, Library
from partita.serving.http.metrics import Metrics
from partita.serving.http.openai.logprobs import TokenBytes
from partita.serving.http.openai.response_store import ResponseStore
from partita.serving.http.openai.tools import template_of
from partita.serving.images import ImageProcessor, images_of
from partita.serving.pooling import Pooling
from partita.serving.requests import Input, ServeRequest, refuse_beyond_context

MAX_BODY_BYTES = 8 << 20
"""The largest body of a request."""

DEFAULT_TOKENS = 512
"""The largest number of tokens of an answer whose request sets none."""

Result = TypeVar("Result")


@dataclass
class Service:
    """A served model.

    Attributes:
        inbox: The entrance to the step loop.
        tokenizer: The model's tokenizer, used by one thread at a time; not the one that the step loop uses.
        model: The name that clients call the model by.
        adapters: The names that clients call the model with one of its adapters by.
        context: The largest number of tokens of a prompt and its answer together.
        vocab_size: Number of ids.
        embeddings: The entrance to the loop that computes vectors; None for a model that continues text.
        width: The number of elements of its vectors.
        pooling: How that loop makes vectors.
        max_tokens: The largest number of tokens of an answer whose request sets none; at most what the context leaves.
        api_key: What clients must send as a bearer token; empty to let everyone in.
        max_body_bytes: The largest body.
        plan: What each rank holds, for the page.
        processor: Makes prompts of messages with images; None if the model takes none.
        no_images: Why it takes none.
        library: Other models that can be loaded instead; None if there are none.
    """

    inbox: Inbox
    tokenizer: Tokenizer
    model: str
    context: int
    vocab_size: int
    adapters: tuple[str, ...] = ()
    embeddings: Embeds | None = None
    width: int = 0
    pooling: Pooling = field(default_factory=Pooling)
    max_tokens: int = DEFAULT_TOKENS
    api_key: str = ""
    max_body_bytes: int = MAX_BODY_BYTES
    plan: dict[str, Any] = field(default_factory=dict)
    processor: ImageProcessor | None = None
    no_images: str = "this model takes text only"
    library: Library | None = None
    created_s: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.inbox)
        self.bytes_of = TokenBytes(self.tokenizer)
        self.template = template_of(self.tokenizer)
        self.responses = ResponseStore()
        self._ids = count(1)
        self._lock = threading.Lock()

    def followed_by(self, **changes: Any) -> Service:
        """The service of another model of the same server, which goes on with its counts and its kept responses."""
        one = replace(self, created_s=int(time.time()), **changes)
        one.metrics, one.responses, one._ids = self.metrics, self.responses, self._ids
        return one

    @property
    def closed(self) -> str:
        """Why no request is accepted any more; empty while requests are."""
        return self.inbox.closed

    async def encode(self, work: Callable[[], Result], param: str) -> Result:
        """The result of `work`, which uses the tokenizer, from a thread of its own.

        Raises:
            ApiError: The tokenizer or its chat template refuses the text; `param` is the field with it.
        """

        def locked() -> Result:
            with self._lock:
                return work()

        try:
            return await anyio.to_thread.run_sync(locked)
        except Exception as error:
            raise as_api_error(error, param) from error

    def encode_messages(
        self, messages: Sequence[Mapping[str, Any]], **given: Any
    ) -> tuple[list[int], tuple[Input, ...]]:
        """The ids of a chat, and what the model takes beside them; for the `work` of `encode`.

        The arguments are those of `ImageProcessor.encode`.

        Raises:
            PartitaError: The model, its chat template or its processor does not take these messages.
        """
        if not images_of(messages):
            return self.tokenizer.encode_messages(messages, **given), ()
        if self.processor is None:
            raise PlanError(f"there is an image among the messages, but {self.no_images.rstrip('.')}.")
        return self.processor.encode(messages, **given)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the model and of the model with each of its adapters."""
        return (self.model, *self.adapters)

    def model_of(self, name: str | None) -> str:
        """The one of `names` that a request names; the model without adapters if it names none.

        Raises:
            ApiError: None has this name.
        """
        if name and name not in self.names:
            text = f"the model {name!r:.100} is not served here. This server has {', '.join(map(repr, self.names))}."
            raise ApiError(404, text, param="model", code="model_not_found")
        return name or self.model

    def new_tokens(self, prompt: Sequence[int], wanted: int | None, param: str) -> int:
        """The largest number of tokens of the answer to a prompt.

        Raises:
            ApiError: The prompt is empty, or it and its answer are longer than the context.
        """
        if not prompt:
            raise ApiError(400, f"{param} has no tokens. Give at least one.", param=param)
        try:
            refuse_beyond_context(self.context, len(prompt), wanted)
        except PlanError as error:
            raise ApiError(400, str(error), param=param, code="context_length_exceeded") from error
        return wanted or min(self.context - len(prompt), self.max_tokens)

    def answers(
        self,
        model: str,
        prompts: Sequence[tuple[Sequence[int], Sampling]],
        logprobs: int | None,
        grammar: str = "",
        inputs: tuple[Input, ...] = (),
    ) -> Answers:
        """The requests for the answers of `model`, one of `names`, to prompts; not submitted yet.

        Args:
            model: The name.
            prompts: The ids of each prompt, and its settings.
            logprobs: The number of most likely tokens to report with each token; None for no log probabilities.
            grammar: The grammar of the answers.
            inputs: What the model takes beside the ids of each prompt.

        Raises:
            ApiError: The server is shutting down, or no step can be made.
        """
        if why := self.closed:
            raise ApiError(503, f"no request is accepted any more: {why}.", code="unavailable")
        adapter = model if model in self.adapters else ""
        requests = [
            ServeRequest(
                next(self._ids), tuple(prompt), sampling, logprobs is not None, logprobs or 0, grammar, adapter, inputs
            )
            for prompt, sampling in prompts
        ]
        return Answers(self.inbox, self.metrics, requests)
