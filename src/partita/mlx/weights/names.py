"""Where each array of a model is stored in its checkpoint: the graph of a trace of mlx-lm's `sanitize` shows it.

mlx-lm renames, stacks (experts), transposes, splits and converts tensors in Python code, one `sanitize` per family. Run on
placeholders, that code produces a graph of operations. Operations that only move values become boxes of tensors on disk, of
which a rank reads its part; `sanitize` itself runs operations that compute (dequantize, add one), on unsplit tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from partita.checkpoint.header import TensorInfo
from partita.core.sharding.split import Range
from partita.errors import CheckpointError
from partita.mlx.mlx_lm_internals import family_of

DTYPES: Mapping[str, mx.Dtype] = {
    "F64": mx.float64, "F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "C64": mx.complex64, "BOOL": mx.bool_,
    "I64": mx.int64, "I32": mx.int32, "I16": mx.int16, "I8": mx.int8,
    "U64": mx.uint64, "U32": mx.uint32, "U16": mx.uint16, "U8": mx.uint8,
    "F8_E4M3": mx.uint8, "F8_E5M2": mx.uint8, "F8_E8M0": mx.uint8,
}  # fmt: skip
"""MLX's dtypes by their safetensors names, as `mx.load` gives them: eight-bit floats as bytes."""


_UNEXPECTED_PREFIXES: Mapping[str, str] = {"gpt2": "transformer."}
"""Prefix that transformers writes before the names of a family, which mlx-lm's `sanitize` does not handle."""


@dataclass(frozen=True)
class Box:
    """A box of a tensor on disk that corresponds to a box of a model's array.

    Attributes:
        name: The tensor's name on disk.
        start: Start of the box in the model's array, one number per axis.
        shape: Size of the box in the model's array.
        axes: For each axis of the model's array the corresponding axis on disk; None for a new axis of length 1.
        disk_start: Start of the box on disk, one number per axis.
    """

    name: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    axes: tuple[int | None, ...]
    disk_start: tuple[int, ...]

    def overlap(self, ranges: Sequence[Sequence[Range]]) -> tuple[list[list[Range]], list[Range]] | None:
        """The part of this box within `ranges` of the model's array, or None if there is none.

        Returns:
            The ranges to read, one per axis on disk, and their destination, one per axis of the local array.
        """
        take: list[list[Range]] = [[(start, start + 1)] for start in self.disk_start]
        put: list[Range] = []
        for axis, (own, start, length) in enumerate(zip(ranges, self.start, self.shape, strict=True)):
            mine, offset, first = [], 0, -1
            for a, b in own:
                low, high = max(a, start), min(b, start + length)
                if low < high:
                    first = offset + low - a if first < 0 else first
                    mine.append((low - start, high - start))
                offset += b - a
            if not mine:
                return None
            disk_axis = self.axes[axis]
            if disk_axis is not None:
                take[disk_axis] = [(self.disk_start[disk_axis] + a, self.disk_start[disk_axis] + b) for a, b in mine]
            put.append((first, first + sum(b - a for a, b in mine)))
        return take, put


