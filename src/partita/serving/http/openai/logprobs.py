"""Log-probabilities with the bytes of each token."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from partita.generation import Tokenizer
from partita.generation.tokenizer import byte_characters
from partita.serving.requests import Token


class TokenBytes:
    """The bytes that each id stands for, which need not be complete characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Find out how the tokenizer writes bytes in its vocabulary."""
        self._tokenizer = tokenizer
        backend = getattr(tokenizer.inner, "backend_tokenizer", None)
        decoder = getattr(backend, "decoder", None)
        kinds = _kinds(json.loads(decoder.__getstate__())) if decoder is not None else set()
        self._is_byte_level = "ByteLevel" in kinds
        self._is_sentencepiece = not self._is_byte_level and bool(kinds & {"ByteFallback", "Metaspace"})
        self._added: set[int] = set(getattr(tokenizer.inner, "added_tokens_decoder", {}))
        self.of = cache(self._of)

    def _of(self, token: int) -> bytes:
        """The bytes of an id; those of its name for a special token."""
        name = self._tokenizer.name(token)
        if token in self._added:
            return name.encode()
        if self._is_byte_level and all(character in _BYTES for character in name):
            return bytes(_BYTES[character] for character in name)
        if self._is_sentencepiece:
            if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
                return bytes([int(name[3:5], 16)])
            return name.replace("▁", " ").encode()
        return self._tokenizer.decode([token]).encode()


_BYTES = {character: byte for byte, character in enumerate(byte_characters())}


def _kinds(decoder: Any) -> set[str]:
    """The types of a decoder of the `tokenizers` library, and of those it consists of."""
    return {decoder["type"]}.union(*(_kinds(one) for one in decoder.get("decoders", ())))


class Logprobs:
    """The tokens of one answer that contribute to its text: an end token and the tokens of a removed stop text do not.

    A token is reported once the text has grown beyond its first byte.
    """

    def __init__(self, bytes_of: TokenBytes, special_ids: frozenset[int]) -> None:
        """Start before the first token."""
        self._bytes_of, self._special_ids = bytes_of, special_ids
        self._waiting: list[tuple[int, Token]] = []
        self._start = self._shown = 0

    def add(self, token: Token) -> list[Token]:
        """Take the next token. Returns those whose text has become final."""
        self._waiting.append((self._start, token))
        self._shown += len(token.text.encode())
        if token.token not in self._special_ids:
            self._start += len(self._bytes_of.of(token.token))
        count = next((i + 1 for i in reversed(range(len(self._waiting))) if self._waiting[i][0] < self._shown), 0)
        return self._take(count)

    def end(self, reason: str) -> list[Token]:
        """The tokens that remain at the end."""
        return self._take(len(self._waiting) if reason == "length" else 0)

    def _take(self, count: int) -> list[Token]:
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return [token for _, token in taken]


def chat_logprobs(tokens: list[Token], bytes_of: TokenBytes) -> dict[str, Any]:
    """`logprobs` of a choice of a chat."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        data = bytes_of.of(token)
        return {"token": data.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(data)}

    content = [
        {**entry(one.token, one.logprob), "top_logprobs": [entry(*pair) for pair in one.top]} for one in tokens
    ]  # fmt: skip
    return {"content": content, "refusal": None}


def completion_logprobs(tokens: list[Token], bytes_of: TokenBytes, start: int) -> dict[str, Any]:
    """`logprobs` of a choice of a completion, whose text has `start` characters before the first of these tokens."""

    def name(token: int) -> str:
        """The text of a token, or, as OpenAI writes them, its bytes if they are no text."""
        data = bytes_of.of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    offsets = [start]
    for one in tokens:
        offsets.append(offsets[-1] + len(bytes_of.of(one.token).decode(errors="replace")))
    return {
        "tokens": [name(one.token) for one in tokens],
        "token_logprobs": [_finite(one.logprob) for one in tokens],
        "top_logprobs": [{name(i): _finite(logprob) for i, logprob in one.top} for one in tokens],
        "text_offset": offsets[:-1],
    }


def _finite(logprob: float | None) -> float:
    """A log-probability as OpenAI writes it: JSON has no infinity."""
    return max(logprob if logprob is not None else 0.0, -9999.0)
