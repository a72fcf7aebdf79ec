"""How tokens are chosen, what is generated, and one sequence on its way there."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from partita.errors import PlanError
from partita.text.tokenizer import Tokenizer

OnText = Callable[[int, str], None]
"""Told of new text as it comes, with the prompt's place."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: After how many tokens a sequence ends at the latest.
        temperature: Divides the logits; 0 takes the likeliest token every time.
        top_k: Only so many of the likeliest; 0 for all.
        top_p: Only the likeliest that have this probability together (nucleus sampling: Holtzman et al. 2020, 1904.09751).
        min_p: Only those at least so likely as this fraction of the likeliest (2407.01082).
        repetition_penalty: Divides the logits of tokens that were there already (Keskar et al. 2019, 1909.05858); 1 for none.
        seed: Each sequence draws from its own generator of this seed and its place among the prompts.
        stop: A sequence ends before the first of these texts.
        ignore_eos: Whether a sequence goes on after an end token.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        rules: tuple[tuple[str, bool, str], ...] = (
            ("max_new_tokens", _is_whole(self.max_new_tokens, 1), "a whole number of at least 1"),
            ("temperature", _is_in(self.temperature, 0, math.inf), "a finite number of at least 0 (0 is greedy)"),
            ("top_k", _is_whole(self.top_k), "a whole number of at least 0 (0 for all)"),
            ("top_p", _is_in(self.top_p, 0, 1) and self.top_p > 0, "in (0, 1] (1 for all)"),
            ("min_p", _is_in(self.min_p, 0, 1), "in [0, 1] (0 for all)"),
            (
                "repetition_penalty",
                _is_in(self.repetition_penalty, 0, math.inf) and self.repetition_penalty > 0,
                "a finite number of more than 0 (1 for none)",
            ),
            ("seed", _is_whole(self.seed), "a whole number of at least 0"),
        )
        for name, ok, rule in rules:
            if not ok:
                raise PlanError(f"{name} must be {rule}, but is {getattr(self, name)!r}.")
        stop: object = self.stop
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise PlanError(f"stop must hold texts of at least one character, as in ('END',), but is {self.stop!r}.")


def _is_whole(value: object, least: int = 0) -> bool:
    return type(value) is int and value >= least


def _is_in(value: object, low: float, high: float) -> bool:
    """Whether it is a finite number from `low` to `high`."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high and value < math.inf


@dataclass(frozen=True)
class Generation:
    """What was generated after one prompt: tokens and their text, and why it ended (`eos`, `stop` or `length`)."""

    tokens: tuple[int, ...]
    text: str
    finish_reason: str


@dataclass
class Sequence:
    """One sequence under way.

    Attributes:
        place: Its place among the prompts.
        prompt: The ids that it continues.
        tokens: What came after them so far.
        text: Their text; empty without a tokenizer.
        shown: How many characters of it were passed on.
        finish_reason: Why it ended; empty while it goes on.
    """

    place: int
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    shown: int = 0
    finish_reason: str = ""

    def accept(self, token: int, sampling: Sampling, tokenizer: Tokenizer | None, eos_ids: frozenset[int]) -> None:
        """Add a token, and end before a text of `sampling.stop`, behind an end token or at the number of new tokens."""
        self.tokens.append(token)
        if tokenizer is not None:
            self.text = tokenizer.decode(self.tokens)
            ends = [self.text.find(stop) for stop in sampling.stop if stop in self.text]
            if ends:
                self.text, self.finish_reason = self.text[: min(ends)], "stop"
                return
        if token in eos_ids:
            self.finish_reason = "eos"
        elif len(self.tokens) >= sampling.max_new_tokens:
            self.finish_reason = "length"

    def show(self, on_text: OnText | None, stop: tuple[str, ...] = ()) -> None:
        """Pass on the text that is certain: no character whose bytes are not all there yet, no beginning of a stop text."""
        if on_text is None:
            return
        certain = self.text
        if not self.finish_reason:
            certain = certain.rstrip("\ufffd")
            held = (n for text in stop for n in range(1, len(text)) if certain.endswith(text[:n]))
            certain = certain[: len(certain) - max(held, default=0)]
        if len(certain) > self.shown:
            on_text(self.place, certain[self.shown :])
            self.shown = len(certain)

    @property
    def generation(self) -> Generation:
        """What came out."""
        return Generation(tuple(self.tokens), self.text, self.finish_reason)
