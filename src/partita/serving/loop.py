"""The loop over steps of one replica. One rank decides each step and sends it to the others; no other decides anything.

any thread of the deciding rank    inbox.submit, cancel, shutdown
deciding rank, before a step       scheduler -> Step -> bytes -> the ranks of the replica
every rank                         Rows.run: ended, tokens, admitted, forwards
deciding rank, after a step        tokens -> texts -> ends -> events
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, fields, replace

from partita.errors import ModelError, PlanError
from partita.generation import Sequence
from partita.generation.choice import Choice
from partita.notes import note
from partita.ranks.liveness import doing
from partita.serving.blocks import BlockPool, CacheLayout
from partita.serving.message import Step, decode, encode
from partita.serving.requests import Finished, OnEvent, Reason, ServeRequest, ServeSettings, Token
from partita.serving.rows import Picked, Rows
from partita.serving.scheduler import Running, Scheduler

IDLE_S = 5.0
"""The longest time between two steps, so that no rank waits longer for one than its backend's time limit."""


REPLACED = "another model is being loaded"
"""Why no request is accepted while it is."""


@dataclass(frozen=True)
class Stats:
    """The state of a loop; the sum of two is that of both.

    Attributes:
        queued: Requests that wait for a place or for cache blocks.
        running: Requests that run.
        blocks_used: Cache blocks that running requests hold.
        blocks_kept: Cache blocks that keep the beginning of earlier texts, and are evicted when they are needed.
        blocks_free: Empty cache blocks.
        block_tokens: Tokens of a block.
        tokens: New tokens so far.
        prompt_tokens: Tokens of the prompts of finished requests so far.
        cached_tokens: Those of them that were in the prefix cache.
        finished: Finished requests so far.
        steps: Steps so far.
    """

    queued: int = 0
    running: int = 0
    blocks_used: int = 0
    blocks_kept: int = 0
    blocks_free: int = 0
    block_tokens: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    finished: int = 0
    steps: int = 0

    def __add__(self, other: Stats) -> Stats:
        """The state of both loops, whose blocks have the same size."""
        sums = {one.name: getattr(self, one.name) + getattr(other, one.name) for one in fields(self)}
        return Stats(**{**sums, "block_tokens": self.block_tokens or other.block_tokens})


class Inbox:
    """Requests on their way to the loop; any thread of the deciding rank may call these methods.

    Attributes:
        block_tokens: Tokens of a cache block.
        num_blocks: Blocks of the cache.
        following: What `replace` was given.
    """

    def __init__(
        self, check: Callable[[ServeRequest], Choice], stats: Callable[[], Stats], layout: CacheLayout
    ) -> None:
        """Create an inbox whose requests `check` accepts or refuses, of a loop with the cache `layout`."""
        self._check, self._stats = check, stats
        self.block_tokens, self.num_blocks = layout.block_tokens, layout.num_blocks
        self._changed = threading.Condition()
        self._submitted: list[tuple[ServeRequest, Choice, OnEvent]] = []
        self._cancelled: list[int] = []
        self._known: set[int] = set()
        self._closed = ""
        self._drains = True
        self.following = ""

    def submit(self, request: ServeRequest, on_event: OnEvent) -> None:
        """Add a request. `on_event` receives its tokens and its end, from the loop's thread.

        Raises:
            PartitaError: The request can never be served (the message has its numbers), its id is in use, or the loop has
                ended or is about to.
        """
        choice = self._check(request)
        with self._changed:
            if self._closed:
                raise ModelError(f"no request is accepted any more: {self._closed}.")
            if request.id in self._known:
                raise PlanError(f"a request with id {request.id} is being served. Use an id of its own.")
            self._known.add(request.id)
            self._submitted.append((request, choice, on_event))
            self._changed.notify()

    def cancel(self, number: int) -> None:
        """End a request within a step; nothing happens if it has ended."""
        with self._changed:
            if number in self._known:
                self._cancelled.append(number)
                self._changed.notify()

    def shutdown(self, *, drain: bool = True) -> None:
        """End the loop on every rank: after all requests are finished, or with `drain=False` after cancelling them."""
        with self._changed:
            self._closed = self._closed or "the server is shutting down"
            self._drains = self._drains and drain
            self.following = ""
            self._changed.notify()

    def replace(self, following: str) -> None:
        """End the loop on every rank after all requests, with `following` as `ServingLoop.following`."""
        with self._changed:
            if not self._closed:
                self._closed, self.following = REPLACED, following
            self._changed.notify()

    @property
    def closed(self) -> str:
        """Why no request is accepted any more; empty while requests are."""
        return self._closed

    def stats(self) -> Stats:
        """The state of the loop."""
        return self._stats()

    def take(self, timeout_s: float) -> tuple[list[tuple[ServeRequest, Choice, OnEvent]], list[int], bool, bool]:
        """Wait up to `timeout_s` for anything new: requests, cancelled ids, whether to end, whether to drain first."""
        with self._changed:
            self._changed.wait_for(lambda: self._submitted or self._cancelled or self._closed, timeout_s)
            found = self._submitted, self._cancelled, bool(self._closed), self._drains
            self._submitted, self._cancelled = [], []
            return found

    def forget(self, number: int) -> None:
        """Let the id of an ended request be used again."""
        with self._changed:
            self._known.discard(number)

    def close(self, why: str) -> list[tuple[ServeRequest, Choice, OnEvent]]:
        """Accept no more requests; returns those that the loop has not taken."""
        with self._changed:
            self._closed = why
            left, self._submitted = self._submitted, []
            return left


