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
    """Where all communication runs: the CPU's default stream of the first thread that communicates.

    Two streams that communicate at once give wrong numbers without an error. Another thread cannot use this one, which MLX
    says.
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
    where a method takes `sizes`. Sends, receives and objects are done when the method returns; a collective has begun.

    MLX evaluates what is independent in an order that depends on the shape of the graph. Left lazy, two collectives could
    change places on a rank that only has to pad, and sums of unlike arrays would come out without an error. So each is
    handed to the stream where it is called. Inside `mx.compile` and `mx.vmap` that cannot be: there all ranks must build
    the same graph.

    What other ranks are reached by lies in `_sum`, `_max`, `_gather`, `send` and `recv`: all else is made of them.

    Attributes:
        group: MLX's group, None for one rank alone.
        rank: Rank of this process within the group.
        size: Ranks of the group.
        backend: What MLX calls what stands behind the group, None where it is not known.
        reduce_in_float32: Whether float16 and bfloat16 are summed in float32.
    """

    def __init__(
        self, group: mx.distributed.Group | None, *, backend: str | None = None, reduce_in_float32: bool = False
    ) -> None:
        """The communicator of `group`, which may be anything that knows its `rank()` and `size()`.

        Args:
            group: MLX's group; None for one rank alone.
            backend: `mpi`, `ring`, `jaccl` or `nccl`.
            reduce_in_float32: Whether float16 and bfloat16 are summed in float32 and rounded once, which costs twice the
                bytes.
        """
        self.group = group
        self.rank: int = group.rank() if group is not None else 0
        self.size: int = group.size() if group is not None else 1
        self.backend = backend
        self.reduce_in_float32 = reduce_in_float32
        # NCCL computes where the arrays are.
        self._stream = mx.default_stream(mx.gpu) if backend == "nccl" else communication_stream()

    @classmethod
    def single(cls) -> Communicator:
        """A single rank: every collective returns immediately."""
        return cls(None)

    # --- what the backend does -----------------------------------------------------------------------------------------

    def _sum(self, x: mx.array) -> mx.array:
        return mx.distributed.all_sum(x, group=self.group, stream=self._stream)

    def _max(self, x: mx.array) -> mx.array:
        return mx.distributed.all_max(x, group=self.group, stream=self._stream)

    def _gather(self, x: mx.array) -> mx.array:
        """`[n, ...]`, the same shape on every rank, to `[size * n, ...]`."""
        return mx.distributed.all_gather(x, group=self.group, stream=self._stream)

    def send(self, x: mx.array, to: int) -> None:
        """Send to rank `to` of the group; returns when it is sent.

        Raises:
            DistributedError: The backend does not reach that rank.
        """
        self._reaches(to, "send to")
        with ME.over("a send"):
            mx.eval(mx.distributed.send(x, to, group=self.group, stream=self._stream))

    def recv(self, shape: Sequence[int], dtype: mx.Dtype, source: int) -> mx.array:
        """What rank `source` of the group sends, evaluated; no gradient flows through it.

        Raises:
            DistributedError: The backend does not reach that rank.
        """
        self._reaches(source, "receive from")
        x = mx.distributed.recv(tuple(shape), dtype, source, group=self.group, stream=self._stream)
        with ME.over("a receive"):
            mx.eval(x)
        return x

    def _reaches(self, other: int, what: str) -> None:
        if not 0 <= other < self.size or other == self.rank:
            raise DistributedError(f"rank {self.rank} of {self.size} cannot {what} rank {other}: it is no other rank.")
        neighbours = {(self.rank - 1) % self.size, (self.rank + 1) % self.size}
        if self.backend == "ring" and other not in neighbours:
            raise DistributedError(
                f"rank {self.rank} of {self.size} cannot {what} rank {other}: the ring backend reaches the neighbours "
                f"{sorted(neighbours)} only. Use the mpi backend."
            )

    # --- collectives -----------------------------------------------------------------------------------------------------

    def all_sum(self, x: mx.array) -> mx.array:
        """The sum over the ranks, the same bits on each. Booleans are counted in int32, as `mx.sum` does."""
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
            DistributedError: Complex numbers have none.
        """
        if x.dtype == mx.complex64:
            raise DistributedError("all_max takes real numbers, but the array is complex64.")
        if self._is_alone(x):
            return x
        self._agree("all_max", x.shape, x.dtype)
        if x.dtype == mx.bool_:
            return self._done(self._max(x.astype(mx.uint8)).astype(mx.bool_))
        return self._done(self._max(x))

    def all_gather(self, x: mx.array, axis: int = 0, sizes: Sequence[int] | None = None) -> mx.array:
        """The arrays of all ranks one behind the other along `axis`.

        Args:
            x: `[..., n_r, ...]`; a number by itself counts as `[1]`.
            axis: The axis along which they are put together.
            sizes: `n_r` of each rank where they differ.

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
            # The longest rank pads too, by nothing: all build the same graph.
            rows = self._gather(mx.pad(rows, [(0, longest - sizes[self.rank])] + [(0, 0)] * (rows.ndim - 1)))
            rows = mx.concatenate([rows[r * longest : r * longest + n] for r, n in enumerate(sizes)])
        return self._done(mx.moveaxis(rows, 0, axis))

    def reduce_scatter(self, x: mx.array, axis: int = 0, sizes: Sequence[int] | None = None) -> mx.array:
        """The sum over the ranks, of which each gets its part along `axis`.

        Of MLX's backends NCCL alone has it; with the others the whole sum is made and a part kept.

        Args:
            x: `[..., n, ...]`, the same shape on every rank.
            axis: The axis that is dealt out.
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
        """Give every rank the array of rank `source`, bit by bit. Every rank passes one of the same shape and dtype."""
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
        """Give every rank the object of rank `source`: bytes, or what JSON can say. For small things."""
        return self.all_gather_object(value if self.rank == source else None)[source]

    def all_gather_object(self, value: object) -> list[Any]:
        """The objects of all ranks, in order: bytes, or what JSON can say (tuples become lists). For small things.

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
            raise DistributedError(problem or f"{who} can be said neither in bytes nor in JSON. Send plain values.")
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
        # MLX splits on this thread; two threads inside MPI at once would destroy its state.
        mx.synchronize(self._stream)
        try:
            group = self.group.split(color, key)
        except RuntimeError as error:
            raise DistributedError(
                f"the {self.backend or 'present'} backend cannot split a group ({error}). Use the mpi backend."
            ) from error
        # MLX finalizes MPI before Python lets go of its objects, and to free a group of MPI after that is fatal.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
        return type(self)(group, backend=self.backend, reduce_in_float32=self.reduce_in_float32)

    def even_sizes(self, size: int) -> tuple[int, ...]:
        """`size` in equal parts, one per rank; the number of ranks must divide it."""
        if size % self.size:
            raise DistributedError(f"{size} cannot be dealt evenly to {self.size} ranks. Pass `sizes`, one a rank.")
        return (size // self.size,) * self.size

    # --- around each collective ----------------------------------------------------------------------------------------------

    def _agree(self, operation: str, shape: Sequence[int | None], dtype: mx.Dtype, sizes: Sequence[int] = ()) -> None:
        """Called before each collective."""

    def _done(self, x: mx.array) -> mx.array:
        """Called with the result of each collective: begin it, before the next one is called."""
        try:
            mx.async_eval(x)
        except ValueError:
            # A gradient is being traced, which may be evaluated; but not what mx.compile and mx.vmap trace.
            with contextlib.suppress(ValueError):
                mx.eval(x)
        return x

    def _is_alone(self, x: mx.array) -> bool:
        return self.size == 1 or x.size == 0

    def __deepcopy__(self, memo: object) -> Communicator:
        """Return itself: a copy of a model communicates with the same ranks."""
        return self

    def __repr__(self) -> str:
        return f"Communicator(rank {self.rank} of {self.size}, {self.backend or 'some backend'})"


def take_range(x: mx.array, axis: int, start: int, stop: int) -> mx.array:
    """Elements `start` to `stop` of an axis."""
    index = [slice(None)] * x.ndim
    index[axis] = slice(start, stop)
    return x[tuple(index)]


def _without(shape: Sequence[int], axis: int) -> tuple[int | None, ...]:
    """A shape in which the ranks may differ along `axis`."""
    return tuple(None if i == axis % len(shape) else n for i, n in enumerate(shape))


def _encode(value: object) -> tuple[bytes, str]:
    """A value as bytes that tell its kind; none, and why, for what cannot be sent."""
    if isinstance(value, bytes):
        return b"b" + value, ""
    try:
        return b"j" + json.dumps(value).encode(), ""
    except (TypeError, ValueError) as error:
        return b"", f"a value for other ranks must be bytes or what JSON can say, but {error}."
