"""A communicator that checks before each collective whether all ranks call the same one."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from partita.errors import DistributedError
from partita.mlx.collectives.comm import Communicator

RECORD_BYTES = 256
"""Bytes of the record that is exchanged before each collective; longer records are truncated."""


class CheckedCommunicator(Communicator):
    """A communicator whose ranks exchange a fingerprint (operation, shape, dtype, number) before each collective.

    Ranks that disagree raise an error that names both calls, instead of hanging or mixing up different arrays. Each
    collective is evaluated immediately, so it does not work inside `mx.compile`, and takes twice as long.
    A rank that calls no collective still blocks the others.
    """

    _collectives = 0

    def _agree(self, operation: str, shape: Sequence[int | None], dtype: mx.Dtype, sizes: Sequence[int] = ()) -> None:
        if self.size == 1:
            return
        self._collectives += 1
        gathered = self._gather(_record(f"{_describe(operation, shape, dtype, sizes)} as number {self._collectives}"))
        records = [_read(gathered[r * RECORD_BYTES : (r + 1) * RECORD_BYTES]) for r in range(self.size)]
        other = next((r for r, record in enumerate(records) if record != records[0]), None)
        if other is not None:
            raise DistributedError(
                f"the ranks of a group do not call the same collective: rank 0 calls {records[0]}, "
                f"rank {other} calls {records[other]}."
            )

    def _done(self, x: mx.array) -> mx.array:
        try:
            mx.eval(x)
        except ValueError as error:
            raise DistributedError(
                "a checked communicator evaluates each collective when it is called, which mx.compile does not allow. "
                "Call the function without mx.compile, or use a plain communicator."
            ) from error
        return x

    def send(self, x: mx.array, to: int) -> None:
        """Send to rank `to`, preceded by a description of the array."""
        if self.size > 1:
            super().send(_record(_describe("send", x.shape, x.dtype)), to)
        super().send(x, to)

    def recv(self, shape: Sequence[int], dtype: mx.Dtype, source: int) -> mx.array:
        """Receive from rank `source`, which must send this shape and dtype.

        Raises:
            DistributedError: It sends something else.
        """
        if self.size > 1:
            sent = _read(super().recv((RECORD_BYTES,), mx.uint8, source))
            expected = _describe("send", shape, dtype)
            if sent != expected:
                raise DistributedError(
                    f"rank {self.rank} waits for a {expected} from rank {source}, which calls {sent or 'something else'}."
                )
        return super().recv(shape, dtype, source)


def _describe(operation: str, shape: Sequence[int | None], dtype: mx.Dtype, sizes: Sequence[int] = ()) -> str:
    lengths = ", ".join("any" if n is None else str(n) for n in shape)
    parts = f" with {tuple(sizes)}" if sizes else ""
    return f"{operation} of [{lengths}] {str(dtype).removeprefix('mlx.core.')}{parts}"


def _record(text: str) -> mx.array:
    return mx.array(list(text.encode()[:RECORD_BYTES].ljust(RECORD_BYTES, b"\0")), mx.uint8)


def _read(record: mx.array) -> str:
    return bytes(record.tolist()).rstrip(b"\0").decode(errors="replace")  # type: ignore[arg-type]