@dataclass
class _Client:
    """A request on the deciding rank: its text, and who hears of it."""

    request: ServeRequest
    choice: Choice
    on_event: OnEvent
    sequence: Sequence
    texts: list[str] = field(default_factory=list)

    def text_of(self, token: int, rows: Rows) -> str:
        """Add a token; the text that becomes final with it."""
        self.sequence.accept(token, self.choice, rows.tokenizer)
        self.sequence.show(lambda _, text: self.texts.append(text), self.choice.stop)
        text = "".join(self.texts)
        self.texts.clear()
        return text


_REASONS: dict[str, Reason] = {"eos": "stop", "stop": "stop", "length": "length"}


class ServingLoop:
    """Serves requests on all ranks of a replica; replicas do not wait for each other.

    Attributes:
        inbox: Where requests arrive; used on the first rank of the replica only.
        on_begun: Called there with the ids of the requests that a step starts, before it is sent to any rank.
        on_step: Called there after the events of each step.
        following: After `run`, on every rank, what is to be served instead; empty for nothing.
    """

    def __init__(self, rows: Rows, settings: ServeSettings) -> None:
        """Create a loop over the engine's `rows`, on every rank with the same settings."""
        self.rows, self.settings = rows, settings
        pool = BlockPool(rows.layout, keeps_prefixes=settings.keep_prefixes)
        self.scheduler = Scheduler(settings, pool, groups=rows.plan.mesh.pp)
        self.on_begun: Callable[[SequenceOf[int]], None] = lambda numbers: None
        self.on_step: Callable[[], None] = lambda: None
        self.following = ""
        self._clients: dict[int, _Client] = {}
        self._counts = dict.fromkeys(("tokens", "prompt_tokens", "cached_tokens", "finished", "steps"), 0)
        self.inbox = Inbox(self._settled, self._stats, rows.layout)

    @doing("serving")
    def run(self) -> None:
        """Serve until `inbox.shutdown()` on the first rank of the replica. Blocks; every rank must call it.

        Raises:
            Exception: What a step raised, after every request has ended with an error.
        """
        try:
            with self.rows.session():
                if self.rows.decides:
                    self._lead()
                else:
                    self._follow()
        except BaseException as error:
            self._end_all(str(error) or type(error).__name__, "lost")
            raise
        self._end_all("the server is shutting down", "error")

    def _follow(self) -> None:
        """Run the steps that the deciding rank sends."""
        step = Step()
        while not step.ends:
            step = decode(self.rows.share(None))
            self.rows.run(step)
        self.following = step.following

    def _lead(self) -> None:
        """Decide and run steps."""
        step = Step()
        while not step.ends:
            step = self._decide()
            if step.admitted:
                self.on_begun([one.request.id for one in step.admitted])
            self.rows.share(encode(step))
            for row, picked in zip(step.choosing, self.rows.run(step), strict=True):
                self._took(self._clients[row.id], picked)
            self._counts["steps"] += 1
            self.on_step()
        self.following = step.following

    def _settled(self, request: ServeRequest) -> Choice:
        """A request's settings; raises `PartitaError` if it can never be served."""
        choice = self.rows.settle(request)
        layout, limit = self.rows.layout, choice.limit(len(request.prompt))
        needed = layout.blocks_for(len(request.prompt) + limit - 1)
        if needed > layout.num_blocks:
            raise PlanError(
                f"a prompt of {len(request.prompt)} tokens with {limit} new ones needs {needed} cache blocks, but the cache "
                f"has {layout}. Ask for fewer tokens, or give the server a larger cache (cache_bytes, --cache-bytes)."
            )
        return choice

    def _decide(self) -> Step:
        """The next step."""
        submitted, cancelled, closed, drains = self.inbox.take(IDLE_S if self.scheduler.is_idle else 0.0)
        for request, choice, on_event in submitted:
            limit = choice.limit(len(request.prompt))
            sequence = Sequence(0, list(request.prompt), limit)
            self._clients[request.id] = _Client(request, choice, on_event, sequence)
            self.scheduler.submit(request, limit)
        for number in [*self._clients] if closed and not drains else cancelled:
            if number in self._clients:
                self._finish(self._clients[number], "cancelled")
        step = self.scheduler.plan(ends=closed and not self._clients)
        return replace(step, following=self.inbox.following) if step.ends else step

    def _took(self, client: _Client, one: Picked) -> None:
        request, sequence = client.request, client.sequence
        text = client.text_of(one.token, self.rows)
        if sequence.failure:
            from partita.generation.sample import failure_of  # needs numpy, which the command line does without

            self._finish(client, "error", failure_of([sequence], self.rows.plan, self.rows.replica))
            return
        self._counts["tokens"] += 1
        self.scheduler.took(request.id, one.token)
        heard = self._tell(
            client, Token(request.id, one.token, text, one.logprob if request.logprobs else None, one.top)
        )
        if sequence.finish_reason:
            self._finish(client, _REASONS[sequence.finish_reason])
        elif not heard:
            self._finish(client, "cancelled")

    def _finish(self, client: _Client, reason: Reason, error: str = "") -> None:
        number = client.request.id
        running: Running | None = self.scheduler.end(number)
        del self._clients[number]
        self.inbox.forget(number)
        prompt, cached = len(client.request.prompt), running.cached if running is not None else 0
        self._counts["finished"] += 1
        self._counts["prompt_tokens"] += prompt
        self._counts["cached_tokens"] += cached
        self._tell(client, Finished(number, reason, error, prompt, cached, len(client.sequence.tokens)))

    def _tell(self, client: _Client, event: Token | Finished) -> bool:
        """Pass an event on. False if the client raised an error, which ends its request and no other."""
        try:
            client.on_event(event)
        except Exception as error:
            note(f"request {event.id} ends, because its on_event raised {type(error).__name__}: {error}")
            return False
        return True

    def _end_all(self, why: str, reason: Reason) -> None:
        for request, choice, on_event in self.inbox.close(why):
            sequence = Sequence(0, list(request.prompt), 1)
            self._clients[request.id] = _Client(request, choice, on_event, sequence)
        for client in [*self._clients.values()]:
            self._finish(client, reason, why)

    def _stats(self) -> Stats:
        pool = self.scheduler.pool
        return Stats(
            queued=len(self.scheduler.waiting),
            running=len(self.scheduler.running),
            blocks_used=pool.used,
            blocks_kept=pool.kept,
            blocks_free=pool.available - pool.kept,
            block_tokens=self.rows.layout.block_tokens,
            **self._counts,
        )
