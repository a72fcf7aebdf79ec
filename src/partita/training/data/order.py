"""The order of the samples: which a step sees depends on seed and step only, not on mesh and engine."""

from __future__ import annotations

from functools import lru_cache

from partita.errors import ModelError
from partita.training.random import mixed_seed

LARGEST_SHUFFLED = 1 << 24
"""A larger number of places is permuted by a formula, since a list of them would not fit into memory."""


def row_starts(tokens: int, step: int, batch_size: int, sequence_length: int, seed: int) -> list[int]:
    """The start positions, in a text of `tokens` ids, of the sequences of one step. They depend on seed and step only.

    An epoch is a random order of the positions `0, sequence_length, 2 * sequence_length, ...` of the text, new for each epoch.

    Raises:
        ModelError: The text is shorter than a sequence and its last target.
    """
    places = places_in(tokens, sequence_length)
    indices = (divmod(index, places) for index in range(step * batch_size, (step + 1) * batch_size))
    return [place_of(places, place, seed * 1_000_003 + epoch) * sequence_length for epoch, place in indices]


def places_in(tokens: int, sequence_length: int) -> int:
    """The number of sequences, each with a last target, in a text.

    Raises:
        ModelError: There is none.
    """
    places = (tokens - 1) // sequence_length
    if places < 1:
        raise ModelError(
            f"the text has {tokens} tokens, which is less than one sequence of {sequence_length} + 1. "
            "Give more text or a smaller --sequence-length."
        )
    return places


def place_of(count: int, index: int, seed: int) -> int:
    """The place that comes at `index` in a random permutation of `count` places."""
    return order(count, seed)[index] if count <= LARGEST_SHUFFLED else permuted(count, index, seed)


def permuted(count: int, index: int, seed: int) -> int:
    """The image of `index` under a pseudo-random permutation of `count` places, in constant memory.

    Four rounds of a Feistel network (Luby and Rackoff 1988) over the next even number of bits, repeated until the image is
    below `count` (cycle walking: Black and Rogaway 2002).
    """
    half = (max(2, (count - 1).bit_length()) + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            left, right = right, left ^ (mixed_seed(seed, turn, right) & mask)
        index = left << half | right
        if index < count:
            return index


@lru_cache(maxsize=16)
def order(count: int, seed: int) -> tuple[int, ...]:
    """A random permutation of `count` positions, equal to `torch.randperm` with a CPU generator of this seed.

    It swaps each position with itself or a later one (Durstenfeld 1964, algorithm 235), sampled by a Mersenne twister.
    """
    import numpy as np

    draws = np.random.RandomState(seed & 0xFFFFFFFF).randint(0, 1 << 32, size=max(0, count - 1), dtype=np.uint32)
    places = list(range(count))
    for i, draw in enumerate(draws.tolist()):
        other = i + draw % (count - i)
        places[i], places[other] = places[other], places[i]
    return tuple(places)
