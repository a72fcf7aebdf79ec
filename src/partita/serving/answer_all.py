"""Answering a file of prompts with the replicas of a run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from partita.errors import PartitaError
from partita.serving.answer_lines import AnswerLines
from partita.serving.front import Front
from partita.serving.prompt_lines import PromptLine, PromptLines
from partita.serving.requests import Event, ServeRequest, Token


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        total: The number of prompts.
        done: Those that have an answer.
        errors: Those whose answer is an error.
        tokens: New tokens of this run.
        error: The first error.
    """

    total: int
    done: int
    errors: int = 0
    tokens: int = 0
    error: str = ""


@dataclass
class _Answer:
    line: PromptLine
    prompt_tokens: int
    tokens: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def data(self, reason: str, error: str) -> dict[str, Any]:
        usage = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": len(self.tokens),
            "total_tokens": self.prompt_tokens + len(self.tokens),
        }
        named = {} if self.line.id is None else {"id": self.line.id}
        return named | {
            "text": "".join(self.texts), "tokens": self.tokens, "finish_reason": reason, "usage": usage,
            "error": error or None,
        }  # fmt: skip


class AnswerAll:
    """Gives a front end the prompts that have no answer yet, and writes the answers, in a thread of its own."""

    def __init__(
        self,
        front: Front,
        prompts: PromptLines,
        answers: AnswerLines,
        encode: Callable[[PromptLine], list[int]],
        on_progress: Callable[[Progress], None],
        at_once: int,
    ) -> None:
        """Prepare a run.

        Args:
            front: Where the prompts are answered; it is shut down at the end.
            prompts: The prompts.
            answers: Where answers are written.
            encode: The ids of a prompt.
            on_progress: Called after each answer, and after each token.
            at_once: The largest number of prompts that wait for answers; each of them is held in memory.
        """
        self._front, self._prompts, self._answers = front, prompts, answers
        self._encode, self._on_progress, self._at_once = encode, on_progress, at_once
        self._left: Iterator[int] = (i for i in range(len(prompts)) if i not in answers.done)
        self._open: dict[int, _Answer] = {}
        self._events: SimpleQueue[Event | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._answer, name="answers")
        self._failure: BaseException | None = None
        self.progress = Progress(len(prompts), len(answers.done))

    def start(self) -> None:
        """Begin; the replicas of the front end are open."""
        self._thread.start()

    def end(self) -> None:
        """Wait for the thread, which gives up what has no answer yet. Nothing happens if it has not begun."""
        self._events.put(None)
        if self._thread.ident is not None:
            self._thread.join()

    def finished(self) -> Progress:
        """Put the answers in the order of the prompts, after `end`.

        Raises:
            CheckpointError: The answers cannot be written.
        """
        if self._failure is not None:
            raise self._failure
        self._answers.finish()
        return self.progress

    def _answer(self) -> None:
        try:
            self._on_progress(self.progress)
            while self._fill() and (event := self._events.get()) is not None:
                self._take(event)
        except BaseException as error:
            self._failure = error
        self._front.shutdown(drain=False)

    def _fill(self) -> bool:
        """Submit prompts. False if none waits for its answer."""
        while len(self._open) < self._at_once and (index := next(self._left, None)) is not None:
            line: PromptLine = self._prompts[index]
            answer = self._open[index] = _Answer(line, 0)
            try:
                ids = self._encode(line)
                answer.prompt_tokens = len(ids)
                self._front.submit(ServeRequest(index, tuple(ids), line.sampling), self._events.put)
            except PartitaError as error:
                self._write(index, "error", str(error))
        return bool(self._open)

    def _take(self, event: Event) -> None:
        if isinstance(event, Token):
            self._open[event.id].tokens.append(event.token)
            self._open[event.id].texts.append(event.text)
            self.progress.tokens += 1
            self._on_progress(self.progress)
        else:
            self._write(event.id, event.reason, event.error)

    def _write(self, index: int, reason: str, error: str) -> None:
        self._answers.add(index, self._open.pop(index).data(reason, error))
        self.progress.done += 1
        if error:
            self.progress.errors += 1
            self.progress.error = self.progress.error or f"prompt {index}: {error}"
        self._on_progress(self.progress)
