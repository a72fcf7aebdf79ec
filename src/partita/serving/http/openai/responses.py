"""`/v1/responses`."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from partita.serving.http.answers import Answers
from partita.serving.http.errors import ApiError
from partita.serving.http.openai import tools as chat_tools
from partita.serving.http.openai.bodies import Message, new_seed, parse
from partita.serving.http.openai.chat import LAST_TOKENS
from partita.serving.http.openai.reader import Marks, Piece, Reader
from partita.serving.http.openai.response_bodies import FlatChoice, Item, ResponsesBody, messages_of
from partita.serving.http.openai.response_store import Stored, unknown
from partita.serving.http.openai.usage import Usage
from partita.serving.http.respond import respond
from partita.serving.http.service import Service
from partita.serving.requests import Input, Token

Data = dict[str, Any]


async def responses(request: Request, service: Service) -> Response:
    """Answer a conversation, which may continue an earlier response."""
    body = parse(ResponsesBody, await request.body())
    model = service.model_of(body.model)
    body.refuse_unsupported()
    earlier: list[Message] = []
    if body.previous_response_id is not None:
        stored = service.responses.find(body.previous_response_id)
        if stored is None:
            raise unknown(400, body.previous_response_id, "previous_response_id")
        earlier = stored.messages
    messages = messages_of(body.items, earlier)
    if not messages:
        raise ApiError(400, "input: must have at least one item.", param="input")
    body_of_chat = body.as_chat(messages)
    offered = chat_tools.offered(body_of_chat, service.template)
    grammar = chat_tools.grammar_of(body_of_chat, offered, "text.format")
    settings = chat_tools.template_settings(body.chat_template_kwargs, service.tokenizer)
    first = [Message(role="system", content=body.instructions)] if body.instructions else []
    shown = chat_tools.as_template_messages([*first, *messages])

    def encode() -> tuple[list[int], tuple[Input, ...], str]:
        ids, inputs = service.encode_messages(shown, tools=offered, settings=settings)
        return ids, inputs, service.tokenizer.decode(ids[-LAST_TOKENS:])

    prompt, inputs, end = await service.encode(encode, "input")
    most = service.new_tokens(prompt, body.max_output_tokens, "input")
    sampling = body.sampling(most, service.vocab_size, 0, new_seed())
    answers = service.answers(model, [(prompt, sampling)], None, grammar, inputs)
    is_call = bool(offered) and body.tool_choice not in (None, "auto")
    marks = chat_tools.marks_of(service.template, end, offered, is_call)
    form = _Response(service, model, body, marks, messages)
    return await respond(
        request, answers, lambda: form.whole(answers), form.stream(answers) if body.stream else None, done=False
    )


async def response(request: Request, service: Service) -> Response:
    """Read a kept response."""
    stored = service.responses.find(request.path_params["id"])
    if stored is None:
        raise unknown(404, request.path_params["id"])
    return JSONResponse(stored.data)


async def delete_response(request: Request, service: Service) -> Response:
    """Forget a kept response."""
    service.responses.remove(request.path_params["id"])
    return JSONResponse({"id": request.path_params["id"], "object": "response", "deleted": True})


class _Response:
    """One response as it grows: the same events, streamed or collected."""

    def __init__(
        self, service: Service, model: str, body: ResponsesBody, marks: Marks, messages: list[Message]
    ) -> None:
        self.service, self.body, self.messages = service, body, messages
        self.reader, self.usage = Reader(marks), Usage(1)
        self.output: list[Data] = []
        self.reasoning_tokens = 0
        self._is_open = False
        self._numbers = 0
        form = body.text.format if body.text is not None and body.text.format is not None else None
        choice = body.tool_choice.model_dump() if isinstance(body.tool_choice, FlatChoice) else body.tool_choice
        self.data: Data = {
            "id": f"resp_{secrets.token_hex(16)}", "object": "response", "created_at": int(time.time()),
            "status": "in_progress", "background": False, "completed_at": None, "error": None,
            "incomplete_details": None, "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens, "metadata": body.metadata or {}, "model": model,
            "output": [], "parallel_tool_calls": True, "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": None, "summary": None}, "store": body.store is not False,
            "temperature": body.temperature,
            "text": {"format": form.model_dump(by_alias=True, exclude_none=True) if form else {"type": "text"}},
            "tool_choice": choice or "auto", "tools": [tool.model_dump() for tool in body.tools or ()],
            "top_p": body.top_p, "truncation": "disabled", "usage": None, "user": None,
        }  # fmt: skip

    async def whole(self, answers: Answers) -> Data:
        """The response."""
        async for _ in self._events(answers):
            pass
        return self.data

    async def stream(self, answers: Answers) -> AsyncIterator[Data]:
        """The events of a stream; an error after the first one is an event too."""
        try:
            async for event in self._events(answers):
                yield event
        except ApiError as error:
            if not self._numbers:
                raise
            self.data |= {"status": "failed", "error": {"code": "server_error", "message": error.message}}
            yield self._event("response.failed", response=self._snapshot())

    async def _events(self, answers: Answers) -> AsyncIterator[Data]:
        async for _, event in answers:
            if not self._numbers:
                yield self._event("response.created", response=self._snapshot())
                yield self._event("response.in_progress", response=self._snapshot())
            if isinstance(event, Token):
                self.reasoning_tokens += self.reader.is_reasoning
                for data in self._grow(self.reader.add(event.text)):
                    yield data
                continue
            for data in self._grow(self.reader.add("", is_end=True)):
                yield data
            if not self.output:
                for data in self._open("message"):
                    yield data
            is_cut = event.reason == "length"
            for data in self._close("incomplete" if is_cut else "completed"):
                yield data
            self.usage.add(0, event)
            self._finish(is_cut)
            yield self._event("response.incomplete" if is_cut else "response.completed", response=self._snapshot())

    def _finish(self, is_cut: bool) -> None:
        usage = self.usage.data("input", "output")
        usage["input_tokens_details"]["cache_write_tokens"] = 0
        usage["output_tokens_details"] = {"reasoning_tokens": self.reasoning_tokens}
        self.data |= {
            "status": "incomplete" if is_cut else "completed", "usage": usage, "output": self.output,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "completed_at": None if is_cut else int(time.time()),
        }  # fmt: skip
        if self.data["store"]:
            answer = messages_of([Item.model_validate(item) for item in self.output], self.messages)
            self.service.responses.add(Stored(self.data, answer))

    def _snapshot(self) -> Data:
        return {**self.data, "output": list(self.output)}

    def _event(self, kind: str, **data: Any) -> Data:
        self._numbers += 1
        return {"type": kind, "sequence_number": self._numbers - 1, **data}

    def _of_item(self, kind: str, **data: Any) -> Data:
        place = {"output_index": len(self.output) - 1, "item_id": self.output[-1]["id"]}
        return self._event(kind, **place, **data)

    def _grow(self, piece: Piece) -> Iterator[Data]:
        """The events of what new text adds."""
        if piece.reasoning:
            yield from self._add("reasoning", "response.reasoning_text.delta", piece.reasoning)
        if piece.content:
            yield from self._add("message", "response.output_text.delta", piece.content, logprobs=[])
        for call in piece.calls:
            yield from self._call(call)

    def _add(self, kind: str, event: str, text: str, **more: Any) -> Iterator[Data]:
        yield from self._open(kind)
        self.output[-1]["content"][0]["text"] += text
        yield self._of_item(event, content_index=0, delta=text, **more)

    def _open(self, kind: str) -> Iterator[Data]:
        """Begin an item with a text, unless one of the same kind is growing."""
        if self._is_open and self.output[-1]["type"] == kind:
            return
        yield from self._close("completed")
        item: Data
        if kind == "message":
            item = {"id": f"msg_{secrets.token_hex(16)}", "type": kind, "role": "assistant"}
            part: Data = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item = {"id": f"rs_{secrets.token_hex(16)}", "type": kind, "summary": []}
            part = {"type": "reasoning_text", "text": ""}
        self._is_open = True
        self.output.append({**item, "status": "in_progress", "content": []})
        yield self._event(
            "response.output_item.added", output_index=len(self.output) - 1, item={**self.output[-1], "content": []}
        )
        self.output[-1]["content"].append(part)
        yield self._of_item("response.content_part.added", content_index=0, part=dict(part))

    def _close(self, status: str) -> Iterator[Data]:
        """End the item that is growing, if any."""
        if not self._is_open:
            return
        self._is_open = False
        item = self.output[-1]
        item["status"], part = status, item["content"][0]
        if item["type"] == "message":
            yield self._of_item("response.output_text.done", content_index=0, text=part["text"], logprobs=[])
        else:
            yield self._of_item("response.reasoning_text.done", content_index=0, text=part["text"])
        yield self._of_item("response.content_part.done", content_index=0, part=dict(part))
        yield self._event("response.output_item.done", output_index=len(self.output) - 1, item=dict(item))

    def _call(self, call: Data) -> Iterator[Data]:
        """A call, which is known only when it is complete."""
        yield from self._close("completed")
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        item = {
            "id": f"fc_{secrets.token_hex(16)}", "type": "function_call", "call_id": call["id"], "name": name,
            "arguments": arguments, "status": "completed",
        }  # fmt: skip
        self.output.append(item)
        index = len(self.output) - 1
        begun = {**item, "arguments": "", "status": "in_progress"}
        yield self._event("response.output_item.added", output_index=index, item=begun)
        yield self._of_item("response.function_call_arguments.delta", delta=arguments)
        yield self._of_item("response.function_call_arguments.done", name=name, arguments=arguments)
        yield self._event("response.output_item.done", output_index=index, item=item)
