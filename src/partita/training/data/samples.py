"""The data of a run: which samples a step sees, from one source or a mixture of several."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Protocol

from partita.errors import ModelError
from partita.training.data.order import order, place_of
from partita.training.data.rows import IGNORED, Part, Rows, Sample, parts_of, stacked
from partita.training.data.store import Store
from partita.training.random import mixed_seed
from partita.training.settings import TrainSettings

BLOCK = 10_000
"""Samples in which a weighted mixture has each source as often as its weight says."""


class TrainingData(Protocol):
    """What the loop over steps needs of data."""

    @property
    def tokens(self) -> int:
        """Number of ids, 0 if unknown."""

    @property
    def digest(self) -> str:
        """What identifies the data: of another content it differs."""

    def rows(self, step: int, settings: TrainSettings, replicas: int, replica: int) -> list[Rows]:
        """The micro-batches of a replica in a step, counted from 0."""


@dataclass(frozen=True)
class Samples:
    """Shuffled samples of one or several sources.

    An epoch is a random order of all samples, new for each epoch. With weights, each source has epochs of its own, and a
    block of `BLOCK` samples has each as often as its weight says, in random order. All follows from the seed and the number
    of the sample.

    Attributes:
        sources: The parts of each source.
        weights: The weight of each source; None to take all samples equally often.
    """

    sources: tuple[tuple[Part, ...], ...]
    weights: tuple[float, ...] | None = None

    @classmethod
    def of(cls, stores: Sequence[Store], settings: TrainSettings, weights: Sequence[float] | None = None) -> Samples:
        """The samples of stores in rows as `settings` say.

        Raises:
            ModelError: A store has less than a row.
        """
        made = tuple(tuple(parts_of(s, settings.sequence_length, is_packed=settings.packing)) for s in stores)
        return cls(made, tuple(weights) if weights is not None else None)

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The parts of all sources."""
        return tuple(part for source in self.sources for part in source)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(len(part) for part in self.parts))

    @cached_property
    def _alone(self) -> list[Samples]:
        return [Samples((source,)) for source in self.sources]

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def tokens(self) -> int:
        """Number of ids."""
        return sum(part.tokens for part in self.parts)

    @property
    def largest(self) -> int:
        """The largest id."""
        return max(part.largest for part in self.parts)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the ids of one text; of several parts, of their digests and weights."""
        if len(self.parts) == 1:
            return self.parts[0].digest
        facts = repr(([[part.digest for part in source] for source in self.sources], self.weights))
        return hashlib.sha256(facts.encode()).hexdigest()

    @property
    def notes(self) -> list[str]:
        """What of the data is not trained on, and how it is packed."""
        return [said for part in self.parts if (said := part.note())]

    def sample(self, number: int, seed: int) -> Sample:
        """The sample that a run sees as its `number`th, counted from 0."""
        if self.weights is None:
            epoch, index = divmod(number, len(self))
            return self._at(place_of(len(self), index, seed * 1_000_003 + epoch))
        block, index = divmod(number, BLOCK)
        source, place = _block(self.weights, seed, block)[index]
        own = seed if source == 0 else mixed_seed(seed, source) & 0xFFFFFFFF
        return self._alone[source].sample(place, own)

    def _at(self, place: int) -> Sample:
        part = bisect_right(self._ends, place)
        return self.parts[part][place - (self._ends[part] - len(self.parts[part]))]

    def rows(self, step: int, settings: TrainSettings, replicas: int, replica: int) -> list[Rows]:
        """The micro-batches of a replica in a step; no other replica's samples are read."""
        return _microbatches(step, settings, replicas, replica, lambda number: self.sample(number, settings.seed))

    def in_order(self, settings: TrainSettings, replicas: int, replica: int) -> Iterator[list[Rows]]:
        """All samples once, in order, in batches of the same size; the last one is filled up with rows without labels."""
        for batch in range(-(-len(self) // settings.batch_size)):
            yield _microbatches(batch, settings, replicas, replica, self._or_blank)

    def _or_blank(self, number: int) -> Sample:
        import numpy as np

        if number < len(self):
            return self._at(number)
        last = self._at(len(self) - 1)
        return Sample(last.ids, np.full_like(last.labels, IGNORED), last.positions)

    def steps(self, epochs: int, batch_size: int) -> int:
        """The optimizer steps of some epochs. The last one is filled up with samples of the next."""
        return -(-epochs * len(self) // batch_size)


def _microbatches(
    batch: int, settings: TrainSettings, replicas: int, replica: int, sample: Callable[[int], Sample]
) -> list[Rows]:
    """The micro-batches of a replica in a batch, of the samples that have the next numbers."""
    each = settings.batch_size // replicas // settings.microbatches
    first = batch * settings.batch_size + replica * each * settings.microbatches
    starts = range(first, first + each * settings.microbatches, each)
    return [stacked([sample(number) for number in range(start, start + each)]) for start in starts]


@lru_cache(maxsize=2)
def _block(weights: tuple[float, ...], seed: int, block: int) -> list[tuple[int, int]]:
    """For each sample of a block its source, and its number among the samples of that source."""
    counts = _counts(weights)
    sources = [source for source, count in enumerate(counts) for _ in range(count)]
    seen = [block * count for count in counts]
    chosen = []
    for place in order(BLOCK, mixed_seed(seed, block)):
        source = sources[place]
        chosen.append((source, seen[source]))
        seen[source] += 1
    return chosen


def _counts(weights: tuple[float, ...]) -> tuple[int, ...]:
    """How many samples of a block each source has: the largest remainders are rounded up."""
    total = sum(weights)
    exact = [weight / total * BLOCK for weight in weights]
    counts = [int(one) for one in exact]
    for source in sorted(range(len(weights)), key=lambda i: counts[i] - exact[i])[: BLOCK - sum(counts)]:
        counts[source] += 1
    if 0 in counts:
        raise ModelError(
            f"the weights {', '.join(f'{w:g}' for w in weights)} give a source less than one in {BLOCK:,} samples. "
            "Leave it out, or "
            "give it a larger weight."
        )
    return tuple(counts)
