"""`/v1/chat/completions`."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from partita.serving.http.answers import Answers
from partita.serving.http.openai import tools as chat_tools
from partita.serving.http.openai.bodies import ChatBody, new_seed, parse
from partita.serving.http.openai.logprobs import Logprobs, chat_logprobs
from partita.serving.http.openai.reader import Marks, Piece, Reader
from partita.serving.http.openai.usage import Usage
from partita.serving.http.respond import respond
from partita.serving.http.service import Service
from partita.serving.requests import Event, Input, Token

LAST_TOKENS = 16
"""The number of a prompt's last tokens that are searched for the mark of reasoning."""


async def chat(request: Request, service: Service) -> Response:
    """Answer the next message of a chat, `n` times."""
    body = parse(ChatBody, await request.body())
    model = service.model_of(body.model)
    offered = chat_tools.offered(body, service.template)
    grammar = chat_tools.grammar_of(body, offered)
    messages = chat_tools.as_template_messages(body.messages)
    settings = chat_tools.template_settings(body.chat_template_kwargs, service.tokenizer)

    def encode() -> tuple[list[int], tuple[Input, ...], str]:
        ids, inputs = service.encode_messages(messages, tools=offered, settings=settings)
        return ids, inputs, service.tokenizer.decode(ids[-LAST_TOKENS:])

    prompt, inputs, end = await service.encode(encode, "messages")
    most = service.new_tokens(prompt, body.max_completion_tokens or body.max_tokens, "messages")
    seed, places = new_seed(), range(body.n or 1)
    samplings = [body.sampling(most, service.vocab_size, place, seed) for place in places]
    answers = service.answers(model, [(prompt, one) for one in samplings], body.wanted_logprobs, grammar, inputs)
    is_call = bool(offered) and body.tool_choice not in (None, "auto")
    form = _Chat(service, model, body, chat_tools.marks_of(service.template, end, offered, is_call), len(places))
    return await respond(
        request, answers, lambda: form.whole(answers), form.chunks(answers) if body.stream else None
    )  # fmt: skip


class _Choice:
    """One answer as it grows: the same pieces, streamed or collected."""

    def __init__(self, service: Service, marks: Marks, has_logprobs: bool) -> None:
        self.reader = Reader(marks)
        self.logprobs = Logprobs(service.bytes_of, service.tokenizer.special_ids) if has_logprobs else None
        self.reason: str | None = None

    def take(self, event: Event) -> tuple[Piece, list[Token]]:
        """What an event adds: text, and the tokens whose log-probabilities are due."""
        if isinstance(event, Token):
            return self.reader.add(event.text), self.logprobs.add(event) if self.logprobs else []
        piece = self.reader.add("", is_end=True)
        is_call = self.reader.calls and event.reason == "stop"
        self.reason = "tool_calls" if is_call else event.reason
        return piece, self.logprobs.end(event.reason) if self.logprobs else []


class _Chat:
    """The answers to one request, as `chat.completion` or as chunks of it."""

    def __init__(self, service: Service, model: str, body: ChatBody, marks: Marks, count: int) -> None:
        self.service, self.model, self.body, self.marks, self.count = service, model, body, marks, count
        self.usage = Usage(count)
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())

    async def _pieces(self, answers: Answers) -> AsyncIterator[tuple[int, _Choice, Piece, list[Token]]]:
        choices = [_Choice(self.service, self.marks, bool(self.body.logprobs)) for _ in range(self.count)]
        async for place, event in answers:
            piece, tokens = choices[place].take(event)
            if not isinstance(event, Token):
                self.usage.add(place, event)
            yield place, choices[place], piece, tokens

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices,
        }  # fmt: skip

    async def whole(self, answers: Answers) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        texts = [Piece() for _ in range(self.count)]
        tokens: list[list[Token]] = [[] for _ in range(self.count)]
        reasons: list[str | None] = [None] * self.count
        async for place, choice, piece, due in self._pieces(answers):
            texts[place].content += piece.content
            texts[place].reasoning += piece.reasoning
            texts[place].calls += piece.calls
            tokens[place] += due
            reasons[place] = choice.reason
        choices = [
            {
                "index": place,
                "message": _message(text),
                "logprobs": chat_logprobs(due, self.service.bytes_of) if self.body.logprobs else None,
                "finish_reason": reason,
            }
            for place, (text, due, reason) in enumerate(zip(texts, tokens, reasons, strict=True))
        ]
        return {**self._object("chat.completion", choices), "usage": self.usage.data()}

    async def chunks(self, answers: Answers) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a stream."""
        begun: set[int] = set()
        async for place, choice, piece, tokens in self._pieces(answers):
            if place not in begun:
                begun.add(place)
                yield self._chunk(place, {"role": "assistant", "content": ""})
            if piece or tokens:
                logprobs = chat_logprobs(tokens, self.service.bytes_of) if tokens else None
                yield self._chunk(place, _delta(piece), logprobs)
            if choice.reason:
                yield self._chunk(place, {}, reason=choice.reason)
        if self.body.includes_usage:
            yield {**self._object("chat.completion.chunk", []), "usage": self.usage.data()}

    def _chunk(
        self, place: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": place, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        usage = {"usage": None} if self.body.includes_usage else {}
        return {**self._object("chat.completion.chunk", [choice]), **usage}


def _delta(piece: Piece) -> dict[str, Any]:
    delta: dict[str, Any] = {"content": piece.content} if piece.content or not piece else {}
    if piece.reasoning:
        delta["reasoning_content"] = piece.reasoning
    if piece.calls:
        delta["tool_calls"] = piece.calls
    return delta


def _message(text: Piece) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text.content if text.content or not text.calls else None}
    if text.reasoning:
        message["reasoning_content"] = text.reasoning
    if text.calls:
        message["tool_calls"] = [{name: call[name] for name in ("id", "type", "function")} for call in text.calls]
    return message
