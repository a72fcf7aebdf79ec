"""The usage and the finish reasons of answers."""

from __future__ import annotations

from typing import Any

from partita.serving.requests import Finished


class Usage:
    """Counts the tokens of the answers to one HTTP request, each prompt once."""

    def __init__(self, answers_per_prompt: int) -> None:
        """Start at zero."""
        self._each = answers_per_prompt
        self._ended: dict[int, Finished] = {}

    def add(self, place: int, event: Finished) -> None:
        """Count the answer at `place`."""
        self._ended[place] = event

    def data(self, prompt: str = "prompt", completion: str = "completion") -> dict[str, Any]:
        """The usage, with the names of the fields of an API."""
        first = [event for place, event in self._ended.items() if place % self._each == 0]
        prompts = sum(event.prompt_tokens for event in first)
        new = sum(event.completion_tokens for event in self._ended.values())
        cached = sum(event.cached_tokens for event in first)
        return {
            f"{prompt}_tokens": prompts,
            f"{completion}_tokens": new,
            "total_tokens": prompts + new,
            f"{prompt}_tokens_details": {"cached_tokens": cached},
        }
