"""The scheduler of one replica: which requests run, and what each step computes. Plain data in and out; no engine.

Requests are admitted in order of arrival, when a place and blocks for all the tokens that they may get are free: a running
request never waits for memory. A step computes one token of every running request, and up to `prefill_chunk` tokens of
prompts. What several forwards compute is divided so that all pipeline stages have work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from partita.serving.blocks import BlockPool
from partita.serving.message import Admission, Row, Step
from partita.serving.requests import ServeRequest, ServeSettings

PADS = 8
"""Up to this many tokens of padding before a row cost less than a forward more: on a CPU, a forward of one token of a model of
135M parameters took as long as 7 tokens more in a forward of 150."""

PER_STAGE, DIVIDED = 3, 16
"""With pipeline stages, prompts are divided into this many forwards a stage, so that none waits long for the first or after the
last, but into none of fewer tokens than `DIVIDED`."""


@dataclass
class Running:
    """A request that runs.

    Attributes:
        request: The request.
        limit: The largest number of new tokens.
        blocks: Its cache blocks.
        cached: Tokens of the prompt that were in the prefix cache.
        computed: Tokens, prompt included, whose keys and values are stored.
        tokens: New tokens.
    """

    request: ServeRequest
    limit: int
    blocks: list[int]
    cached: int
    computed: int
    tokens: list[int] = field(default_factory=list)

    @property
    def is_prefilled(self) -> bool:
        """Whether the whole prompt has been computed, so that each step adds a token."""
        return self.computed >= len(self.request.prompt)


class Scheduler:
    """The requests of one replica, on the rank that decides.

    Attributes:
        pool: The cache blocks.
        waiting: Requests that have not been admitted, with their largest numbers of new tokens.
        running: Those that have, by id.
    """

    def __init__(self, settings: ServeSettings, pool: BlockPool, *, groups: int = 1) -> None:
        """Create a scheduler; running requests form `groups` forwards a step, one per pipeline stage."""
        self.settings, self.pool, self.groups = settings, pool, groups
        self.waiting: deque[tuple[ServeRequest, int]] = deque()
        self.running: dict[int, Running] = {}
        self._ended: list[int] = []
        self._tokens: list[tuple[int, int]] = []

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self.running or self._ended)

    def submit(self, request: ServeRequest, limit: int) -> None:
        """Add a request of at most `limit` new tokens, which fits the cache."""
        self.waiting.append((request, limit))

    def end(self, number: int) -> Running | None:
        """End a request, waiting or running; its state is released by the next step. None if it was not running."""
        self.waiting = deque(entry for entry in self.waiting if entry[0].id != number)
        one = self.running.pop(number, None)
        if one is not None:
            self._ended.append(number)
            self._tokens = [entry for entry in self._tokens if entry[0] != number]
            self._keep(one, [*one.request.prompt, *one.tokens][: one.computed])
            self.pool.release(one.blocks)
        return one

    def took(self, number: int, token: int) -> None:
        """Add the token that a step chose for a running request, which the next step feeds back to the model."""
        self.running[number].tokens.append(token)
        self._tokens.append((number, token))

    def plan(self, *, ends: bool = False) -> Step:
        """The next step."""
        ended, self._ended = tuple(self._ended), []
        tokens, self._tokens = tuple(self._tokens), []
        admitted = tuple(self._admit())
        batches = [*self._decodes(), *self._chunks()]
        for row in (row for batch in batches for row in batch):
            one = self.running[row.id]
            one.computed += row.count
            if one.computed == len(one.request.prompt):
                self._keep(one, one.request.prompt)
        return Step(ended, tokens, admitted, tuple(batches), ends)

    def _keep(self, one: Running, ids: Sequence[int]) -> None:
        """Let prompts to come reuse the blocks of `ids`, unless more than ids decided their content."""
        if not one.request.inputs:
            self.pool.keep(ids, one.blocks, one.request.adapter)

    def _admit(self) -> Iterable[Admission]:
        layout = self.pool.layout
        while self.waiting and len(self.running) < self.settings.max_sequences:
            request, limit = self.waiting[0]
            shared = [] if request.inputs else self.pool.match(request.prompt, request.adapter)
            # The last new token is not fed back to the model.
            needed = layout.blocks_for(len(request.prompt) + limit - 1)
            blocks = self.pool.take(needed + len(shared) * layout.copied, shared)
            if blocks is None and layout.copied and shared:
                shared = []
                blocks = self.pool.take(needed)
            if blocks is None:
                return
            self.waiting.popleft()
            cached = len(shared) * layout.block_tokens
            self.running[request.id] = Running(request, limit, blocks, cached, cached)
            yield Admission(request, tuple(blocks), cached)

    def _decodes(self) -> list[tuple[Row, ...]]:
        """The next token of each running request; those of the same adapters share `groups` forwards.

        There are more forwards if fewer rows are exact. A request with inputs beside the ids has a forward of its own.
        """
        sets: dict[tuple[object, ...], list[Row]] = {}
        for number, one in self.running.items():
            if one.is_prefilled:
                key = (number,) if one.request.inputs else (one.request.adapter, "")
                sets.setdefault(key, []).append(Row(number, one.computed, 1, True))
        return [batch for rows in sets.values() for batch in self._divided(rows)]

    def _divided(self, rows: list[Row]) -> list[tuple[Row, ...]]:
        layout = self.pool.layout
        count = min(self.groups, len(rows)) if layout.batched else len(rows)
        if layout.exact_rows:
            count = max(count, -(-len(rows) // layout.exact_rows))
        edges = [i * len(rows) // count for i in range(count + 1)]
        return [tuple(rows[a:b]) for a, b in pairwise(edges)]

    def _chunks(self) -> list[tuple[Row, ...]]:
        """Parts of prompts; those of about as many tokens and the same adapters share a forward.

        A prompt that one chunk holds is not divided because others leave too little of this one: its first token would come
        no sooner, and its rest would need a forward of its own.
        """
        most, layout = self.settings.prefill_chunk, self.pool.layout
        left = most
        sets: dict[tuple[object, ...], list[Row]] = {}
        for number, one in self.running.items():
            if one.is_prefilled or left <= 0:
                continue
            rest = len(one.request.prompt) - one.computed
            is_whole = bool(one.request.inputs) or not layout.chunked
            count = rest if is_whole else min(rest, left)
            if count < rest <= most and left < most:
                continue
            left -= count
            is_beside = layout.batched and not layout.exact_rows and not one.request.inputs
            key = (one.request.adapter, "") if is_beside else (number,)
            sets.setdefault(key, []).append(Row(number, one.computed, count, count == rest))
        batches = [batch for rows in sets.values() for batch in _packed(rows)]
        return self._over_stages(batches) if layout.batched and not layout.exact_rows else batches

    def _over_stages(self, batches: list[tuple[Row, ...]]) -> list[tuple[Row, ...]]:
        """The same rows in more forwards, which follow each other through the pipeline stages."""
        while self.groups > 1 and 0 < len(batches) < PER_STAGE * self.groups:
            place = max(range(len(batches)), key=lambda place: sum(row.count for row in batches[place]))
            parts = self._halves(batches[place])
            if len(parts) == 1:
                break
            batches[place : place + 1] = parts
        return batches

    def _halves(self, rows: tuple[Row, ...]) -> list[tuple[Row, ...]]:
        first, half = rows[0], len(rows) // 2
        if sum(row.count for row in rows) < 2 * DIVIDED or self.running[first.id].request.inputs:
            return [rows]
        if half:
            return [rows[:half], rows[half:]]
        cut = first.count // 2
        return [
            (Row(first.id, first.start, cut, False),),
            (Row(first.id, first.start + cut, first.count - cut, first.chooses),),
        ]


def _packed(rows: list[Row]) -> Iterable[tuple[Row, ...]]:
    """Rows in forwards, each padded by at most `PADS` tokens."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: -row.count):
        if batch and batch[0].count - row.count > PADS:
            yield tuple(batch)
            batch = []
        batch.append(row)
    yield tuple(batch)
