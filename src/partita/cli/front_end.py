"""The front end of `partita serve`: the HTTP server, in the process of our launcher, or else in the first rank.

our launcher    FrontEnd.begin: a socket in a folder -> PARTITA_FRONT of each rank
each rank       load -> ServingLoop; the first rank of each replica -> `serve_remote`
our launcher    all replicas are ready -> FrontEnd.open -> HTTP, whose port stays open while the ranks are started again
"""

from __future__ import annotations

import json
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partita.checkpoint.find import find_model
from partita.cli.arguments.model import read_tokenizer
from partita.cli.library import Choice, ModelLibrary
from partita.cli.replicas import Groups, Meeting, gather
from partita.cli.terminal.console import err, out, write
from partita.ranks import liveness
from partita.ranks.launcher import Outcome
from partita.serving import ServingLoop
from partita.serving.front import Entrance, Front, Replica

if TYPE_CHECKING:
    from partita.cli.serve import ServeJob
    from partita.serving.embedding import EmbeddingLoop
    from partita.serving.http.gate import Gate

MODEL = "PARTITA_SERVED_MODEL"
"""The variable with the name and the place of the model that the ranks load."""

FRONT = "PARTITA_FRONT"
"""The variable with the socket of the front end, for the first rank of each replica."""


class FrontEnd:
    """Serves HTTP for the replicas of one run after another, at one port.

    Attributes:
        front: The requests.
    """

    def __init__(self, job: ServeJob) -> None:
        """Bind the port of `job`.

        Raises:
            ModelError: The address does not exist, or its port is in use.
        """
        from partita.serving.http.server import Server, bind

        self.front = Front()
        self._job, self._bound = job, bind(job.host, job.port)
        self._server: Server | None = None
        self._meeting: Meeting | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="partita-")
        self._left = job.restarts
        self._attempt, self._was_ready, self._is_draining = 0, False, False
        self._why = "the server was interrupted"
        self._error: BaseException | None = None
        self._choice = first = Choice(job.name, job.request.model)
        self._gate: Gate | None = None
        self._library: ModelLibrary | None = None
        if job.models is not None:
            self._library = ModelLibrary(
                job.models, first, job.check, lambda choice: self.front.replace(json.dumps(astuple(choice)))
            )

    # --- beside the ranks of our launcher, whose `Beside` it is

    def begin(self) -> Mapping[str, str]:
        """Listen for the replicas of ranks that are about to start; see `launcher.Beside`."""
        self._attempt, self._was_ready = self._attempt + 1, False
        path = str(Path(self._folder.name) / f"front-{self._attempt}")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        self._meeting = Meeting(listener, self._job.request.mesh.dp, self._opened, self.front)
        return {FRONT: path, MODEL: json.dumps(astuple(self._choice))}

    def _opened(self, replicas: Sequence[Replica], facts: dict[str, Any]) -> None:
        """`open`, in the thread of a meeting: an error ends the run."""
        try:
            self.open(replicas, facts)
        except BaseException as error:
            self._error = error

    def drain(self) -> bool:
        """End the run after the answers that it has; see `launcher.Beside`."""
        if self._is_draining:
            return False
        self._is_draining = True
        # A signal handler must not wait for a lock that its own thread may have.
        threading.Thread(target=self.front.shutdown, name="drain").start()
        return True

    @property
    def is_over(self) -> bool:
        """Whether no rank is needed any more; see `launcher.Beside`."""
        return self._error is not None or self.front.is_over

    def lose(self, why: str) -> None:
        """End the answers that have begun; see `launcher.Beside`."""
        self._part()
        self.front.lose(why)
        if self._library is not None:
            self._library.loaded(why)

    def restarts(self, outcome: Outcome) -> bool:
        """Whether the ranks are started again: not if they would fail in the same way, because they have never served."""
        self._part()
        failure = outcome.failure
        self._why = "the server has ended" if failure is None else failure.message
        if self._error is not None:
            raise self._error
        if self._left == 0 or not (outcome.code == liveness.LOST or (outcome.code and self._was_ready)):
            return False
        self._left -= 1
        count = f"restart {self._job.restarts - self._left} of {self._job.restarts}"
        err().print(f"The ranks are started again ({count}). {self._why}", style="dim", soft_wrap=True)
        return True

    # --- in the first rank

    def serve(self, loop: ServingLoop | EmbeddingLoop, facts: dict[str, Any], groups: Groups) -> None:
        """Serve with the loop of this process and those of the other replicas, which connect to it.

        Raises:
            Exception: What a step raised.
        """
        self._part()
        self._meeting = gather(loop, facts, groups, self.front, self._opened if groups.mesh.dp > 1 else self.open)
        liveness.on_loss(self._lost)
        before = signal.signal(signal.SIGTERM, lambda number, frame: self._drain_or_raise())
        try:
            loop.run()
        finally:
            signal.signal(signal.SIGTERM, before)
        self.front.part()
        self._why = "the server is shutting down"
        liveness.on_loss(None)

    def _drain_or_raise(self) -> None:
        if not self.drain():
            raise KeyboardInterrupt

    def _lost(self, why: str) -> None:
        """End every answer with the rank that was lost, before this process is ended."""
        self.front.lose(why)
        self.front.close(why)
        if self._server is not None:
            self._server.close(liveness.WORDS_S / 2)

    # --- in any process

    def open(self, replicas: Sequence[Replica], facts: dict[str, Any]) -> None:
        """Serve with `replicas`. The first time, start the server and print its address."""
        self._was_ready = True
        is_first, choice = self._server is None, Choice(*facts["model"])
        is_other = choice != self._choice
        if self._gate is None:
            self._start(facts)
        elif is_other:
            self._choice = choice
            self._gate.service = self._gate.service.followed_by(**self._of_model(facts, self.front.model + 1))
        self.front.open(replicas, is_other=is_other)
        if self._library is not None:
            self._library.loaded(facts["failure"])
        if is_first:
            self._announce(facts.get("cache"))

    def _start(self, facts: dict[str, Any]) -> None:
        from partita.serving.http.app import make_app
        from partita.serving.http.server import Server
        from partita.serving.http.service import Service

        job, library = self._job, None if "width" in facts else self._library
        service = Service(
            **self._of_model(facts, self.front.model), max_tokens=job.max_tokens, api_key=job.api_key, library=library
        )
        self._gate = make_app(service)
        self._server = Server(self._gate, self._bound)
        self._server.start()

    def _of_model(self, facts: dict[str, Any], number: int) -> dict[str, Any]:
        """What a service has of the model `number` of the front end."""
        from partita.serving.images import ImageProcessor
        from partita.serving.pooling import read_pooling

        choice, trusted = Choice(*facts["model"]), self._job.request.trust_remote_code
        folder, is_first = find_model(choice.model, code=trusted), choice.name == self._job.name
        made: dict[str, Any] = {
            "inbox": Entrance(self.front, number), "tokenizer": read_tokenizer(folder, trust_remote_code=trusted),
            "model": choice.name, "context": facts["context"], "vocab_size": facts["vocab_size"], "plan": facts["plan"],
            "adapters": tuple(self._job.adapters) if is_first else (),
        }  # fmt: skip
        if "width" in facts:
            made |= {"embeddings": self.front, "width": facts["width"], "pooling": read_pooling(folder)}
        else:
            reason = facts["no_images"]
            processor = None if reason else ImageProcessor(folder, trust_remote_code=trusted)
            made |= {"processor": processor, "no_images": reason}
        return made

    def _announce(self, cache: str | None) -> None:
        from partita.serving.http.server import url_of

        url, job = url_of(self._bound), self._job
        if job.as_json:
            write(
                json.dumps({"url": url, "model": job.name, "pid": os.getpid()} | ({"cache": cache} if cache else {}))
                + "\n"
            )
        else:
            if cache:
                out().print(f"The cache has {cache}.", style="dim", soft_wrap=True)
            out().print(f"{job.name} is served at {url} (OpenAI's API at {url}/v1). Ctrl-C ends it.", soft_wrap=True)

    def _part(self) -> None:
        if self._meeting is not None:
            self._meeting.close()
            self._meeting = None

    @contextmanager
    def closing(self) -> Iterator[FrontEnd]:
        """A context at whose end every request and the server end."""
        try:
            yield self
        except BaseException as error:
            if liveness.is_echo(error):
                liveness.wait_for_verdict()  # which ends the requests, and this process
            self._why = str(error) or self._why
            raise
        finally:
            self._part()
            self.front.close(self._why)
            if self._library is not None:
                self._library.loaded(self._why)
            if self._server is not None:
                self._server.close()
            self._bound.close()
            self._folder.cleanup()
