"""Reasoning and calls are separated from an answer in the same way whatever pieces its text arrives in."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita.serving.http.openai.reader import Marks, Piece, Reader

BOTH = Marks(reasons=True, calls=True)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'


def read(marks: Marks, *texts: str) -> Piece:
    reader, whole = Reader(marks), Piece()
    pieces = [*(reader.add(text) for text in texts), reader.add("", is_end=True)]
    for piece in pieces:
        whole.reasoning += piece.reasoning
        whole.content += piece.content
        whole.calls += piece.calls
    return whole


CASES = [
    (Marks(), "<think>a</think>b", ("", "<think>a</think>b", [])),
    (BOTH, "plain < text", ("", "plain < text", [])),
    (BOTH, "<think>\nwhy?</think>\n\nbecause", ("\nwhy?", "because", [])),
    (Marks(reasons=True, is_reasoning=True), "why?</think>\nbecause", ("why?", "because", [])),
    (Marks(reasons=True, is_reasoning=True), "why</thin", ("why</thin", "", [])),
    (BOTH, CALL, ("", "", [("weather", {"city": "Ulm"})])),
    (BOTH, f"Let me look.{CALL}\n{CALL}", ("", "Let me look.", [("weather", {"city": "Ulm"})] * 2)),
    (BOTH, f"<think>hm</think>\n{CALL}", ("hm", "", [("weather", {"city": "Ulm"})])),
    (BOTH, "<tool_call>no JSON</tool_call> after", ("", "<tool_call>no JSON</tool_call> after", [])),
    (BOTH, "<tool_call>{unfinished", ("", "<tool_call>{unfinished", [])),
    (BOTH, '{"name": "weather", "parameters": {"city": "Ulm"}}', ("", "", [("weather", {"city": "Ulm"})])),
    (BOTH, '[TOOL_CALLS][{"name": "a", "arguments": {}}]', ("", "", [("a", {})])),
    (BOTH, '{"no": "call"}', ("", '{"no": "call"}', [])),
    (BOTH, "", ("", "", [])),
]


@pytest.mark.parametrize(("marks", "text", "expected"), CASES)
def test_what_is_found(marks: Marks, text: str, expected: tuple[str, str, list[tuple[str, object]]]) -> None:
    for texts in ([text], list(text), [text[i : i + 3] for i in range(0, len(text), 3)]):
        piece = read(marks, *texts)
        calls = [(one["function"]["name"], json.loads(one["function"]["arguments"])) for one in piece.calls]
        assert (piece.reasoning, piece.content, calls) == expected
        assert [one["index"] for one in piece.calls] == list(range(len(calls)))


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<tool_call>", "</tool_call>", "{", "a", "\n", "<", "tool_", "é"]))
)
def test_any_pieces_read_as_their_text(texts: list[str]) -> None:
    for marks in (Marks(), BOTH, Marks(reasons=True, is_reasoning=True)):
        one, many = read(marks, "".join(texts)), read(marks, *texts)
        assert (one.reasoning, one.content) == (many.reasoning, many.content)
    assert read(Marks(), *texts).content == "".join(texts)
