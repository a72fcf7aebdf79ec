"""Messages between the stages of a pipeline: tensors whose shapes and dtypes are sent first, and again when they change."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from partita.errors import DistributedError
from partita.torch.collectives.comm import Communicator, Work, exactly_empty
from partita.torch.stages.layers import RECORDED, Message

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.bool)
_MAX_DIMS = 6
_FIRST = 8
"""Tensors that fit a header. A message with more, which carries recorded outputs, has a second header."""
_ENTRY = 3 + _MAX_DIMS
"""Numbers per tensor in a header: dtype, label, dims, sizes. The number of tensors and the arity precede them."""


@dataclass(frozen=True)
class _Form:
    """Shapes, dtypes and labels of a message."""

    arity: int
    tensors: tuple[tuple[torch.dtype, tuple[int, ...]], ...]
    labels: tuple[str, ...] = ()

    def headers(self, device: torch.device) -> list[Tensor]:
        entries: list[int] = []
        kinds = (0,) * (len(self.tensors) - len(self.labels)) + tuple(1 + RECORDED.index(n) for n in self.labels)
        for (dtype, shape), kind in zip(self.tensors, kinds, strict=True):
            entries += [_DTYPES.index(dtype), kind, len(shape), *shape, *[0] * (_MAX_DIMS - len(shape))]
        entries += [0] * (_FIRST * _ENTRY - len(entries))
        first = [len(self.tensors), self.arity, *entries[: _FIRST * _ENTRY]]
        rest = entries[_FIRST * _ENTRY :]
        return [torch.tensor(part, dtype=torch.int64, device=device) for part in (first, rest) if part]

    @classmethod
    def received(cls, receive: Callable[[int], list[int]]) -> _Form:
        """Read a form from its headers; `receive` returns the next header of the given length."""
        count, arity, *entries = receive(2 + _FIRST * _ENTRY)
        if count > _FIRST:
            entries += receive((count - _FIRST) * _ENTRY)
        tensors, labels = [], []
        for begin in range(0, count * _ENTRY, _ENTRY):
            dtype, kind, dims, *sizes = entries[begin : begin + _ENTRY]
            tensors.append((_DTYPES[dtype], tuple(sizes[:dims])))
            labels += [RECORDED[kind - 1]] if kind else []
        return cls(arity, tuple(tensors), tuple(labels))

    @classmethod
    def of(cls, message: Message) -> _Form:
        tensors = tuple((t.dtype, tuple(t.shape)) for t in message.tensors)
        if any(d not in _DTYPES or len(s) > _MAX_DIMS for d, s in tensors):
            raise DistributedError(
                f"stages can pass on tensors of up to {_MAX_DIMS} dims in torch's usual dtypes; got {tensors}. Use "
                "pp=1."
            )
        return cls(message.arity, tensors, message.labels)


@dataclass
class Pending:
    """A message that is being received."""

    message: Message
    works: list[Work]

    def wait(self) -> Message:
        """Block until the message is complete, and return it."""
        for work in self.works:
            work.wait()
        return self.message


@dataclass
class Links:
    """This rank's ends of the links to other pipeline ranks.

    Attributes:
        comm: The pipeline group.
        device: Device of the messages.
    """

    comm: Communicator
    device: torch.device
    _forms: dict[tuple[Any, ...], _Form] = field(default_factory=dict)
    _sent: list[tuple[Tensor, Work]] = field(default_factory=list)

    def send(self, to: int, stage: int, message: Message, key: Hashable) -> None:
        """Start sending the output of stage `stage` to rank `to`.

        Args:
            to: Rank within the pipeline group.
            stage: The stage that sends.
            message: Its output.
            key: What determines the form of the message and both ends know, such as the shape of the ids.
        """
        form = _Form.of(message)
        known = self._forms.get(("sent", stage, key))
        if known is None:
            self._forms["sent", stage, key] = form
            for header in form.headers(self.device):
                self._start(header, to)
        elif known != form:
            raise DistributedError(f"stage {stage} sends {form}, but for inputs of the same shape it sent {known}.")
        for tensor in message.tensors:
            self._start(tensor.detach().contiguous(), to)

    def receive(self, source: int, stage: int, key: Hashable) -> Pending:
        """Start receiving the message of the stage before `stage` from rank `source`; arguments as in `send`."""
        form = self._forms.get(("received", stage, key))
        if form is None:
            form = self._forms["received", stage, key] = _Form.received(lambda numbers: self._header(numbers, source))
        return self._post(form, source)

    def _header(self, numbers: int, source: int) -> list[int]:
        header = torch.empty(numbers, dtype=torch.int64, device=self.device)
        self.comm.start_recv_(header, source).wait()
        return header.tolist()

    def send_gradient(self, to: int, gradients: Sequence[Tensor]) -> None:
        """Start sending the gradients of a received message."""
        for gradient in gradients:
            self._start(gradient.contiguous(), to)

    def receive_gradient(self, source: int, stage: int, key: Hashable) -> Pending:
        """Start receiving the gradients of a message that `stage` sent, which have the same form."""
        return self._post(self._forms["sent", stage, key], source)

    def _start(self, tensor: Tensor, to: int) -> None:
        # Keep tensors that are being sent; release those that have arrived.
        self._sent = [(t, work) for t, work in self._sent if not work.is_completed()]  # type: ignore[attr-defined]
        self._sent.append((tensor, self.comm.start_send(tensor, to)))

    def _post(self, form: _Form, source: int) -> Pending:
        tensors = tuple(exactly_empty(shape, dtype, self.device) for dtype, shape in form.tensors)
        return Pending(
            Message(tensors, form.arity, form.labels), [self.comm.start_recv_(tensor, source) for tensor in tensors]
        )

    def flush(self) -> None:
        """Block until all sends are complete."""
        for _, work in self._sent:
            work.wait()
        self._sent.clear()
