"""Entering a split region: sibling column layers with the same input share one entry, and so one sum in backward."""

from __future__ import annotations

import mlx.core as mx

from partita.mlx.collectives.comm import Communicator
from partita.mlx.collectives.mappings import copy_to


class RegionInput:
    """The shared entry of sibling column layers that take the same input into their region.

    Query, key and value projections share their input; entering once means one sum over the ranks in backward instead of
    three.
    """

    def __init__(self, comm: Communicator, users: int = 1) -> None:
        """Create the entry of `users` layers that are called in turn with the same array."""
        self.comm = comm
        self.users = users
        self._input: mx.array | None = None
        self._entered: mx.array | None = None
        self._left = 0

    def enter(self, x: mx.array) -> mx.array:
        """`x`, whose gradient is summed over the ranks once for all users that pass the same array object."""
        if self.comm.size == 1:
            return x
        if not self._left or self._input is not x:
            self._input, self._entered, self._left = x, copy_to(x, self.comm), self.users
        self._left -= 1
        entered = self._entered
        assert entered is not None
        if not self._left:
            self._input = self._entered = None
        return entered

    def __deepcopy__(self, memo: dict[int, object]) -> RegionInput:
        """An entry for the copies of its layers, without the current array."""
        twin = RegionInput(self.comm, self.users)
        memo[id(self)] = twin
        return twin
