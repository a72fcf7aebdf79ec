"""Answering a file of prompts with a serving loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from partita.errors import PartitaError
from partita.serving.answer_lines import AnswerLines
from partita.serving.loop import ServingLoop
from partita.serving.prompt_lines import PromptLine, PromptLines
from partita.serving.requests import Event, Finished, ServeRequest, Token


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
    """Feeds a loop with the prompts that have no answer yet, and writes the answers; on the rank that decides."""

    def __init__(
        self,
        loop: ServingLoop,
        prompts: PromptLines,
        answers: AnswerLines,
        encode: Callable[[PromptLine], list[int]],
        on_progress: Callable[[Progress], None],
    ) -> None:
        """Prepare a run.

        Args:
            loop: A loop that has not run yet.
            prompts: The prompts.
            answers: Where answers are written.
            encode: The ids of a prompt.
            on_progress: Called after each answer, and after each token.
        """
        self._loop, self._prompts, self._answers = loop, prompts, answers
        self._encode, self._on_progress = encode, on_progress
        self._left: Iterator[int] = (i for i in range(len(prompts)) if i not in answers.done)
        self._open: dict[int, _Answer] = {}
        self._failure: Exception | None = None
        self.progress = Progress(len(prompts), len(answers.done))

    def run(self) -> Progress:
        """Answer all prompts; the other ranks run the loop meanwhile.

        Raises:
            CheckpointError: The answers cannot be written.
        """
        self._on_progress(self.progress)
        # Requests wait at the loop, so that it never waits for one; few, because each is held in memory.
        most = 2 * self._loop.settings.max_sequences * self._loop.rows.plan.mesh.dp
        while len(self._open) < most and self._submit():
            pass
        self._end_if_done()
        self._loop.run()
        if self._failure is not None:
            raise self._failure
        self._answers.finish()
        return self.progress

    def _submit(self) -> bool:
        """Submit the next prompt. False if none is left."""
        for index in self._left:
            line: PromptLine = self._prompts[index]
            answer = _Answer(line, 0)
            try:
                ids = self._encode(line)
                answer.prompt_tokens = len(ids)
                self._open[index] = answer
                self._loop.inbox.submit(ServeRequest(index, tuple(ids), line.sampling), self._hear)
            except PartitaError as error:
                self._open.pop(index, None)
                self._write(index, answer, "error", str(error))
                continue
            return True
        return False

    def _hear(self, event: Event) -> None:
        """Take an event of the loop, on its thread."""
        if self._loop.inbox.closed:  # what ends now is not answered
            return
        try:
            if isinstance(event, Token):
                self._open[event.id].tokens.append(event.token)
                self._open[event.id].texts.append(event.text)
                self.progress.tokens += 1
                self._on_progress(self.progress)
            else:
                self._finish(event)
        except Exception as error:
            self._failure = error
            self._loop.inbox.shutdown(drain=False)

    def _finish(self, event: Finished) -> None:
        self._write(event.id, self._open.pop(event.id), event.reason, event.error)
        self._submit()
        self._end_if_done()

    def _write(self, index: int, answer: _Answer, reason: str, error: str) -> None:
        self._answers.add(index, answer.data(reason, error))
        self.progress.done += 1
        if error:
            self.progress.errors += 1
            self.progress.error = self.progress.error or f"prompt {index}: {error}"
        self._on_progress(self.progress)

    def _end_if_done(self) -> None:
        if not self._open:
            self._loop.inbox.shutdown()
