"""Grammars that answers follow: which tokens may come next. Every rank that chooses tokens computes the same."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from partita.dependencies import find
from partita.errors import PlanError
from partita.generation import Tokenizer

_PURPOSE = "make answers follow a grammar"
Mask = np.ndarray[Any, np.dtype[np.bool_]]

LIMIT = 1 << 20
"""The largest number of characters of a grammar."""


def of_schema(schema: Mapping[str, Any]) -> str:
    """The grammar of the JSON texts that a JSON schema describes.

    Raises:
        PlanError: The schema is malformed, too large, or uses what the grammar library does not support.
    """
    matcher = find("llguidance", "llguidance", "LLMatcher", _PURPOSE)
    try:
        text = json.dumps(schema)
        grammar = str(matcher.grammar_from_json_schema(text))
        why = str(matcher.validate_grammar(grammar)) if len(text) <= LIMIT else f"it has more than {LIMIT} characters"
    except (ValueError, RecursionError) as error:
        why = str(error) or "it is nested too deeply"
    if why:
        raise PlanError(f"the JSON schema cannot be used as a grammar: {' '.join(why.split())[:300]}")
    return grammar


class Grammars:
    """A tokenizer's grammars. Building one takes about a second, so a server builds one."""

    def __init__(self, tokenizer: Tokenizer, eos_ids: Collection[int], vocab_size: int) -> None:
        """Prepare a tokenizer.

        Args:
            tokenizer: The model's tokenizer.
            eos_ids: The ids that end an answer, which are allowed where the grammar is complete.
            vocab_size: The number of columns of the model's logits.

        Raises:
            PlanError: The tokenizer is not one of the `tokenizers` library.
        """
        make = find("llguidance", "llguidance.hf", "from_tokenizer", _PURPOSE)
        self.vocab_size = vocab_size
        self.eos_ids = sorted(eos_ids)
        try:
            self._tokens = make(tokenizer.inner, n_vocab=max(vocab_size, tokenizer.vocab_size), eos_token=self.eos_ids)
        except ValueError as error:
            raise PlanError(
                f"this model's tokenizer cannot be used with a grammar (response_format): {error}"
            ) from error

    def matcher(self, grammar: str) -> Matcher:
        """A new answer that follows `grammar`.

        Raises:
            PlanError: The grammar is malformed.
        """
        return Matcher(self, grammar)


class Matcher:
    """The state of one answer that follows a grammar."""

    def __init__(self, grammars: Grammars, grammar: str) -> None:
        self._grammars = grammars
        self._inner = find("llguidance", "llguidance", "LLMatcher", _PURPOSE)(grammars._tokens, grammar)
        if self._inner.is_error():
            raise PlanError(f"the grammar cannot be used: {self._inner.get_error()}")

    def allowed(self) -> Mask:
        """Which ids may come next, `[vocab]`: after the end only end tokens, none if the grammar has too many states."""
        size = self._grammars.vocab_size
        if self._inner.is_stopped() and not self._inner.is_error():
            mask = np.zeros(size, bool)
            mask[self._grammars.eos_ids] = True
            return mask
        if self._inner.is_error():
            return np.zeros(size, bool)
        bits = np.frombuffer(self._inner.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, bitorder="little")[:size].astype(bool)

    def accept(self, token: int) -> None:
        """Continue after `token`, one of the allowed ids."""
        if not self._inner.is_stopped():
            self._inner.consume_token(token)

    @property
    def is_complete(self) -> bool:
        """Whether the answer may end here."""
        return bool(self._inner.is_accepting() or self._inner.is_stopped())
