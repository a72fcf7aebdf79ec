"""A file of prompts, a JSON object a line: `{"prompt": ...}` or `{"messages": [...]}`, with settings for this line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from partita.checkpoint.header import reason
from partita.errors import ModelError, PlanError
from partita.generation import Sampling, Tokenizer

_ALIASES = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
"""OpenAI's names of settings."""

_SETTINGS = {field.name for field in fields(Sampling)}
_FLAGS = {"ignore_eos", "use_generation_config"}


@dataclass(frozen=True)
class PromptLine:
    """A line of the file.

    Attributes:
        sampling: The settings of the command, with those that the line sets.
        prompt: A text or ids; None for a chat.
        messages: The messages of a chat.
        id: The caller's name of the prompt, which its answer repeats; None if the line has none.
    """

    sampling: Sampling
    prompt: str | tuple[int, ...] | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    id: str | int | None = None

    def encode(self, tokenizer: Tokenizer, *, chat: bool = False, system: str | None = None) -> list[int]:
        """The ids of the prompt.

        Args:
            tokenizer: The model's tokenizer.
            chat: Whether a prompt that is a text is a user's message for the chat template.
            system: The system message before it.

        Raises:
            CheckpointError: The tokenizer has no chat template, or it does not take these messages.
        """
        if self.prompt is None:
            return tokenizer.encode_messages(self.messages)
        if not isinstance(self.prompt, str):
            return list(self.prompt)
        return tokenizer.encode_chat(self.prompt, system) if chat else tokenizer.encode(self.prompt)


class PromptLines(Sequence[PromptLine]):
    """The prompts of a file, read from it when they are needed; blank lines are no prompts."""

    def __init__(self, file: Path, sampling: Sampling) -> None:
        """Check every line of `file`.

        Args:
            file: The file.
            sampling: The settings of lines that set none.

        Raises:
            ModelError: The file cannot be read, has no prompt, or a line is not understood; the message has its number.
        """
        self.file, self._sampling = file, sampling
        self._places: list[tuple[int, int]] = []
        try:
            with file.open("rb") as data:
                place = 0
                for number, line in enumerate(data, 1):
                    if line.strip():
                        self._parsed(line, number)
                        self._places.append((place, number))
                    place += len(line)
        except OSError as error:
            raise ModelError(f"--prompts {file} cannot be read: {reason(error)}.") from error
        if not self._places:
            raise ModelError(f'--prompts {file} has no prompt. Give it a line for each: {{"prompt": "Once"}}.')

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        place, number = self._places[index]
        with self.file.open("rb") as data:
            data.seek(place)
            return self._parsed(data.readline(), number)

    def _parsed(self, line: bytes, number: int) -> PromptLine:
        try:
            return _line_of(line, self._sampling)
        except PlanError as error:
            raise ModelError(f"--prompts {self.file}, line {number}: {error}") from error


def _line_of(line: bytes, sampling: Sampling) -> PromptLine:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"not JSON: {error}.") from error
    if not isinstance(data, dict):
        raise PlanError(f'must be a JSON object, as in {{"prompt": "Once"}}, but is {json.dumps(data)[:60]}.')
    prompt, messages, name = data.pop("prompt", None), data.pop("messages", None), data.pop("id", None)
    if (prompt is None) == (messages is None):
        raise PlanError("must have either prompt or messages.")
    if name is not None and (not isinstance(name, (str, int)) or isinstance(name, bool)):
        raise PlanError(f"id must be a text or a whole number, but is {name!r:.60}.")
    if isinstance(prompt, list):
        prompt = tuple(prompt)
    is_prompt = isinstance(prompt, str) or (isinstance(prompt, tuple) and all(type(i) is int for i in prompt))
    if prompt is not None and not is_prompt:
        raise PlanError(f"prompt must be a text or a list of ids, but is {prompt!r:.60}.")
    if isinstance(prompt, str) and any("\ud800" <= character <= "\udfff" for character in prompt):
        raise PlanError(f"prompt is not UTF-8 text: {prompt!a:.60}.")
    is_chat = isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages)
    if messages is not None and not is_chat:
        raise PlanError(f"messages must be a list of objects with a role and a content, but is {messages!r:.60}.")
    return PromptLine(replace(sampling, **_settings(data)), prompt, tuple(messages or ()), name)


def _settings(data: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for given, value in data.items():
        name = _ALIASES.get(given, given)
        if name not in _SETTINGS:
            known = ", ".join(sorted(_SETTINGS | set(_ALIASES)))
            raise PlanError(f"{given!r:.60} is no setting. A line has prompt or messages, id, and any of {known}.")
        if name in found:
            raise PlanError(f"{given} sets {name}, which the line sets already. Leave one of them out.")
        if value is None:
            continue
        if name in _FLAGS and not isinstance(value, bool):
            raise PlanError(f"{given} must be true or false, but is {value!r:.60}.")
        found[name] = _plain(name, value)
    return found


def _plain(name: str, value: Any) -> Any:
    """A setting as `Sampling` takes it."""
    if name == "stop":
        return tuple(value) if isinstance(value, list) else (value,)
    if name == "logit_bias":
        try:
            return {int(i): bias for i, bias in value.items()}
        except (AttributeError, ValueError) as error:
            raise PlanError(f'logit_bias must be numbers by id, as in {{"17": -2.5}}, but is {value!r:.60}.') from error
    return tuple(tuple(v) if isinstance(v, list) else v for v in value) if isinstance(value, list) else value
