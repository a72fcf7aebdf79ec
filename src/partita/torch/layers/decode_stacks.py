"""Decoder layers that follow each other, all in one call of C++ for one new token of each sequence on a CPU.

What remains of a layer in Python (`decode_layers.py`: calls, small tensors, the cache's append) takes as long as the products
of a small model. The first layer of a stack computes all of them, with keys and values written into the cache's own memory, and
the others return what they are given:

    layer 0      x -> the last layer's output      partita_layers, which calls back for sums over the tensor ranks
    layer 1...   what layer 0 returned

A stack runs once a token has gone through its layers one after the other, each with the output of the one before and with the
same masks, angles and cache, and only in steps whose tensors fit; layers that find themselves called otherwise raise an error.
Its results have the bits of the layers' own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from partita.torch.layers.decode_layers import DecodeLayer, attentions
from partita.torch.layers.decode_steps import DTYPES, IGNORED, is_ours, mask_stride
from partita.torch.quantized.kernels import threads
from partita.torch.quantized.native import library

_ADDRESS, _SIZE, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


@dataclass(frozen=True)
class Room:
    """The memory of a layer's keys and values, with room for one more token of each sequence.

    Attributes:
        keys: `[sequences, heads, slots, width]`, or `[slots, heads, width]` if all sequences share slots.
        values: As the keys.
        tokens: The number of tokens of each sequence, with the new one. Sequences end together.
        read: int64 `[sequences, tokens]`, the slots of all tokens (default: 0, 1, ...).
        write: int64 `[sequences]`, the slots of the new ones (default: the last).
    """

    keys: Tensor
    values: Tensor
    tokens: int
    read: Tensor | None = None
    write: Tensor | None = None


class HasRoom(Protocol):
    """How an entry of a cache lets others write one token of each sequence."""

    def room(self) -> Room | None:
        """Where the next tokens go; None if they have to be given to `update`."""

    def appended(self) -> None:
        """They are there."""


class _StackedLayer(ctypes.Structure):
    """`Layer` of `kernels.cpp`."""

    _fields_ = (*((name, _ADDRESS) for name in ("inputs", "out", "rest")), ("scale", ctypes.c_float))


class _Slots(ctypes.Structure):
    """`Slots` of `kernels.cpp`."""

    _fields_ = (("keys", _ADDRESS), ("values", _ADDRESS), ("batch", _SIZE), ("token", _SIZE), ("head", _SIZE))


class _Step(ctypes.Structure):
    """`Step` of `kernels.cpp`."""

    _fields_ = (
        *((name, _SIZE) for name in ("rows", "tokens", "hidden", "heads", "groups", "width")),
        *((name, _ADDRESS) for name in ("read", "write", "mask")),
        ("mask_batch", _SIZE),
        ("angle_stride", _SIZE),
        *((name, _ADDRESS) for name in ("cos", "sin", "x", "residual", "attended", "y", "q", "k", "v", "seen")),
        ("dtype", _INT),
        ("threads", _INT),
    )


_Sum = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)


def can_follow(layer: DecodeLayer, other: DecodeLayer) -> bool:
    """Whether both may be in one stack."""
    return (
        layer.fits
        and other.fits
        and (layer.heads, layer.width, layer.dtype, layer.window)
        == (other.heads, other.width, other.dtype, other.window)
        and (layer.hidden, layer.sums, layer.cache_name) == (other.hidden, other.sums, other.cache_name)
        and layer.sums is not None
        and layer.implementation == other.implementation
    )


class Stack:
    """Layers of which each `can_follow` the one before."""

    def __init__(self, layers: Sequence[DecodeLayer]) -> None:
        self.layers = list(layers)
        first = self.layers[0]
        self.first, self.most_rows = first, min(layer.most_rows for layer in layers)
        self.sums = first.sums
        self.table = (_StackedLayer * len(layers))(
            *(
                _StackedLayer(
                    ctypes.addressof(one.inputs),
                    ctypes.addressof(one.out.layers),
                    ctypes.addressof(one.rest),
                    one.scaling,
                )
                for one in layers
            )
        )
        self.slots = (_Slots * len(layers))()
        functions = library()
        assert functions is not None
        self.call = functions.partita_layers
        self.call.argtypes = (_ADDRESS, _ADDRESS, _SIZE, _ADDRESS, _ADDRESS)
        self.memory: dict[str, Tensor] = {}
        self.step = _Step()
        self.error: BaseException | None = None
        self.callback = None if self.sums is None or self.sums.all_reduce_ is None else _Sum(self._sum)
        self.is_linked: bool | None = None
        self.previous: tuple[int, Tensor, Mapping[str, Any]] | None = None
        """Place, output and arguments of the layer before."""
        self.running = False

    def forward(self, place: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The forward of the layer at `place`."""
        if self.running:
            return self._passed(place, hidden, args, kwargs)
        if place == 0 and self.is_linked and not args and self._runs(hidden, kwargs):
            y = self._computed(hidden, kwargs)
            if y is not None:
                self.running, self.previous = True, (0, y, kwargs)
                return y
        y = self.layers[place].forward(hidden, *args, **kwargs)
        if self.is_linked is None:
            self._observe(place, hidden, kwargs, y)
        return y

    def _passed(self, place: int, hidden: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        assert self.previous is not None
        before, y, given = self.previous
        last = place == len(self.layers) - 1
        self.running, self.previous = not last, None if last else (place, y, given)
        if args or place != before + 1 or hidden is not y or not _is_same(kwargs, given):
            self.running, self.previous, self.is_linked = False, None, False
            raise RuntimeError(
                "a model calls its decoder layers in another way than for the token before, so that they cannot be computed "
                "together. Set CXX=false to decode without our C++, and please report the model's family."
            )
        return y

    def _observe(self, place: int, hidden: Tensor, kwargs: Mapping[str, Any], y: Any) -> None:
        before, self.previous = self.previous, None
        if any(layer.is_proven is False for layer in self.layers):
            self.is_linked = False
            return
        follows = before is not None and before[0] == place - 1 and hidden is before[1] and _is_same(kwargs, before[2])
        if place and not follows:
            return
        if place == len(self.layers) - 1:
            self.is_linked = True if all(layer.is_proven for layer in self.layers) else None
        else:
            self.previous = place, y, kwargs

    def _runs(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> bool:
        first = self.first
        attend = attentions().get_interface(first.implementation, None)
        more = {k: v for k, v in kwargs.items() if k not in ("position_embeddings", "attention_mask", first.cache_name)}
        return (
            hidden.shape[0] <= self.most_rows
            and first.takes(hidden, kwargs)
            and all(value is None or name in IGNORED for name, value in more.items())
            and all(is_ours(attend, layer.attention) for layer in self.layers)
        )

    def _computed(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
        """The last layer's output; None, before anything is changed, if the cache or the mask has another form."""
        first, rows, step = self.first, hidden.shape[0], self.step
        entries = _entries(kwargs[first.cache_name], [layer.attention.layer_idx for layer in self.layers])
        if entries is None:
            return None
        rooms: list[Room] = []
        for entry in entries:
            room = entry.room()
            if room is None or not self._fits(room, rows) or (rooms and room.tokens != rooms[0].tokens):
                return None
            rooms.append(room)
        at, mask = rooms[0], kwargs.get("attention_mask")
        stride = 0 if mask is None else mask_stride(mask, rows, at.tokens)
        if stride is None:
            return None
        if step.rows != rows or not self.memory:
            self._allocate(rows)
        for slots, room in zip(self.slots, rooms, strict=True):
            batch, head, token = (0, 1, 0) if room.keys.dim() == 3 else (0, 1, 2)
            strides = room.keys.stride()
            slots.keys, slots.values = room.keys.data_ptr(), room.values.data_ptr()
            slots.head, slots.token = strides[head], strides[token]
            slots.batch = 0 if room.keys.dim() == 3 else strides[batch]
        cos, sin = kwargs["position_embeddings"]
        step.tokens, step.mask_batch, step.threads = at.tokens, stride, threads()
        step.read = None if at.read is None else at.read.data_ptr()
        step.write = None if at.write is None else at.write.data_ptr()
        step.mask = None if mask is None else mask.data_ptr()
        step.cos, step.sin, step.angle_stride = cos.data_ptr(), sin.data_ptr(), first.width if cos.shape[0] > 1 else 0
        x = hidden.clone(memory_format=torch.contiguous_format)
        step.x = x.data_ptr()
        failed = self.call(self.table, self.slots, len(self.layers), ctypes.byref(step), self.callback)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        if failed:
            raise MemoryError("the input of a decoder layer could not be allocated")
        for entry in entries:
            entry.appended()
        return x

    def _fits(self, room: Room, rows: int) -> bool:
        keys, values, (_, groups, _) = room.keys, room.values, self.first.heads
        shared = keys.dim() == 3
        return (
            keys.shape == values.shape
            and keys.stride() == values.stride()
            and keys.dtype is values.dtype is self.first.dtype
            and keys.is_cpu
            and keys.stride(-1) == 1
            and (keys.shape[1], keys.shape[-1]) == (groups, self.first.width)
            and (shared or keys.shape[0] == rows)
            and shared == (room.read is not None) == (room.write is not None)
            and all(t is None or (t.is_contiguous() and t.dtype is torch.int64) for t in (room.read, room.write))
            and (room.read is None or room.read.shape == (rows, room.tokens))
            and (room.write is None or room.write.shape == (rows,))
        )

    def _allocate(self, rows: int) -> None:
        first, step = self.first, self.step
        heads, groups, _ = first.heads
        shapes = dict.fromkeys(("residual", "attended", "y"), (rows, 1, first.hidden))
        shapes |= {name: (rows, count, first.width) for name, count in zip("qkv", first.heads, strict=True)}
        shapes["seen"] = (rows, heads, first.width)
        self.memory = {name: torch.empty(shape, dtype=first.dtype) for name, shape in shapes.items()}
        for name, tensor in self.memory.items():
            setattr(step, name, tensor.data_ptr())
        step.rows, step.hidden, step.dtype = rows, first.hidden, DTYPES[first.dtype]
        step.heads, step.groups, step.width = heads, groups, first.width

    def _sum(self, which: int) -> int:
        try:
            assert self.sums is not None
            assert self.sums.all_reduce_ is not None
            part = self.memory["y" if which else "attended"]
            total = self.sums.all_reduce_(part)
            if total is not part:
                part.copy_(total)
        except BaseException as error:  # C++ cannot pass it on
            self.error = error
            return 2
        return 0


def _entries(cache: Any, indices: Sequence[int]) -> list[HasRoom] | None:
    layers = getattr(cache, "layers", None)
    if layers is None or max(indices) >= len(layers):
        return None
    found = [vars(layers[i]).get("update", layers[i]) for i in indices]
    return found if all(hasattr(entry, "room") for entry in found) else None


def _is_same(kwargs: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    return kwargs.keys() == others.keys() and all(value is others[name] for name, value in kwargs.items())
