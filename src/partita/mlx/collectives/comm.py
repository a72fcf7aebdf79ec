"""Communicator: the only object through which layers communicate with other ranks."""

from __future__ import annotations

import contextlib
import ctypes
import json
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from partita.errors import DistributedError
from partita.ranks.liveness import ME

_stream: mx.Stream | None = None


def communication_stream() -> mx.Stream:
    """The stream of all communication: the CPU's default stream of the first thread that communicates.

    Two streams that communicate at the same time silently give wrong results. MLX raises if another thread uses this
    stream.
    """
    global _stream
    if _stream is None:
        _stream = mx.default_stream(mx.cpu)
    return _stream


_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
_HALVES = (mx.float16, mx.bfloat16)


class Communicator:
    """A group of ranks of MLX (MPI, ring, JACCL, NCCL), or one rank alone.

    Every rank of the group calls the same methods in the same order with arrays of the same dtype. Shapes may differ only
    where a method takes `sizes`. Sends, receives and objects are done when the method returns; a collective has only started.

    MLX evaluates independent operations in an order that depends on the graph. If left lazy, two collectives could
    swap on a rank that only has to pad, and different arrays would be summed without an error. So each is
    submitted to the stream when it is called. This is not possible inside `mx.compile` and `mx.vmap`: there all ranks must
    build the same graph.

    Only `_sum`, `_max`, `_gather`, `send` and `recv` communicate; all other methods use them.

    Attributes:
        group: MLX's group, None for a single rank.
        rank: Rank of this process within the group.
        size: Number of ranks in the group.
        backend: MLX's name of the group's backend, None if unknown.
        reduce_in_float32: Whether float16 and bfloat16 are summed in float32.
    """

    def __init__(
        self, group: mx.distributed.Group | None, *, backend: str | None = None, reduce_in_float32: bool = False
    ) -> None:
        """Create the communicator of `group`, any object with `rank()` and `size()`.

        Args:
            group: MLX's group; None for a single rank.
            backend: `mpi`, `ring`, `jaccl` or `nccl`.
            reduce_in_float32: Whether float16 and bfloat16 are summed in float32 and rounded once, which costs twice the
                bytes.
        """
        self.group = group
        self.rank: int = group.rank() if group is not None else 0
        self.size: int = group.size() if group is not None else 1
        self.backend = backend
        self.reduce_in_float32 = reduce_in_float32
        # NCCL computes on the arrays' device.
        self._stream = mx.default_stream(mx.gpu) if backend == "nccl" else communication_stream()

    @classmethod
    def single(cls) -> Communicator:
        """A single rank: every collective returns immediately."""
        return cls(None)

    # --- backend operations -----------------------------------------------------------------------------------------

    def _sum(self, x: mx.array) -> mx.array:
        return mx.distributed.all_sum(x, group=self.group, stream=self._stream)

    def _max(self, x: mx.array) -> mx.array:
        return mx.distributed.all_max(x, group=self.group, stream=self._stream)

    def _gather(self, x: mx.array) -> mx.array:
        """`[n, ...]`, the same shape on every rank, to `[size * n, ...]`."""
        return mx.distributed.all_gather(x, group=self.group, stream=self._stream)

    def send(self, x: mx.array, to: int) -> None:
        """Send to rank `to` of the group; returns when the send is complete.

        Raises:
            DistributedError: The backend cannot reach that rank.
        """
        self._reaches(to, "send to")
        with ME.over("a send"):
            mx.eval(mx.distributed.send(x, to, group=self.group, stream=self._stream))

    def recv(self, shape: Sequence[int], dtype: mx.Dtype, source: int) -> mx.array:
        """Receive an array from rank `source` of the group, evaluated; no gradient flows through it.

        Raises:
            DistributedError: The backend cannot reach that rank.
        """
        self._reaches(source, "receive from")
        x = mx.distributed.recv(tuple(shape), dtype, source, group=self.group, stream=self._stream)
        with ME.over("a receive"):
            mx.eval(x)
        return x

    def _reaches(self, other: int, what: str) -> None:
        if not 0 <= other < self.size or other == self.rank:
            raise DistributedError(
                f"rank {self.rank} of {self.size} cannot {what} rank {other}: it is not another rank of the group."
            )
        neighbours = {(self.rank - 1) % self.size, (self.rank + 1) % self.size}
        if self.backend == "ring" and other not in neighbours:
            raise DistributedError(
                f"rank {self.rank} of {self.size} cannot {what} rank {other}: the ring backend reaches only the neighbours "
                f"{sorted(neighbours)}. Use the mpi backend."
            )

    # --- collectives -----------------------------------------------------------------------------------------------------

    def all_sum(self, x: mx.array) -> mx.array:
        """The sum over the ranks, bitwise equal on each. Booleans are counted in int32, as `mx.sum` does."""
        x = x.astype(mx.int32) if x.dtype == mx.bool_ else x
        if self._is_alone(x):
            return x
        self._agree("all_sum", x.shape, x.dtype)
        if self.reduce_in_float32 and x.dtype in _HALVES:
            return self._done(self._sum(x.astype(mx.float32)).astype(x.dtype))
        return self._done(self._sum(x))

    def all_max(self, x: mx.array) -> mx.array:
        """The maximum over the ranks, element by element.

        Raises:
            DistributedError: The array is complex.
        """
        if x.dtype == mx.complex64:
            raise DistributedError("all_max needs real numbers; got a complex64 array.")
        if self._is_alone(x):
            return x
        self._agree("all_max", x.shape, x.dtype)
        if x.dtype == mx.bool_:
            return self._done(self._max(x.astype(mx.uint8)).astype(mx.bool_))
        return self._done(self._max(x))

    def all_gather(self, x: mx.array, axis: int = 0, sizes: Sequence[int] | None = None) -> mx.array:
        """The arrays of all ranks, concatenated along `axis` in rank order.

        Args:
            x: `[..., n_r, ...]`; a scalar counts as `[1]`.
            axis: The axis of concatenation.
            sizes: `n_r` of each rank if they differ.

        Returns:
            `[..., sum(n_r), ...]`.
        """
        if x.ndim == 0:
            x = x[None]
        if self.size == 1:
            return x
        sizes = tuple(sizes) if sizes is not None else (x.shape[axis],) * self.size
        if len(sizes) != self.size or sizes[self.rank] != x.shape[axis]:
            raise DistributedError(
                f"sizes must be {self.size} numbers, and rank {self.rank}'s {x.shape[axis]} (axis {axis}), but are {sizes}."
            )
        self._agree("all_gather", _without(x.shape, axis), x.dtype, sizes)
        if 0 in x.shape and max(sizes) == 0:
            return x
        rows = mx.moveaxis(x, axis, 0)
        longest = max(sizes)
        if len(set(sizes)) == 1:
            rows = self._gather(rows)
        else:
            # The longest rank pads by nothing, so that all ranks build the same graph.
            rows = self._gather(mx.pad(rows, [(0, longest - sizes[self.rank])] + [(0, 0)] * (rows.ndim - 1)))
            rows = mx.concatenate([rows[r * longest : r * longest + n] for r, n in enumerate(sizes)])
        return self._done(mx.moveaxis(rows, 0, axis))

    def reduce_scatter(self, x: mx.array, axis: int = 0, sizes: Sequence[int] | None = None) -> mx.array:
        """Sum over the ranks and return this rank's part along `axis`.

        Only NCCL supports it; other backends compute the full sum and keep a part.

        Args:
            x: `[..., n, ...]`, the same shape on every rank.
            axis: The axis to distribute.
            sizes: Size of each rank's part (default: equal parts).

        Returns:
            `[..., sizes[rank], ...]`.
        """
        if self.size == 1:
            return x
        sizes = tuple(sizes) if sizes is not None else self.even_sizes(x.shape[axis])
        if len(sizes) != self.size or sum(sizes) != x.shape[axis]:
            raise DistributedError(
                f"sizes must be {self.size} numbers that add up to {x.shape[axis]} (axis {axis}), but are {sizes}."
            )
        self._agree("reduce_scatter", x.shape, x.dtype, sizes)
        if self.backend == "nccl" and len(set(sizes)) == 1 and not (self.reduce_in_float32 and x.dtype in _HALVES):
            rows = mx.distributed.sum_scatter(mx.moveaxis(x, axis, 0), group=self.group, stream=self._stream)
            return self._done(mx.moveaxis(rows, 0, axis))
        start = sum(sizes[: self.rank])
        return self._done(take_range(self.all_sum(x), axis, start, start + sizes[self.rank]))

    def broadcast(self, x: mx.array, source: int = 0) -> mx.array:
        """Send the array of rank `source` to every rank, bit by bit. Every rank passes an array of the same shape and dtype."""
        if self._is_alone(x):
            return x
        self._agree("broadcast", x.shape, x.dtype, (source,))
        bits = x.view(_UNSIGNED[x.dtype.size])
        whole = self._sum(bits if self.rank == source else mx.zeros_like(bits))
        return self._done(whole.view(x.dtype))

    def barrier(self) -> None:
        """Block until every rank of the group reaches this call."""
        if self.size > 1:
            self._agree("barrier", (), mx.uint8)
            with ME.over("a barrier"):
                mx.eval(self._sum(mx.zeros(1, mx.uint8)))

    # --- objects -----------------------------------------------------------------------------------------------------------

    def broadcast_object(self, value: object, source: int = 0) -> Any:
        """Send a small object of rank `source` to every rank: bytes, or a JSON value."""
        return self.all_gather_object(value if self.rank == source else None)[source]

    def all_gather_object(self, value: object) -> list[Any]:
        """Small objects of all ranks, in rank order: bytes, or JSON values (tuples become lists).

        Raises:
            DistributedError: The object of some rank is neither; raised on every rank.
        """
        said, problem = _encode(value)
        lengths: Any = self.all_gather(mx.array([len(said)], mx.int64)).tolist()
        if self.size == 1 or min(lengths) == 0:
            texts = [said]
        else:
            together = bytes(self.all_gather(mx.array(list(said), mx.uint8), 0, lengths).tolist())  # type: ignore[arg-type]
            starts = [sum(lengths[:r]) for r in range(self.size)]
            texts = [together[start : start + n] for start, n in zip(starts, lengths, strict=True)]
        if min(lengths) == 0:
            who = f"rank {lengths.index(0)}'s value"
            raise DistributedError(problem or f"{who} is neither bytes nor a JSON value. Send plain values.")
        return [text[1:] if text[:1] == b"b" else json.loads(text[1:]) for text in texts]

    # --- groups ------------------------------------------------------------------------------------------------------------

    def split(self, color: int, key: int = -1) -> Communicator:
        """The ranks that give the same `color`, in the order of their `key` (by default as here). Every rank must call it.

        Raises:
            DistributedError: The backend cannot split a group.
        """
        if self.group is None:
            return self
        self._agree("split", (), mx.uint8)
        # MLX splits on this thread; two threads inside MPI at the same time would corrupt its state.
        mx.synchronize(self._stream)
        try:
            group = self.group.split(color, key)
        except RuntimeError as error:
            raise DistributedError(
                f"the {self.backend or 'current'} backend cannot split a group ({error}). Use the mpi backend."
            ) from error
        # MLX finalizes MPI before Python releases its objects, and freeing an MPI group after that is fatal.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
        return type(self)(group, backend=self.backend, reduce_in_float32=self.reduce_in_float32)

    def even_sizes(self, size: int) -> tuple[int, ...]:
        """`size` in equal parts, one per rank; the number of ranks must divide it."""
        if size % self.size:
            raise DistributedError(f"{size} cannot be split evenly over {self.size} ranks. Pass `sizes`, one per rank.")
        return (size // self.size,) * self.size

    # --- around each collective ----------------------------------------------------------------------------------------------

    def _agree(self, operation: str, shape: Sequence[int | None], dtype: mx.Dtype, sizes: Sequence[int] = ()) -> None:
        """Called before each collective."""

    def _done(self, x: mx.array) -> mx.array:
        """Called with the result of each collective: start it before the next call."""
        try:
            mx.async_eval(x)
        except ValueError:
            # Arrays of a gradient trace can be evaluated, unlike those of mx.compile and mx.vmap.
            with contextlib.suppress(ValueError):
                mx.eval(x)
        return x

    def _is_alone(self, x: mx.array) -> bool:
        return self.size == 1 or x.size == 0

    def __deepcopy__(self, memo: object) -> Communicator:
        """Return itself: a copy of a model communicates with the same ranks."""
        return self

    def __repr__(self) -> str:
        return f"Communicator(rank {self.rank} of {self.size}, {self.backend or 'unknown backend'})"


def take_range(x: mx.array, axis: int, start: int, stop: int) -> mx.array:
    """Elements `start` to `stop` of an axis."""
    index = [slice(None)] * x.ndim
    index[axis] = slice(start, stop)
    return x[tuple(index)]


def _without(shape: Sequence[int], axis: int) -> tuple[int | None, ...]:
    """A shape in which the ranks may differ along `axis`."""
    return tuple(None if i == axis % len(shape) else n for i, n in enumerate(shape))


def _encode(value: object) -> tuple[bytes, str]:
    """A value as bytes with its kind; empty bytes and the reason if it cannot be sent."""
    if isinstance(value, bytes):
        return b"b" + value, ""
    try:
        return b"j" + json.dumps(value).encode(), ""
    except (TypeError, ValueError) as error:
        return b"", f"a value for other ranks must be bytes or a JSON value, but {error}."
