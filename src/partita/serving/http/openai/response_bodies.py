"""The body of `/v1/responses`, and its items as the messages of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from partita.serving.http.errors import ApiError
from partita.serving.http.openai.bodies import (
    TEXTS,
    Body,
    ChatBody,
    ContentPart,
    Function,
    FunctionCall,
    ImageUrl,
    JsonSchema,
    Message,
    NamedFunction,
    NamedTool,
    ResponseFormat,
    SamplingBody,
    Tool,
    ToolCall,
    part_error,
)

IMAGE = "input_image"
"""The type of parts that have an image."""


class Part(Body):
    """A part of an item. Only those of the types `TEXTS` have a text, and only those of `IMAGE` an image."""

    type: str
    text: str | None = None
    image_url: str | None = None


class Item(Body):
    """An item of the input: a message, a call, its output, or reasoning; without a type it is a message."""

    type: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None
    summary: list[Part] | None = None


class FlatTool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FlatChoice(Body):
    """The function that the model must call."""

    type: Literal["function"]
    name: str


class TextFormat(Body):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextSettings(Body):
    """The settings of the answer's text."""

    format: TextFormat | None = None


class ResponsesBody(SamplingBody):
    """The body of `/v1/responses`, with the fields for sampling that the other routes have."""

    input: str | list[Item]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: list[FlatTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatChoice | None = None
    text: TextSettings | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    include: list[str] | None = None
    top_logprobs: int | None = None
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None
    chat_template_kwargs: dict[str, Any] | None = None

    def refuse_unsupported(self) -> None:
        """Raise `ApiError` for fields whose effect this server does not have, and without which the answer would be wrong."""
        for name, is_given, why in (
            ("background", self.background, "this server answers while the client waits. Leave it out."),
            ("conversation", self.conversation is not None, "this server has none. Use previous_response_id."),
            ("prompt", self.prompt is not None, "this server stores no prompts. Send the text as input."),
            (
                "include", "message.output_text.logprobs" in (self.include or ()),
                "this route has no log probabilities. Use /v1/chat/completions.",
            ),
            ("top_logprobs", self.top_logprobs, "this route has no log probabilities. Use /v1/chat/completions."),
        ):  # fmt: skip
            if is_given:
                raise ApiError(400, f"{name}: {why}", param=name)

    @property
    def items(self) -> list[Item]:
        """The items of the input."""
        return [Item(role="user", content=self.input)] if isinstance(self.input, str) else self.input

    def as_chat(self, messages: list[Message]) -> ChatBody:
        """The same request as a chat with `messages`.

        Raises:
            ApiError: The format has no schema.
        """
        tools = [
            Tool(
                type="function",
                function=Function(name=one.name, description=one.description, parameters=one.parameters),
            )
            for one in self.tools or ()
        ]
        choice = self.tool_choice
        form, wanted = None, self.text.format if self.text is not None else None
        if wanted is not None:
            if wanted.type == "json_schema" and wanted.json_schema is None:
                raise ApiError(400, "text.format: schema is missing.", param="text.format.schema")
            schema = (
                JsonSchema.model_validate({"schema": wanted.json_schema}) if wanted.json_schema is not None else None
            )
            form = ResponseFormat(type=wanted.type, json_schema=schema)
        return ChatBody.model_construct(
            messages=messages,
            tools=tools or None,
            response_format=form,
            tool_choice=NamedTool(type="function", function=NamedFunction(name=choice.name))
            if isinstance(choice, FlatChoice)
            else choice,
        )


def messages_of(items: Sequence[Item], before: Sequence[Message] = ()) -> list[Message]:
    """The messages `before`, and those of `items`: calls and reasoning are parts of an assistant's message.

    Raises:
        ApiError: An item is none that this server takes.
    """
    made, reasoning = list(before), ""
    for place, item in enumerate(items):
        where, kind = f"input.{place}", item.type or "message"
        if kind == "reasoning":
            reasoning += _text(item.content or item.summary or "", where)
            continue
        if kind == "message":
            if item.role is None or item.content is None:
                missing = "role" if item.role is None else "content"
                raise ApiError(400, f"{where}: a message needs a role and a content.", param=f"{where}.{missing}")
            message = Message(role=item.role, content=_content(item.content, f"{where}.content"))
            if item.role == "assistant" and reasoning:
                message.reasoning_content, reasoning = reasoning, ""
            made.append(message)
        elif kind == "function_call":
            if item.name is None or item.call_id is None:
                raise ApiError(400, f"{where}: a function_call needs a name and a call_id.", param=where)
            function = FunctionCall(name=item.name, arguments=item.arguments or "{}")
            call = ToolCall(id=item.call_id, type="function", function=function)
            if made and made[-1].role == "assistant" and not reasoning:
                made[-1] = made[-1].model_copy(update={"tool_calls": [*(made[-1].tool_calls or ()), call]})
            else:
                made.append(Message(role="assistant", reasoning_content=reasoning or None, tool_calls=[call]))
                reasoning = ""
        elif kind == "function_call_output":
            if item.output is None or item.call_id is None:
                raise ApiError(400, f"{where}: a function_call_output needs an output and a call_id.", param=where)
            made.append(Message(role="tool", content=_text(item.output, f"{where}.output"), tool_call_id=item.call_id))
        else:
            text = (
                f"{where}.type: this server takes items of the types message, function_call, function_call_output and "
                f"reasoning; got {kind!r:.60}."
            )
            raise ApiError(400, text, param=f"{where}.type")
    return made


def _content(content: str | Sequence[Part], where: str) -> str | list[ContentPart]:
    """A text, or parts if there are images."""
    if isinstance(content, str) or not any(part.type == IMAGE for part in content):
        return _text(content, where)
    made = []
    for part in content:
        if part.type != IMAGE:
            made.append(ContentPart(type="text", text=_text([part], where)))
        elif part.image_url is None:
            raise ApiError(400, f"{where}: an input_image needs an image_url; files are not kept here.", param=where)
        else:
            made.append(ContentPart(type="image_url", image_url=ImageUrl(url=part.image_url)))
    return made


def _text(content: str | Sequence[Part], where: str) -> str:
    if isinstance(content, str):
        return content
    for part in content:
        if part.type not in TEXTS or part.text is None:
            raise part_error(part.type, where)
    return "".join(part.text or "" for part in content)
