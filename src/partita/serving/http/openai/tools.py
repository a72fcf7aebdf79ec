"""Tools, response formats and messages, as the chat template and the grammar library take them."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from partita.errors import PartitaError
from partita.generation import Tokenizer
from partita.serving.grammar import of_schema
from partita.serving.http.errors import ApiError, as_api_error
from partita.serving.http.openai.bodies import (
    PLAIN_TEXTS,
    ChatBody,
    Message,
    NamedTool,
    ResponseFormat,
    Tool,
    part_error,
)
from partita.serving.http.openai.reader import END_THINK, THINK, Marks


def template_of(tokenizer: Tokenizer) -> str:
    """All of a tokenizer's chat templates as one text."""
    found = getattr(tokenizer.inner, "chat_template", None) or ""
    return found if isinstance(found, str) else "\n".join(map(str, found.values()))


def offered(body: ChatBody, template: str) -> list[dict[str, Any]]:
    """The tools that the template shows to the model.

    Raises:
        ApiError: The template shows no tools, or the tool to call is not among them.
    """
    choice = body.tool_choice
    names = [tool.function.name for tool in body.tools or ()]
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        text = f"tool_choice names {choice.function.name!r:.80}, which is not among tools."
        raise ApiError(400, text, param="tool_choice")
    if choice == "required" and not names:
        raise ApiError(400, "tool_choice is 'required', but there are no tools.", param="tool_choice")
    if not names or choice == "none":
        return []
    if "tools" not in template:
        raise ApiError(400, "this model's chat template shows no tools to the model. Leave tools out.", param="tools")
    return described(body.tools)


def described(tools: Sequence[Tool] | None) -> list[dict[str, Any]]:
    """Tools as chat templates take them."""
    return [tool.model_dump(exclude_none=True) for tool in tools or ()]


def grammar_of(body: ChatBody, tools: list[dict[str, Any]], param: str = "response_format.json_schema") -> str:
    """The grammar of the answer: of the calls that `tool_choice` demands, or of `response_format`; empty for any text.

    Args:
        body: The request.
        tools: The tools that the template shows.
        param: The field of the request with the schema of the format.

    Raises:
        ApiError: A schema cannot be used.
    """
    if tools and body.tool_choice not in (None, "auto"):
        wanted = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else None
        calls = [
            _object(
                name={"const": tool["function"]["name"]},
                arguments=tool["function"].get("parameters") or {"type": "object"},
            )
            for tool in tools
            if wanted in (None, tool["function"]["name"])
        ]
        return _grammar({"anyOf": calls} if len(calls) > 1 else calls[0], "tools")
    return format_grammar(body.response_format, param)


def format_grammar(wanted: ResponseFormat | None, param: str) -> str:
    """The grammar of a response format; empty for any text.

    Raises:
        ApiError: The schema is missing or cannot be used.
    """
    if wanted is None or wanted.type == "text":
        return ""
    if wanted.type == "json_object":
        return _grammar({"type": "object"}, param.partition(".")[0])
    if wanted.json_schema is None:
        raise ApiError(400, "response_format: json_schema is missing.", param=param)
    return _grammar(wanted.json_schema.json_schema, f"{param}.schema")


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _grammar(schema: Mapping[str, Any], param: str) -> str:
    try:
        return of_schema(schema)
    except PartitaError as error:
        raise as_api_error(error, param) from error


def marks_of(template: str, prompt_end: str, tools: list[dict[str, Any]], is_call: bool) -> Marks:
    """What the reader of an answer looks for.

    Args:
        template: The chat template.
        prompt_end: The text of the prompt's last tokens.
        tools: The tools that the model may call.
        is_call: Whether the answer must be a call.
    """
    begins = prompt_end.rstrip().endswith(THINK)
    reasons = begins or THINK in template or END_THINK in template
    return Marks(reasons=reasons, is_reasoning=begins, calls=bool(tools), is_call=is_call)


def as_template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates take them: the arguments of calls as objects, and contents as texts.

    If there are images, contents are lists of parts, as processors take them: texts, and images with their `url`.

    Raises:
        ApiError: A part of a message is neither text nor an image.
    """
    made = []
    parts = [_parts(message, place) for place, message in enumerate(messages)]
    has_images = any(part["type"] == "image" for content in parts for part in content)
    for message, content in zip(messages, parts, strict=True):
        text = "".join(part.get("text", "") for part in content)
        one: dict[str, Any] = {"role": message.role, "content": content if has_images else text}
        for name in ("name", "reasoning_content", "tool_call_id"):
            if getattr(message, name) is not None:
                one[name] = getattr(message, name)
        if message.tool_calls:
            one["tool_calls"] = [
                {
                    "type": "function",
                    **({"id": call.id} if call.id else {}),
                    "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
                }
                for call in message.tool_calls
            ]
        made.append(one)
    return made


def _parts(message: Message, place: int) -> list[dict[str, str]]:
    if message.content is None or isinstance(message.content, str):
        return [{"type": "text", "text": message.content}] if message.content else []
    made = []
    for part in message.content:
        if part.type in PLAIN_TEXTS and part.text is not None:
            made.append({"type": "text", "text": part.text})
        elif part.type == "image_url" and part.image_url is not None:
            made.append({"type": "image", "url": part.image_url.url})
        elif part.type == "image_url":
            where = f"messages.{place}.content"
            raise ApiError(400, f"{where}: a part of the type image_url needs an image_url with a url.", param=where)
        else:
            raise part_error(part.type, f"messages.{place}.content")
    return made


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def template_settings(settings: Mapping[str, Any] | None, tokenizer: Tokenizer) -> dict[str, Any]:
    """The template's variables that a request sets.

    Raises:
        ApiError: A name is an argument of the function that applies the template, such as another template.
    """
    reserved = inspect.signature(tokenizer.inner.apply_chat_template).parameters.keys() - {"documents", "kwargs"}
    for name in settings or ():
        if name in reserved or name == "messages":
            text = f"chat_template_kwargs: {name} is set by the server. Leave it out."
            raise ApiError(400, text, param="chat_template_kwargs")
    return dict(settings or {})
