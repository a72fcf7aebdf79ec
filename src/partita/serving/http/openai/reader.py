"""Separate the text of an answer, while it grows, into what the template marks as reasoning, calls of tools, and the rest."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from typing import Any

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"
PREFIXES = ("[TOOL_CALLS]", "<|python_tag|>")
"""What models write before calls that are JSON without tags."""


@dataclass(frozen=True)
class Marks:
    """What an answer may contain beside text.

    Attributes:
        reasons: Whether the template marks reasoning.
        is_reasoning: Whether the answer begins inside reasoning, because the prompt ends with its mark.
        calls: Whether the answer may call tools.
        is_call: Whether the answer is nothing but calls, as a grammar ensures.
    """

    reasons: bool = False
    is_reasoning: bool = False
    calls: bool = False
    is_call: bool = False


@dataclass
class Piece:
    """What new text adds to an answer."""

    reasoning: str = ""
    content: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.calls)


class Reader:
    """Reads one answer. Text that may begin a mark waits until it is known."""

    def __init__(self, marks: Marks) -> None:
        """Start before the first text."""
        self._marks = marks
        self._waiting = ""
        self._state = "reasoning" if marks.is_reasoning else "start"
        self.calls = 0
        self._trims = True  # blanks around calls are not part of the text

    @property
    def is_reasoning(self) -> bool:
        """Whether the text so far ends inside reasoning."""
        return self._state == "reasoning"

    def add(self, text: str, *, is_end: bool = False) -> Piece:
        """Take new text; at the end, what still waits is read too."""
        self._waiting += text
        piece = Piece()
        while getattr(self, f"_{self._state}")(piece, is_end):
            pass
        return piece

    def _start(self, piece: Piece, is_end: bool) -> bool:
        """Before the first visible character: reasoning, calls without tags, or text."""
        text = self._waiting.lstrip()
        marks = ((THINK,) if self._marks.reasons else ()) + (PREFIXES if self._marks.calls else ())
        if not is_end and ((not text and (self._marks.reasons or self._marks.calls)) or _may_begin(text, marks)):
            return False
        if self._marks.reasons and text.startswith(THINK):
            self._state, self._waiting = "reasoning", text[len(THINK) :]
        elif self._marks.calls and (self._marks.is_call or text.startswith(("{", "[", *PREFIXES))):
            self._state = "json"
        else:
            self._state = "content"
        return True

    def _reasoning(self, piece: Piece, is_end: bool) -> bool:
        before, mark, after = self._waiting.partition(END_THINK)
        if mark:
            piece.reasoning += before
            self._waiting, self._state = after.lstrip("\n"), "after"
            return True
        held = 0 if is_end else _held(self._waiting, (END_THINK,))
        cut = len(self._waiting) - held
        piece.reasoning += self._waiting[:cut]
        self._waiting = self._waiting[cut:]
        return False

    def _after(self, piece: Piece, is_end: bool) -> bool:
        """Between the end of reasoning and the answer, where line breaks are not part of either."""
        self._waiting = self._waiting.lstrip("\n")
        if not self._waiting and not is_end:
            return False
        self._marks = Marks(calls=self._marks.calls, is_call=self._marks.is_call)
        self._state = "start"
        return True

    def _json(self, piece: Piece, is_end: bool) -> bool:
        """Calls without tags: JSON that is known to be a call only when it is complete."""
        if not is_end:
            return False
        text = self._waiting.strip()
        for prefix in PREFIXES:
            text = text.removeprefix(prefix)
        calls = _calls(text)
        if calls:
            self._waiting = ""
            self._found(piece, calls)
            return False
        self._state = "content"
        return True

    def _content(self, piece: Piece, is_end: bool) -> bool:
        if not self._marks.calls:
            piece.content += self._waiting
            self._waiting = ""
            return False
        if self._trims:
            self._waiting = self._waiting.lstrip()
        before, mark, after = self._waiting.partition(CALL)
        if not mark:
            cut = len(before) - (0 if is_end else _held(before, (CALL,)))
            self._show(piece, before[:cut])
            self._waiting = before[cut:]
            return False
        self._show(piece, before)
        inner, end, rest = after.partition(END_CALL)
        if not end and not is_end:
            self._waiting = mark + after
            return False
        self._waiting = rest
        if calls := _calls(inner):
            self._found(piece, calls)
        else:
            self._show(piece, mark + inner + end)
        return True

    def _show(self, piece: Piece, text: str) -> None:
        piece.content += text
        self._trims = self._trims and not text

    def _found(self, piece: Piece, calls: list[tuple[str, str]]) -> None:
        self._trims = True
        for name, arguments in calls:
            function = {"name": name, "arguments": arguments}
            call = {
                "index": self.calls,
                "id": f"call_{secrets.token_hex(12)}",
                "type": "function",
                "function": function,
            }
            piece.calls.append(call)
            self.calls += 1


def _may_begin(text: str, marks: tuple[str, ...]) -> bool:
    """Whether `text` is the beginning of one of `marks`, but not yet all of it."""
    return any(len(text) < len(mark) and mark.startswith(text) for mark in marks if text)


def _held(text: str, marks: tuple[str, ...]) -> int:
    """The number of last characters that may begin a mark."""
    return max((n for mark in marks for n in range(1, len(mark)) if text.endswith(mark[:n])), default=0)


def _calls(text: str) -> list[tuple[str, str]]:
    """The names and the JSON arguments of the calls that a JSON text makes; empty if it is anything else."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return []
    found = []
    for call in data if isinstance(data, list) else [data]:
        arguments = call.get("arguments", call.get("parameters", {})) if isinstance(call, dict) else None
        if (
            not isinstance(call, dict)
            or not isinstance(call.get("name"), str)
            or not isinstance(arguments, (dict, str))
        ):
            return []
        written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        found.append((call["name"], written))
    return found
