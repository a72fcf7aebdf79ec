"""`/v1/completions`."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from partita.serving.http.answers import Answers
from partita.serving.http.errors import ApiError
from partita.serving.http.openai.bodies import CompletionBody, new_seed, parse
from partita.serving.http.openai.logprobs import Logprobs, completion_logprobs
from partita.serving.http.openai.usage import Usage
from partita.serving.http.respond import respond
from partita.serving.http.service import Service
from partita.serving.requests import Token

NEW_TOKENS = 16
"""OpenAI's default of `max_tokens` for this route."""


async def completions(request: Request, service: Service) -> Response:
    """Continue prompts as they are, each `n` times."""
    body = parse(CompletionBody, await request.body())
    model = service.model_of(body.model)
    if body.suffix:
        raise ApiError(400, "suffix: this server only continues a prompt. Leave it out.", param="suffix")
    if body.echo and body.logprobs is not None:
        raise ApiError(
            400, "echo and logprobs exclude each other: a prompt has no log-probabilities here.", param="echo"
        )
    n = body.n or 1
    if body.best_of is not None and body.best_of != n:
        raise ApiError(400, f"best_of must be n ({n}), but is {body.best_of}.", param="best_of")
    texts = await service.encode(lambda: _prompts(service, body.prompt), "prompt")
    seed, asked = new_seed(), []
    for ids in texts:
        wanted = body.max_tokens or min(NEW_TOKENS, max(1, service.context - len(ids)))
        most = service.new_tokens(ids, wanted, "prompt")
        asked += [(ids, body.sampling(most, service.vocab_size, place, seed)) for place in range(n)]
    answers = service.answers(model, asked, body.logprobs)
    echoes = [""] * len(asked)
    if body.echo:
        echoes = await service.encode(lambda: [service.tokenizer.decode(list(ids)) for ids, _ in asked], "prompt")
    form = _Completion(service, model, body, echoes)
    return await respond(
        request, answers, lambda: form.whole(answers), form.chunks(answers) if body.stream else None
    )  # fmt: skip


def _prompts(service: Service, prompt: str | list[str] | list[int] | list[list[int]]) -> list[list[int]]:
    """The ids of each prompt."""
    if isinstance(prompt, str):
        return [service.tokenizer.encode(prompt)]
    if isinstance(prompt[0], int):
        prompt = [prompt]
    texts = [service.tokenizer.encode(one) if isinstance(one, str) else list(one) for one in prompt]
    strange = next((i for ids in texts for i in ids if not 0 <= i < service.vocab_size), None)
    if strange is not None:
        raise ApiError(400, f"prompt: the model has ids 0 to {service.vocab_size - 1}; got {strange}.", param="prompt")
    return texts


class _Completion:
    """The answers to one request, as `text_completion` or as chunks of it."""

    def __init__(self, service: Service, model: str, body: CompletionBody, echoes: list[str]) -> None:
        self.service, self.model, self.body, self.echoes = service, model, body, echoes
        self.usage = Usage(body.n or 1)
        self.lengths = [len(text) for text in echoes]
        self.id, self.created = f"cmpl-{secrets.token_hex(12)}", int(time.time())

    async def _choices(self, answers: Answers) -> AsyncIterator[tuple[int, str, list[Token], str | None]]:
        """For each event: the answer's index, new text, the tokens whose log-probabilities are due, the finish reason."""
        tokens = [Logprobs(self.service.bytes_of, self.service.tokenizer.special_ids) for _ in self.echoes]
        has_logprobs = self.body.logprobs is not None
        async for place, event in answers:
            text, self.echoes[place] = self.echoes[place], ""
            if isinstance(event, Token):
                yield place, text + event.text, tokens[place].add(event) if has_logprobs else [], None
            else:
                self.usage.add(place, event)
                yield place, text, tokens[place].end(event.reason) if has_logprobs else [], event.reason

    def _choice(self, place: int, text: str, tokens: list[Token], reason: str | None) -> dict[str, Any]:
        start, logprobs = self.lengths[place], None
        self.lengths[place] += len(text)
        if self.body.logprobs is not None:
            logprobs = completion_logprobs(tokens, self.service.bytes_of, start)
        return {"index": place, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id, "object": "text_completion", "created": self.created, "model": self.model,
            "choices": choices,
        }  # fmt: skip

    async def whole(self, answers: Answers) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        count = len(self.echoes)
        self.lengths = [0] * count
        texts, tokens, reasons = [""] * count, [list[Token]() for _ in range(count)], [""] * count
        async for place, text, due, reason in self._choices(answers):
            texts[place] += text
            tokens[place] += due
            reasons[place] = reason or ""
        choices = [self._choice(place, texts[place], tokens[place], reasons[place]) for place in range(count)]
        return {**self._object(choices), "usage": self.usage.data()}

    async def chunks(self, answers: Answers) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a stream."""
        usage = {"usage": None} if self.body.includes_usage else {}
        self.lengths = [0] * len(self.echoes)
        async for place, text, tokens, reason in self._choices(answers):
            if text or tokens or reason:
                yield {**self._object([self._choice(place, text, tokens, reason)]), **usage}
        if self.body.includes_usage:
            yield {**self._object([]), "usage": self.usage.data()}
