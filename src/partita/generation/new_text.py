"""The text of new ids after a prompt, decoded incrementally: it only grows, so shown text stays valid."""

from __future__ import annotations

from bisect import bisect_right

from partita.generation.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
"""The character that decoders write for invalid UTF-8, and so for the first bytes of a character."""

MOST_CONTEXT_TOKENS = 16
"""The largest number of last prompt tokens that are decoded with the first new one."""

MOST_INCOMPLETE_BYTES = 3
"""The largest number of bytes of an incomplete character of UTF-8."""

WAITING_TOKENS = 8
"""From this number on, waiting tokens in front of a character's first byte become final."""

MOST_WAITING_TOKENS = 32
"""The largest number of tokens that wait: so many are no text, and decoding them again at each token would take ever longer."""


class NewText:
    """The text of new ids, decoded with the ids before them.

    Many tokenizers write a token differently at the beginning of a text (without its space) than after another one. So new
    ids are decoded after the last ids of known text, whose text is then removed. Ids whose text ends inside a character
    wait for the next id. So a bounded number of ids is decoded for each new one, whatever the length of the text. `text`
    includes special tokens, so that a stop text can contain them; `shown` leaves them out.

    Attributes:
        text: The final text so far, special tokens included.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]) -> None:
        """Start after the ids of `prompt`."""
        self.text = ""
        self._tokenizer = tokenizer
        self._context = self._end_of(prompt)
        self._waiting: list[int] = []
        self._of_waiting = 0
        self._special: list[tuple[int, int]] = []

    def add(self, token: int) -> None:
        """Append the text that becomes final with `token`."""
        if token in self._tokenizer.special_ids:
            self.end()
            start = len(self.text)
            self.text += self._tokenizer.name(token)
            self._special.append((start, len(self.text)))
            return
        self._waiting.append(token)
        text = self._text_of(self._waiting)
        incomplete = min(len(text) - len(text.rstrip(REPLACEMENT)), MOST_INCOMPLETE_BYTES)
        certain = len(text) - incomplete
        self.text += text[self._of_waiting : certain]
        self._of_waiting = max(self._of_waiting, certain)
        if not incomplete:
            self._settle(text)
        elif len(self._waiting) >= MOST_WAITING_TOKENS:
            self.end()
        elif len(self._waiting) >= WAITING_TOKENS:
            self._settle_part(text)

    def end(self) -> None:
        """Append the text of bytes whose character stays incomplete."""
        if self._waiting:
            text = self._text_of(self._waiting)
            self.text += text[self._of_waiting :]
            self._settle(text)

    def shown(self, start: int, stop: int) -> str:
        """`text[start:stop]` without special tokens."""
        parts = []
        for first, last in self._special[bisect_right(self._special, start, key=lambda span: span[1]) :]:
            parts.append(self.text[start : min(first, stop)])
            start = max(start, last)
        return "".join([*parts, self.text[start:stop]])

    def _end_of(self, prompt: list[int]) -> list[int]:
        """The fewest last ids of a prompt that are text by themselves, without special tokens."""
        ids = [i for i in prompt if i not in self._tokenizer.special_ids][-MOST_CONTEXT_TOKENS:]
        for start in range(len(ids) - 1, 0, -1):
            text = self._tokenizer.decode(ids[start:])
            if text and REPLACEMENT not in text:
                return ids[start:]
        return ids

    def _text_of(self, waiting: list[int]) -> str:
        before = self._tokenizer.decode(self._context) if self._context else ""
        text = self._tokenizer.decode(self._context + waiting)
        if text.startswith(before) and not before.endswith(REPLACEMENT):
            return text[len(before) :]
        # A stray byte makes some decoders drop the characters before it too, and a new byte may belong to a
        # character that begins in the prompt.
        alone = self._tokenizer.decode(waiting)
        return text[len(before) :] if text.startswith(before) and text[len(before) :].endswith(alone) else alone

    def _settle_part(self, text: str) -> None:
        """Make all waiting ids final but the last ones, in which a character may begin that the next id completes."""
        for count in range(MOST_INCOMPLETE_BYTES, 0, -1):
            front, back = self._waiting[:-count], self._waiting[-count:]
            before = self._text_of(front)
            # A character across both parts has fewer characters as a whole: one U+FFFD, not two.
            if before + self._tokenizer.decode(back) == text:
                self.text += text[self._of_waiting : len(before)]
                self._of_waiting = max(self._of_waiting, len(before)) - len(before)
                self._context, self._waiting = front, back
                return

    def _settle(self, text: str) -> None:
        if text or not self._context:
            self._context = self._waiting
        self._waiting, self._of_waiting = [], 0