@dataclass(frozen=True)
class Source:
    """The source of a model's array.

    Attributes:
        shape: Its unsplit shape as stored.
        dtype: dtype of the weight.
        boxes: The boxes on disk that make it up; None if `sanitize` computes it.
        reads: The tensors on disk that it is computed from; None if unknown.
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype
    boxes: tuple[Box, ...] | None
    reads: frozenset[str] | None = None


def sources_of(
    model: nn.Module, again: Callable[[], nn.Module], on_disk: Mapping[str, TensorInfo]
) -> dict[str, Source]:
    """The source of each array that `sanitize` creates from the tensors `on_disk`, by the model's names.

    Args:
        model: The unsplit model, which `sanitize` may modify (untie or tie the head), as when mlx-lm loads it.
        again: Builds another unsplit model.
        on_disk: The tensors of the checkpoint.

    Raises:
        CheckpointError: MLX lacks a tensor's dtype, or `sanitize` does not accept these tensors.
    """
    for info in on_disk.values():
        if info.dtype not in DTYPES:
            raise CheckpointError(f"{info.file}: tensor {info.name}: MLX has no dtype for {info.dtype}.")
    placeholders = {name: mx.zeros(info.shape, DTYPES[info.dtype]) for name, info in on_disk.items()}
    made = sanitize(model, placeholders)
    unchanged = {id(array): name for name, array in placeholders.items()}
    sources: dict[str, Source] = {}
    changed: dict[str, list[str]] = {}
    for name, array in made.items():
        disk = unchanged.get(id(array))
        boxes = None if disk is None else (_whole(disk, array.shape),)
        sources[name] = Source(tuple(array.shape), array.dtype, boxes)
        if disk is None:
            changed.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    # One trace per kind, since some operations cannot be exported: they hide only their own kind.
    for names in changed.values():
        for name, traced in zip(names, _trace(again(), placeholders, names), strict=False):
            sources[name] = replace(sources[name], boxes=traced[0], reads=traced[1])
    return sources


def unused_of(sources: Mapping[str, Source], on_disk: Mapping[str, TensorInfo]) -> tuple[list[str], bool]:
    """The tensors on disk that no array of the model uses, and whether it is certain that nothing else is computed
    from them.
    """
    used: set[str] = set()
    is_sure = True
    for source in sources.values():
        used.update(box.name for box in source.boxes or ())
        used.update(source.reads or ())
        is_sure = is_sure and (source.boxes is not None or source.reads is not None)
    return [name for name in on_disk if name not in used], is_sure


def _trace(
    model: nn.Module, placeholders: Mapping[str, mx.array], wanted: list[str]
) -> list[tuple[tuple[Box, ...] | None, frozenset[str]]]:
    """The boxes of each array of `wanted` that `sanitize` creates, and the tensors that each reads; empty if unknown."""

    def renamed(*arrays: mx.array) -> list[mx.array]:
        out = sanitize(model, dict(zip(placeholders, arrays, strict=True)))
        return [out[name] for name in wanted]

    graph = _Graph(list(placeholders))
    try:
        with _copies_left_out():
            mx.export_function(graph.add, renamed, *placeholders.values())
    except Exception:
        # MLX cannot export an operation, or the code reads values, which placeholders do not have.
        return []
    return [(graph.boxes(letter), graph.reads(letter)) for letter in graph.outputs]


@contextmanager
def _copies_left_out() -> Iterator[None]:
    """Replace `mx.contiguous`, which MLX cannot export and which changes no values, by a no-op inside the context."""
    module: Any = mx
    kept = module.contiguous
    module.contiguous = lambda x, *args, **kwargs: x
    try:
        yield
    finally:
        module.contiguous = kept


def sanitize(model: nn.Module, tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Run mlx-lm's `sanitize` on the tensors of a checkpoint of `model`.

    Raises:
        CheckpointError: It does not accept them.
    """
    family = family_of(type(model))
    weights = {name.removeprefix(_UNEXPECTED_PREFIXES.get(family, "")): tensor for name, tensor in tensors.items()}
    if family == "gpt_oss":
        weights = _unpacked_experts(weights)
    if not hasattr(model, "sanitize"):
        return weights
    try:
        made: dict[str, mx.array] = model.sanitize(weights)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"mlx-lm's {family} cannot convert the checkpoint's tensors ({type(error).__name__}: {error}). "
            "The config does not belong to this checkpoint, or the checkpoint is incomplete."
        ) from error
    return made


