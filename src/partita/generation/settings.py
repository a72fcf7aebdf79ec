"""Sampling settings, generated texts, and sequences during generation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from partita.errors import PlanError
from partita.generation.new_text import NewText
from partita.generation.tokenizer import Tokenizer

if TYPE_CHECKING:
    from partita.generation.choice import Choice

OnText = Callable[[int, str], None]
"""A callback for new text, with the index of its prompt."""


def _is_whole(value: object, least: int = 0) -> bool:
    return type(value) is int and value >= least


def _is_in(value: Any, low: float, high: float, *, open_below: bool = False) -> bool:
    """Whether `value` is a finite number from `low` to `high`."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and low <= value <= high and value < math.inf and not (open_below and value == low)


def _are_ids(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(_is_whole(i) for i in value)


def _is_bias(value: Any) -> bool:
    pairs = value.items() if isinstance(value, Mapping) else value
    return all(_is_whole(i) and _is_in(abs(b), 0, math.inf) for i, b in pairs)


def _are_words(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(_are_ids(word) and word for word in value)


RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (lambda v: _is_whole(v, 1), "a whole number of at least 1"),
    "max_length": (lambda v: _is_whole(v, 1), "a whole number of at least 1"),
    "temperature": (lambda v: _is_in(v, 0, math.inf), "a finite number of at least 0 (0 is greedy)"),
    "top_k": (_is_whole, "a whole number of at least 0 (0 for all)"),
    "top_p": (lambda v: _is_in(v, 0, 1, open_below=True), "in (0, 1] (1 for all)"),
    "min_p": (lambda v: _is_in(v, 0, 1), "in [0, 1] (0 for all)"),
    "repetition_penalty": (
        lambda v: _is_in(v, 0, math.inf, open_below=True),
        "a finite number of more than 0 (1 for none)",
    ),
    "presence_penalty": (lambda v: _is_in(abs(v), 0, math.inf), "a finite number (0 for none)"),
    "frequency_penalty": (lambda v: _is_in(abs(v), 0, math.inf), "a finite number (0 for none)"),
    "penalty_window": (_is_whole, "a whole number of at least 0 (0 for all tokens)"),
    "logit_bias": (_is_bias, "finite numbers by id, as in {17: -2.5}"),
    "xtc_probability": (lambda v: _is_in(v, 0, 1), "in [0, 1] (0 for none)"),
    "xtc_threshold": (lambda v: _is_in(v, 0, 0.5), "in [0, 0.5]"),
    "no_repeat_ngram_size": (_is_whole, "a whole number of at least 0 (0 for none)"),
    "bad_words_ids": (_are_words, "a list of lists of ids"),
    "suppress_tokens": (_are_ids, "a list of ids"),
    "begin_suppress_tokens": (_are_ids, "a list of ids"),
    "min_new_tokens": (_is_whole, "a whole number of at least 0"),
    "min_length": (_is_whole, "a whole number of at least 0"),
    "seed": (_is_whole, "a whole number of at least 0"),
}
"""For each setting, the rule for its value as a function and in words."""


@dataclass(frozen=True)
class Sampling:
    """Settings for choosing the next token.

    None is replaced by the model's generation config (`generation_config.json`), or else by the default of transformers:
    greedy without `do_sample`, and with it sampling at temperature 1 from the 50 most likely tokens.

    Attributes:
        max_new_tokens: Largest number of new tokens; 64 if the model sets no limit either.
        temperature: Divides the logits; 0 always chooses the most likely token. A number above 0 samples.
        top_k: Sample only from this many most likely tokens; 0 for all. Like `top_p` and `min_p`, used only for sampling.
        top_p: Sample only from the most likely tokens with this total probability (nucleus sampling: Holtzman et al. 2020,
            1904.09751).
        min_p: Sample only from tokens at least this likely, relative to the most likely token (2407.01082).
        repetition_penalty: Divides the logits of tokens that have appeared (Keskar et al. 2019, 1909.05858); 1 for none.
        presence_penalty: Subtracted from the logits of tokens that have appeared; 0 for none.
        frequency_penalty: Subtracted from the logit of a token for each time that it has appeared; 0 for none.
        penalty_window: Number of last tokens, prompt included, that the three penalties count; 0 for all.
        logit_bias: Values added to the logits of ids, before the penalties.
        xtc_probability: The probability with which a token is chosen without the most likely ones (XTC, "exclude top choices"):
            after all other filters, every token of at least `xtc_threshold` is excluded but the least likely of them. End
            tokens are never excluded. Used only for sampling; 0 for none.
        xtc_threshold: The probability from which XTC excludes tokens, at most 0.5.
        no_repeat_ngram_size: Length of token sequences that may not appear twice; 0 disables this.
        bad_words_ids: Sequences of ids that must not appear.
        suppress_tokens: Ids that are never chosen.
        begin_suppress_tokens: Ids that are not chosen as the first new token.
        min_new_tokens: Least number of new tokens.
        seed: Sampling seed. The generator of each sequence depends on it and on the index of its prompt.
        stop: Texts at which a sequence ends, which it does not include; they may contain special tokens.
        ignore_eos: Whether a sequence continues after an end token.
        use_generation_config: Whether the model's generation config applies; if not, only its end tokens do.
    """

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    no_repeat_ngram_size: int | None = None
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    suppress_tokens: tuple[int, ...] | None = None
    begin_suppress_tokens: tuple[int, ...] | None = None
    min_new_tokens: int | None = None
    use_generation_config: bool = True
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_window: int = 0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1

    def __post_init__(self) -> None:
        for name, (is_right, rule) in RULES.items():
            value = getattr(self, name, None)
            try:
                ok = value is None or is_right(value)
            except (TypeError, ValueError):
                ok = False
            if not ok:
                raise PlanError(f"{name} must be {rule}, but is {value!r}.")
        if isinstance(self.logit_bias, Mapping):
            # A frozen dataclass must be hashable.
            object.__setattr__(self, "logit_bias", tuple(self.logit_bias.items()))
        stop: object = self.stop
        if isinstance(stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise PlanError(f"stop must hold texts of at least one character, as in ('END',), but is {self.stop!r}.")


@dataclass(frozen=True)
class Generation:
    """The continuation of one prompt: tokens, their text, and why it ended (`eos`, `stop` or `length`)."""

    tokens: tuple[int, ...]
    text: str
    finish_reason: str


@dataclass
class Sequence:
    """A sequence during generation.

    Attributes:
        place: The index of its prompt.
        prompt: The ids of the prompt.
        limit: The largest number of new tokens.
        tokens: The new tokens so far.
        arrivals_s: When each of them was known on this rank (`time.perf_counter()`), and a failure in place of one.
        finish_reason: Why it ended; empty until then.
        is_streamed: Whether its text is needed while it grows. If not, and without stop texts, it is decoded at the end.
        failure: The code in place of a token if logits were not finite, else 0.
    """

    place: int
    prompt: list[int]
    limit: int
    tokens: list[int] = field(default_factory=list)
    arrivals_s: list[float] = field(default_factory=list)
    finish_reason: str = ""
    is_streamed: bool = True
    failure: int = 0
    _new: NewText | None = field(default=None, init=False)
    _end: int | None = field(default=None, init=False)
    _searched: int = field(default=0, init=False)
    _passed_on: int = field(default=0, init=False)

    @property
    def text(self) -> str:
        """The text of the tokens, without special ones; empty without a tokenizer."""
        return self._new.shown(0, self._certain) if self._new is not None else ""

    @property
    def _certain(self) -> int:
        """The number of characters, special tokens included, that are final and not removed by a stop text."""
        assert self._new is not None
        return len(self._new.text) if self._end is None else self._end

    def accept(self, token: int, choice: Choice, tokenizer: Tokenizer | None) -> None:
        """Add a token, and end before a text of `choice.stop`, after an end token or at the largest number of new tokens.

        A code of `choose`, which is negative, ends it too.
        """
        self.arrivals_s.append(time.perf_counter())
        if token < 0:
            self.failure, self.finish_reason = token, "failure"
            return
        self.tokens.append(token)
        if token in choice.eos_ids:
            self.finish_reason = "eos"
        elif len(self.tokens) >= self.limit:
            self.finish_reason = "length"
        if tokenizer is None or not (self.is_streamed or choice.stop):
            return
        self._new = self._new or NewText(tokenizer, self.prompt)
        self._new.add(token)
        if self.finish_reason:
            self._new.end()
        text = self._new.text
        found = (text.find(stop, max(0, self._searched - len(stop) + 1)) for stop in choice.stop)
        self._end = min((place for place in found if place >= 0), default=None)
        self._searched = len(text)
        if self._end is not None:
            self.finish_reason = "stop"

    def show(self, on_text: OnText | None, stop: tuple[str, ...] = ()) -> None:
        """Pass on the final text, without incomplete characters and without the beginning of a stop text."""
        if on_text is None or self._new is None:
            return
        certain = self._certain
        if not self.finish_reason:
            held = (n for text in stop for n in range(1, len(text)) if self._new.text.endswith(text[:n]))
            certain -= max(held, default=0)
        if certain > self._passed_on:
            text = self._new.shown(self._passed_on, certain)
            self._passed_on = certain
            if text:
                on_text(self.place, text)

    def generation(self, tokenizer: Tokenizer | None) -> Generation:
        """The result."""
        if self._new is None and tokenizer is not None:
            self._new = NewText(tokenizer, self.prompt)
            for token in self.tokens:
                self._new.add(token)
            self._new.end()
        return Generation(tuple(self.tokens), self.text, self.finish_reason)
