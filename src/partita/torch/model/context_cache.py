"""A cache whose keys and values are distributed over context parallel ranks while texts are continued.

    prompt      split over the ranks as in training; each keeps the keys and values of its own tokens
    new tokens  every rank computes them; the rank with the fewest tokens keeps their keys and values

A prompt with fewer than two tokens for each rank is computed by every rank, like new tokens. A layer with a sliding window
forgets what later tokens do not see.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from partita.core.sharding.context import keepers_of
from partita.errors import ModelError
from partita.torch.collectives.comm import Communicator
from partita.torch.model.cache_buffers import TokenBuffer
from partita.torch.model.context import Context, SharedTokens
from partita.torch.transformers_internals import (
    cache_of_entries,
    growing_entry,
    holds_plain_tokens,
    new_cache,
    window_of,
)


class KeptTokens:
    """Which rank keeps the keys and values of which tokens of some texts, whose columns include padding.

    Attributes:
        comm: The ranks.
        past: The columns before the current forward.
        new: The columns of the current forward.
        own: int64, this rank's columns in order, those of the current forward included.
        taken: Which of the rows of the current forward this rank keeps; None if it has only its own.
        steps: The number of forwards so far.
    """

    def __init__(self, comm: Communicator) -> None:
        self.comm, self.past, self.new, self.steps = comm, 0, 0, 0
        self.own = torch.empty(0, dtype=torch.int64)
        self.taken: list[int] | None = None
        self._counts = [0] * comm.size
        self._current: Context | SharedTokens | None = None

    def split(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of this rank's forward, in which all stages of the rank take part, in place of those of all tokens.

        Raises:
            ModelError: The model takes other inputs with a value for each token.
        """
        if self._current is None:
            self._current = self._next(inputs)
        return self._current.split(inputs)

    def advance(self) -> None:
        """End the current forward."""
        self.past, self.steps, self._current = self.past + self.new, self.steps + 1, None

    def new_cache(self, model: nn.Module) -> Any:
        """An empty cache for `model`.

        Raises:
            ModelError: A layer of the model keeps something else than keys and values.
        """
        entries = new_cache(model.config).layers
        other = next((entry for entry in entries if not holds_plain_tokens(entry)), None)
        if other is not None or not entries:
            kind = type(other).__name__ if other is not None else "unknown"
            raise ModelError(f"its layers keep other states than keys and values ({kind}). Use cp=1.")
        make = _entry_class()
        return cache_of_entries([make(self, window_of(entry)) for entry in entries])

    def count_from(self, column: int) -> int:
        """How many of this rank's columns are at or after `column`."""
        return len(self.own) - int(torch.searchsorted(self.own, column))

    def _next(self, inputs: Mapping[str, Any]) -> Context | SharedTokens:
        self.new = inputs["input_ids"].shape[1]
        if self.past == 0 and self.new >= 2 * self.comm.size:
            _refuse_other_inputs(inputs)
            context = Context.of(inputs, self.comm)
            self._counts = [sum(stop - start for start, stop in chunks) for chunks in context.chunks]
            self.own = torch.cat([torch.arange(*chunk) for chunk in context.chunks[self.comm.rank]])
            self.taken = None
            return context
        keepers = keepers_of(self._counts, self.new)
        for keeper in keepers:
            self._counts[keeper] += 1
        self.taken = [row for row, keeper in enumerate(keepers) if keeper == self.comm.rank]
        self.own = torch.cat([self.own, self.past + torch.tensor(self.taken, dtype=torch.int64)])
        length, rows = self.past + self.new, inputs["input_ids"].shape[0]
        if len(self.own):
            return SharedTokens(self.comm, self.own, length)
        nothing = torch.zeros((rows, 1), dtype=torch.int64)
        return SharedTokens(self.comm, nothing, length, is_key=nothing.bool())


_SPLIT = frozenset({"input_ids", "position_ids", "attention_mask"})


def _refuse_other_inputs(inputs: Mapping[str, Any]) -> None:
    other = next((name for name, value in inputs.items() if name not in _SPLIT and isinstance(value, Tensor)), None)
    if other is not None:
        raise ModelError(f"the model takes {other} for each token, which cp does not split over ranks. Use cp=1.")
    positions = inputs.get("position_ids")
    if positions is not None and positions.dim() != 2:
        raise ModelError(
            f"the model's positions have {positions.dim()} dimensions, of which cp splits two (texts, tokens). Use cp=1."
        )


@functools.cache
def _entry_class() -> Any:
    class DistributedEntry(growing_entry()):  # type: ignore[misc]
        """One layer's keys and values of this rank's tokens."""

        is_croppable = False

        def __init__(self, kept: KeptTokens, window: int | None) -> None:
            super().__init__()
            self.kept, self.window, self.is_sliding = kept, window, window is not None
            self.buffers = TokenBuffer(), TokenBuffer()
            self.step, self.is_empty = -1, True

        def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            """Keep this rank's new tokens. Returns the keys and values that the forward's rows attend on this rank."""
            kept, new, self.step = self.kept, (keys, values), self.kept.steps
            if kept.taken is not None:
                new = keys[:, :, kept.taken], values[:, :, kept.taken]
            least = 0 if self.window is None else kept.past + kept.new - self.window + 1
            count = kept.count_from(least)
            if self.is_empty:
                self.is_empty, self.is_initialized, self.device = False, True, keys.device
                self.keys, self.values = (_alone(_last(tensor, count)) for tensor in new)
                return _some(new[0]), _some(new[1])
            seen = tuple(
                buffer.extended(tensor, more)
                for buffer, tensor, more in zip(self.buffers, (self.keys, self.values), new, strict=True)
            )
            self.keys, self.values = (_last(tensor, count) for tensor in seen)
            for buffer, tensor in zip(self.buffers, (self.keys, self.values), strict=True):
                buffer.kept = tensor
            return _some(seen[0]), _some(seen[1])

        def get_seq_length(self) -> int:
            return self.kept.past + (self.kept.new if self.step == self.kept.steps else 0)

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.get_seq_length() + query_length, 0

    return DistributedEntry


def _last(tensor: Tensor, count: int) -> Tensor:
    """The last `count` tokens of `tensor` `[n, heads, tokens, width]`, or all if there are fewer."""
    return tensor[:, :, max(tensor.shape[2] - count, 0) :]


def _some(tensor: Tensor) -> Tensor:
    """`tensor`, or zeros of a token that the mask hides: some families cannot expand the keys of no token."""
    return tensor if tensor.shape[2] else tensor.new_zeros((*tensor.shape[:2], 1, tensor.shape[3]))


def _alone(tensor: Tensor) -> Tensor:
    """`tensor` in a memory without anything else."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