def _unpacked_experts(weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Rename the experts of a gpt-oss that is not quantized as mlx-lm does, whose `sanitize` handles quantized ones only.

    On disk `gate_up_proj [experts, hidden, 2 * inner]` alternates columns of gate and up; `down_proj` is `[experts, inner,
    hidden]`.
    """
    renamed: dict[str, mx.array] = {}
    for name, array in weights.items():
        path, _, part = name.rpartition(".")
        if part == "gate_up_proj":
            renamed[f"{path}.gate_proj.weight"] = array[..., ::2].swapaxes(-1, -2)
            renamed[f"{path}.up_proj.weight"] = array[..., 1::2].swapaxes(-1, -2)
        elif part == "down_proj" and array.ndim == 3:
            renamed[f"{path}.down_proj.weight"] = array.swapaxes(-1, -2)
        else:
            renamed[name] = array
    if len(renamed) == len(weights):
        return renamed
    biases = {name: array for name, array in renamed.items() if name.endswith("_proj_bias")}
    for name, array in biases.items():
        del renamed[name]
        if name.endswith("gate_up_proj_bias"):
            path = name.removesuffix("gate_up_proj_bias")
            renamed |= {f"{path}gate_proj.bias": array[..., ::2], f"{path}up_proj.bias": array[..., 1::2]}
        else:
            renamed[f"{name.removesuffix('_bias')}.bias"] = array
    return renamed


def _whole(name: str, shape: Sequence[int]) -> Box:
    axes = tuple(range(len(shape)))
    return Box(name, (0,) * len(shape), tuple(shape), axes, (0,) * len(shape))


class _Graph:
    """The graph that `mx.export_function` reports to a callback: arrays have letters as names, operations MLX's names."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.inputs: dict[str, str] = {}
        self.outputs: list[str] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.known: dict[str, tuple[Box, ...] | None] = {}
        self.made_by: dict[str, tuple[str, list[Any], list[str], int]] = {}

    def add(self, event: dict[str, Any]) -> None:
        """Record one report: the inputs, the outputs, or an operation."""
        kind = event["type"]
        if kind == "inputs":
            for name, (letter, shape, _) in zip(self.names, event["inputs"], strict=True):
                self.known[letter] = (_whole(name, shape),)
                self.inputs[letter] = name
                self.shapes[letter] = tuple(shape)
        elif kind == "outputs":
            self.outputs = [letter for letter, _, _ in event["outputs"]]
        elif kind == "primitive":
            inputs = [letter for letter, _, _ in event["inputs"]]
            for place, (letter, shape, _) in enumerate(event["outputs"]):
                self.shapes[letter] = tuple(shape)
                self.made_by[letter] = (event["name"], event["arguments"], inputs, place)

    def boxes(self, letter: str) -> tuple[Box, ...] | None:
        """The boxes on disk that make up an array, or None if it is computed."""
        if letter not in self.known:
            operation, arguments, inputs, place = self.made_by.get(letter, ("Constant", [], [], 0))
            parts = [boxes for i in inputs if (boxes := self.boxes(i)) is not None]
            move = _MOVES.get(operation)
            if move is None or len(parts) < len(inputs):
                self.known[letter] = None
            else:
                shapes = [self.shapes[i] for i in inputs]
                self.known[letter] = move(arguments, parts, shapes, self.shapes[letter], place)
        return self.known[letter]

    def reads(self, letter: str) -> frozenset[str]:
        """The names on disk of the inputs that an array depends on."""
        found, seen, todo = set(), set(), [letter]
        while todo:
            one = todo.pop()
            if one in seen:
                continue
            seen.add(one)
            if one in self.inputs:
                found.add(self.inputs[one])
            todo.extend(self.made_by[one][2] if one in self.made_by else ())
        return frozenset(found)


Boxes = tuple[Box, ...]
_Move = Callable[[list[Any], list[Boxes], list[tuple[int, ...]], tuple[int, ...], int], Boxes | None]


def _same(arguments: list[Any], parts: list[Boxes], shapes: object, shape: object, place: int) -> Boxes:
    return parts[0]


def _expand_dims(arguments: list[Any], parts: list[Boxes], shapes: object, shape: tuple[int, ...], place: int) -> Boxes:
    new = {axis % len(shape) for axis in arguments[0]}
    return tuple(_with_new_axes(box, new, len(shape)) for box in parts[0])


def _with_new_axes(box: Box, new: set[int], count: int) -> Box:
    old = iter(range(len(box.shape)))
    order = [None if axis in new else next(old) for axis in range(count)]
    return replace(
        box,
        start=tuple(0 if axis is None else box.start[axis] for axis in order),
        shape=tuple(1 if axis is None else box.shape[axis] for axis in order),
        axes=tuple(None if axis is None else box.axes[axis] for axis in order),
    )


def _squeeze(
    arguments: list[Any], parts: list[Boxes], shapes: list[tuple[int, ...]], shape: object, place: int
) -> Boxes:
    gone = {axis % len(shapes[0]) for axis in arguments[0]}
    kept = [axis for axis in range(len(shapes[0])) if axis not in gone]
    return tuple(_ordered(box, kept) for box in parts[0])


def _transpose(arguments: list[Any], parts: list[Boxes], shapes: object, shape: object, place: int) -> Boxes:
    return tuple(_ordered(box, arguments[0]) for box in parts[0])


def _ordered(box: Box, order: Sequence[int]) -> Box:
    return replace(
        box,
        start=tuple(box.start[axis] for axis in order),
        shape=tuple(box.shape[axis] for axis in order),
        axes=tuple(box.axes[axis] for axis in order),
    )


def _concatenate(
    arguments: list[Any], parts: list[Boxes], shapes: list[tuple[int, ...]], shape: tuple[int, ...], place: int
) -> Boxes:
    axis = arguments[0] % len(shape)
    offsets = [0, *accumulate(one[axis] for one in shapes)]
    return tuple(
        replace(box, start=(*box.start[:axis], box.start[axis] + offset, *box.start[axis + 1 :]))
        for boxes, offset in zip(parts, offsets, strict=False)
        for box in boxes
    )


def _slice(arguments: list[Any], parts: list[Boxes], shapes: object, shape: object, place: int) -> Boxes | None:
    starts, stops, steps = arguments
    if any(step != 1 for step in steps):
        return None
    return _cut(parts[0], list(zip(starts, stops, strict=True)))


def _split(arguments: list[Any], parts: list[Boxes], shapes: list[tuple[int, ...]], shape: object, place: int) -> Boxes:
    indices, axis = arguments
    axis %= len(shapes[0])
    bounds = list(pairwise([0, *indices, shapes[0][axis]]))
    return _cut(parts[0], [bounds[place] if i == axis else (0, size) for i, size in enumerate(shapes[0])])


def _cut(boxes: Boxes, ranges: list[Range]) -> Boxes:
    cut = []
    for box in boxes:
        found = box.overlap([[one] for one in ranges])
        if found is not None:
            take, put = found
            cut.append(
                replace(
                    box,
                    start=tuple(start for start, _ in put),
                    shape=tuple(stop - start for start, stop in put),
                    disk_start=tuple(one[0][0] for one in take),
                )
            )
    return tuple(cut)


def _reshape(
    arguments: list[Any], parts: list[Boxes], shapes: list[tuple[int, ...]], shape: tuple[int, ...], place: int
) -> Boxes | None:
    """Reshape boxes: axes of length 1 may be added or dropped, and an axis that becomes two divides them into rows."""
    before = shapes[0]
    if [n for n in before if n != 1] == [n for n in shape if n != 1]:
        kept = [axis for axis, n in enumerate(before) if n != 1]
        new = {axis for axis, n in enumerate(shape) if n == 1}
        return tuple(_with_new_axes(_ordered(box, kept), new, len(shape)) for box in parts[0])
    for axis in range(len(before)):
        if len(shape) == len(before) + 1 and before[:axis] + before[axis + 1 :] == shape[:axis] + shape[axis + 2 :]:
            return tuple(row for box in parts[0] for row in _rows(box, axis, shape[axis + 1]))
    return None


def _rows(box: Box, axis: int, width: int) -> list[Box]:
    """Divide a box whose `axis` becomes two, the second of `width`: one box per index of the first."""
    start, stop, disk = box.start[axis], box.start[axis] + box.shape[axis], box.axes[axis]
    rows = []
    for row in range(start // width, -(-stop // width)):
        low, high = max(start, row * width), min(stop, (row + 1) * width)
        disk_start = list(box.disk_start)
        if disk is not None:
            disk_start[disk] += low - start
        rows.append(
            replace(
                box,
                start=(*box.start[:axis], row, low - row * width, *box.start[axis + 1 :]),
                shape=(*box.shape[:axis], 1, high - low, *box.shape[axis + 1 :]),
                axes=(*box.axes[:axis], None, disk, *box.axes[axis + 1 :]),
                disk_start=tuple(disk_start),
            )
        )
    return rows


_MOVES: Mapping[str, _Move] = {
    **dict.fromkeys(("Copy", "Contiguous", "StopGradient"), _same),
    "ExpandDims": _expand_dims,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Concatenate": _concatenate,
    "Slice": _slice,
    "Split": _split,
    "Reshape": _reshape,
}
"""MLX's operations that move values without changing them."""
