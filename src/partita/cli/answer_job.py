"""The job of `partita generate --prompts`: answer a file of prompts with a serving loop."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from partita.checkpoint.find import find_model
from partita.cli.arguments.model import read_tokenizer
from partita.cli.job import Job
from partita.cli.replicas import Groups, gather, serve_beside
from partita.cli.terminal.console import err, mesh_name, plural, print_json
from partita.cli.terminal.progress import answering, loading
from partita.core.model.spec import longest_text
from partita.engine import open_engine, serving_loop
from partita.generation import Sampling
from partita.notes import note
from partita.ranks import environment
from partita.serving import ServeSettings, ServingLoop
from partita.serving.answer_all import AnswerAll, Progress
from partita.serving.answer_lines import AnswerLines
from partita.serving.front import Front, Replica
from partita.serving.prompt_lines import PromptLine, PromptLines
from partita.serving.requests import refuse_beyond_context


@dataclass(kw_only=True)
class AnswerJob(Job):
    """The work of each rank of `generate --prompts`.

    Attributes:
        prompts: The file of prompts, which the first rank reads.
        answers: The file of answers, which the first rank writes.
        sampling: The settings of prompts that set none.
        chat: Whether each prompt that is a text is a user's message for the model's chat template.
        system: The system message of such a chat.
        adapters: Adapters for the model.
        settings: The limits of the step loop.
        verify: Whether the files of a training checkpoint are compared with their checksums.
        as_json: Whether the summary is printed as JSON.
    """

    prompts: Path
    answers: Path
    sampling: Sampling
    chat: bool
    system: str | None
    adapters: Path | None
    settings: ServeSettings
    verify: bool
    as_json: bool

    def work(self) -> int:
        """Load the model and answer the prompts that have no answer yet."""
        if not environment.is_first():
            loop, groups = self._loop()
            serve_beside(loop, {}, groups)
            return 0
        lines = PromptLines(self.prompts, self.sampling)
        with AnswerLines(self.answers, len(lines), self._key_of(lines)) as answers:
            if answers.done:
                note(
                    f"--out {self.answers} has {plural(len(answers.done), 'answer')} of {len(lines):,}, which are kept."
                )
            loop, groups = self._loop()
            tokenizer, front = loop.rows.tokenizer, Front()
            assert tokenizer is not None
            context = longest_text(loop.rows.plan.spec)

            def encode(line: PromptLine) -> list[int]:
                ids = line.encode(tokenizer, chat=self.chat, system=self.system)
                refuse_beyond_context(context, len(ids), line.sampling.max_new_tokens)
                return ids

            start_s = time.perf_counter()
            # Requests wait, so that no step waits for one.
            at_once = 2 * self.settings.max_sequences * self.request.mesh.dp
            with answering() as show:
                work = AnswerAll(front, lines, answers, encode, show, at_once)

                def on_all(replicas: Sequence[Replica], _: dict[str, Any]) -> None:
                    front.open(replicas)
                    work.start()

                meeting = gather(loop, {}, groups, front, on_all)
                try:
                    loop.run()
                finally:
                    work.end()
                    if meeting is not None:
                        meeting.close()
                progress = work.finished()
        self._tell(progress, time.perf_counter() - start_s)
        return 0

    def _loop(self) -> tuple[ServingLoop, Groups]:
        asked, engine = self.request, open_engine(self.request.engine)
        folder = find_model(asked.model, code=asked.trust_remote_code)
        tokenizer = read_tokenizer(folder, trust_remote_code=asked.trust_remote_code)
        with loading(f"loading, {mesh_name(asked.mesh)}") as progress:
            split = engine.load(folder, **self.split, dtype=asked.dtype, verify=self.verify, progress=progress)
        if self.adapters is not None:
            engine.load_adapters(split, self.adapters)
        return serving_loop(asked.engine, split, self.settings, tokenizer=tokenizer), engine.plan_of(split)[1]

    def _key_of(self, lines: PromptLines) -> Callable[[int], str]:
        """What identifies a prompt with its settings and the model, but not how the model is split."""
        from partita.training.base import Base

        adapters = None if self.adapters is None else str(self.adapters.resolve())
        common = [Base.of(self.request.model).sha256, self.request.dtype, adapters, self.chat, self.system]

        def key(index: int) -> str:
            text = json.dumps([common, asdict(lines[index])], sort_keys=True)
            return hashlib.sha256(text.encode()).hexdigest()[:16]

        return key

    def _tell(self, progress: Progress, seconds: float) -> None:
        if self.as_json:
            speed = progress.tokens / seconds
            print_json(asdict(progress) | {"out": str(self.answers), "seconds": seconds, "tokens_per_s": speed})
            return
        if progress.errors:
            note(
                f"{progress.errors:,} of {plural(progress.total, 'prompt')} have an error in {self.answers}; the first is "
                f"{progress.error}"
            )
        done = f"{plural(progress.total, 'prompt')} answered in {self.answers}, {plural(progress.tokens, 'token')}"
        speed = progress.tokens / seconds
        err().print(
            f"{done} in {seconds:.1f} s on {mesh_name(self.request.mesh)} ({speed:,.1f} tokens/s)",
            style="dim",
            soft_wrap=True,
        )
