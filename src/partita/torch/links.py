"""Messages between the stages of a pipeline: tensors whose shapes and dtypes are agreed once, and again when they change."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from partita.errors import DistributedError
from partita.torch.comm import Communicator, Work, exactly_empty
from partita.torch.stage import Message

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.bool)
_MAX_DIMS = 6
_MAX_TENSORS = 8
_HEADER = 2 + _MAX_TENSORS * (2 + _MAX_DIMS)
"""Numbers of a header: tensors, arity, then dtype, dims and sizes of each tensor."""


@dataclass(frozen=True)
class _Form:
    """What a message looks like."""

    arity: int
    tensors: tuple[tuple[torch.dtype, tuple[int, ...]], ...]

    def header(self, device: torch.device) -> Tensor:
        numbers = [len(self.tensors), self.arity]
        for dtype, shape in self.tensors:
            numbers += [_DTYPES.index(dtype), len(shape), *shape, *[0] * (_MAX_DIMS - len(shape))]
        return torch.tensor(numbers + [0] * (_HEADER - len(numbers)), dtype=torch.int64, device=device)

    @classmethod
    def of_header(cls, header: Tensor) -> _Form:
        numbers = header.tolist()
        tensors = []
        for place in range(numbers[0]):
            dtype, dims, *sizes = numbers[2 + place * (2 + _MAX_DIMS) : 2 + (place + 1) * (2 + _MAX_DIMS)]
            tensors.append((_DTYPES[dtype], tuple(sizes[:dims])))
        return cls(numbers[1], tuple(tensors))

    @classmethod
    def of(cls, message: Message) -> _Form:
        tensors = tuple((t.dtype, tuple(t.shape)) for t in message.tensors)
        if len(tensors) > _MAX_TENSORS or any(d not in _DTYPES or len(s) > _MAX_DIMS for d, s in tensors):
            raise DistributedError(
                f"stages can hand on up to {_MAX_TENSORS} tensors of up to {_MAX_DIMS} dims in torch's usual dtypes, but these "
                f"are {tensors}. Use pp=1."
            )
        return cls(message.arity, tensors)


@dataclass
class Pending:
    """A message on its way."""

    message: Message
    works: list[Work]

    def wait(self) -> Message:
        """The message, once it is there."""
        for work in self.works:
            work.wait()
        return self.message


@dataclass
class Links:
    """This rank's ends of the links to other pipeline ranks.

    Attributes:
        comm: The pipeline group.
        device: Where messages live.
    """

    comm: Communicator
    device: torch.device
    _forms: dict[tuple[Any, ...], _Form] = field(default_factory=dict)
    _sent: list[tuple[Tensor, Work]] = field(default_factory=list)

    def send(self, to: int, stage: int, message: Message, key: Hashable) -> None:
        """Begin to send what stage `stage` computed to rank `to`.

        Args:
            to: The rank in the pipeline group.
            stage: The stage that sends.
            message: What it hands on.
            key: What the form of the message depends on and both ends know, such as the shape of the ids.
        """
        form = _Form.of(message)
        known = self._forms.setdefault(("sent", stage, key), form)
        if ("told", stage, key) not in self._forms:
            self._forms["told", stage, key] = form
            self._start(form.header(self.device), to)
        elif known != form:
            raise DistributedError(f"stage {stage} hands on {form}, but for the same inputs it was {known}.")
        for tensor in message.tensors:
            self._start(tensor.detach().contiguous(), to)

    def receive(self, source: int, stage: int, key: Hashable) -> Pending:
        """Begin to receive from rank `source` what the stage before `stage` sends; arguments as in `send`."""
        form = self._forms.get(("received", stage, key))
        if form is None:
            header = torch.empty(_HEADER, dtype=torch.int64, device=self.device)
            self.comm.start_recv_(header, source).wait()
            form = self._forms["received", stage, key] = _Form.of_header(header)
        return self._post(form, source)

    def send_gradient(self, to: int, gradients: Sequence[Tensor]) -> None:
        """Begin to send the gradients of a message that was received."""
        for gradient in gradients:
            self._start(gradient.contiguous(), to)

    def receive_gradient(self, source: int, stage: int, key: Hashable) -> Pending:
        """Begin to receive the gradients of a message that `stage` sent, which look like it."""
        return self._post(self._forms["sent", stage, key], source)

    def _start(self, tensor: Tensor, to: int) -> None:
        # A tensor under way must stay; those that have arrived are let go.
        self._sent = [(t, work) for t, work in self._sent if not work.is_completed()]  # type: ignore[attr-defined]
        self._sent.append((tensor, self.comm.start_send(tensor, to)))

    def _post(self, form: _Form, source: int) -> Pending:
        tensors = tuple(exactly_empty(shape, dtype, self.device) for dtype, shape in form.tensors)
        return Pending(Message(tensors, form.arity), [self.comm.start_recv_(tensor, source) for tensor in tensors])

    def flush(self) -> None:
        """Return when everything that was sent has left."""
        for _, work in self._sent:
            work.wait()
        self._sent.clear()
