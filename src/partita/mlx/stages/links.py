"""Messages between the stages of a pipeline: arrays whose shapes and dtypes are sent first, and again when they change.

Sends and receives are complete when they return. Both ends follow the order of the schedule, so there is no deadlock.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from partita.errors import DistributedError
from partita.mlx.collectives.comm import Communicator
from partita.mlx.stages.layers import Message

_DTYPES = (
    mx.float32, mx.bfloat16, mx.float16, mx.float64, mx.int64, mx.int32, mx.uint32, mx.bool_,
)  # fmt: skip
_MAX_DIMS = 6
_MAX_ARRAYS = 8
_HEADER = 2 + _MAX_ARRAYS * (3 + _MAX_DIMS)
"""Numbers of a header: arrays, values in a layer's tuple, then place, dtype, dims and sizes of each array."""


@dataclass(frozen=True)
class _Form:
    """Shapes, dtypes and labels of a message."""

    places: tuple[bool, ...] | None
    arrays: tuple[tuple[mx.Dtype, tuple[int, ...]], ...]

    @classmethod
    def of(cls, message: Message) -> _Form:
        arrays = tuple((x.dtype, tuple(x.shape)) for x in message.arrays)
        if len(arrays) > _MAX_ARRAYS or any(d not in _DTYPES or len(s) > _MAX_DIMS for d, s in arrays):
            raise DistributedError(
                f"stages can pass on up to {_MAX_ARRAYS} arrays of up to {_MAX_DIMS} dims in MLX's usual dtypes; got "
                f"{arrays}. Use pp=1."
            )
        return cls(message.places, arrays)

    def header(self) -> mx.array:
        count = -1 if self.places is None else len(self.places)
        places = [0] if self.places is None else [i for i, is_array in enumerate(self.places) if is_array]
        numbers = [len(self.arrays), count]
        for place, (dtype, shape) in zip(places, self.arrays, strict=False):
            numbers += [place, _DTYPES.index(dtype), len(shape), *shape, *[0] * (_MAX_DIMS - len(shape))]
        return mx.array(numbers + [0] * (_HEADER - len(numbers)), mx.int32)

    @classmethod
    def of_header(cls, header: mx.array) -> _Form:
        numbers: list[int] = header.tolist()  # type: ignore[assignment]
        taken, arrays = set(), []
        for index in range(numbers[0]):
            place, dtype, dims, *sizes = numbers[2 + index * (3 + _MAX_DIMS) : 2 + (index + 1) * (3 + _MAX_DIMS)]
            taken.add(place)
            arrays.append((_DTYPES[dtype], tuple(sizes[:dims])))
        places = None if numbers[1] < 0 else tuple(place in taken for place in range(numbers[1]))
        return cls(places, tuple(arrays))


@dataclass
class Links:
    """This rank's ends of the links to other pipeline ranks.

    Attributes:
        comm: The pipeline group.
    """

    comm: Communicator
    _forms: dict[tuple[Hashable, ...], _Form] = field(default_factory=dict)

    def send(self, to: int, stage: int, message: Message, key: Hashable) -> None:
        """Send the output of stage `stage` to rank `to`.

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
            self.comm.send(form.header(), to)
        elif known != form:
            raise DistributedError(f"stage {stage} sends {form}, but for inputs of the same shape it sent {known}.")
        for array in message.arrays:
            self.comm.send(array, to)

    def receive(self, source: int, stage: int, key: Hashable) -> Message:
        """Receive the message of the stage before `stage` from rank `source`; arguments as in `send`."""
        form = self._forms.get(("received", stage, key))
        if form is None:
            header = self.comm.recv((_HEADER,), mx.int32, source)
            form = self._forms["received", stage, key] = _Form.of_header(header)
        return Message(self._take(form, source), form.places)

    def send_gradient(self, to: int, gradients: Sequence[mx.array]) -> None:
        """Send the gradients of a received message."""
        for gradient in gradients:
            self.comm.send(gradient, to)

    def receive_gradient(self, source: int, stage: int, key: Hashable) -> tuple[mx.array, ...]:
        """Receive the gradients of a message that `stage` sent, which have the same form."""
        return self._take(self._forms["sent", stage, key], source)

    def _take(self, form: _Form, source: int) -> tuple[mx.array, ...]:
        return tuple(self.comm.recv(shape, dtype, source) for dtype, shape in form.arrays)
