"""Filling local tensors from the byte ranges of a checkpoint."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from partita.checkpoint.header import TensorInfo
from partita.checkpoint.read import Reader
from partita.core.sharding.cuts import TensorPlan
from partita.core.sharding.split import Range
from partita.errors import CheckpointError, ModelError
from partita.quantized.ggml import GgmlWeight
from partita.quantized.weight import CHUNK_BYTES, QuantizedWeight, in_steps
from partita.torch.layers.inner import take_ranges
from partita.torch.quantized.part import Part
from partita.torch.quantized.tensor import QuantizedTensor
from partita.torch.weights.names import Source, convert_whole

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""torch's dtypes by their safetensors names."""

Progress = Callable[[int, int], None]
"""Called with the bytes that this rank has loaded and their total."""


class CheckpointFill:
    """Fills local tensors from the byte ranges of a checkpoint."""

    def __init__(
        self,
        reader: Reader,
        infos: Mapping[str, TensorInfo],
        sources: Mapping[str, Source],
        unsplit: nn.Module,
        progress: Progress | None = None,
        total_bytes: int = 0,
        quantized: Mapping[str, QuantizedWeight] | None = None,
    ) -> None:
        self.reader, self.infos, self.sources, self.unsplit = reader, infos, sources, unsplit
        self.progress, self.total_bytes = progress, total_bytes
        self.quantized = quantized or {}
        self.done_bytes = 0

    def __call__(self, name: str, cut: TensorPlan, rank: int, local: Tensor) -> None:
        """Fill `local`, the part of tensor `name` that tensor rank `rank` holds."""
        self.read(name, cut.ranges(rank), local)

    def quantized_part(self, name: str, cut: TensorPlan, rank: int, like: Tensor) -> QuantizedTensor | None:
        """The part of tensor `name` that tensor rank `rank` holds, still quantized; None if it is not stored so.

        Args:
            name: A tensor of the unsplit model.
            cut: How it is split.
            rank: The tensor rank.
            like: A tensor of the local shape, and of the dtype to compute in; its device does not matter.
        """
        pieces = self._source(name).pieces
        if not pieces or not all(piece.name in self.quantized for piece in pieces) or 0 in like.shape:
            return None
        if any(isinstance(w, GgmlWeight) and w.is_plain for w in (self.quantized[piece.name] for piece in pieces)):
            return None
        experts: dict[int, list[Part]] = {}
        for piece in pieces:
            overlap = piece.overlap(cut.ranges(rank))
            if overlap is None:
                continue
            (*which, first, second), put = overlap
            weight = self.quantized[piece.name]
            rows, columns = (second, first) if weight.transposed else (first, second)
            inside = [expert for start, stop in which[0] for expert in range(start, stop)] if which else [0]
            for place, expert in enumerate(inside, put[0][0] if len(put) == 3 else 0):
                array = weight.read(self.reader, rows, columns, expert)
                experts.setdefault(place, []).append(Part.of(array, keep=False))
        parts = [experts[place] for place in sorted(experts)]
        turned = self.quantized[pieces[0].name].transposed
        made = QuantizedTensor(parts, like.dtype, stacked=like.dim() == 3, turned=turned)
        if made.shape != like.shape:
            return None  # the pieces do not stand one after the other
        self._count(like)
        return made

    def read(self, name: str, ranges: tuple[tuple[Range, ...], ...], local: Tensor) -> None:
        """Read the `ranges` of each dim of tensor `name` into `local`, in their order."""
        source = self._source(name)
        if source.converter is not None:
            whole = convert_whole(source, name, {n: self._read_whole(n) for n, _ in source.inputs}, self.unsplit)
            local.copy_(take_ranges(whole, ranges))
            return
        for piece in source.pieces:
            overlap = piece.overlap(ranges)
            if overlap is not None:
                take, put = overlap
                target = local
                for dim, (a, b) in enumerate(put):
                    target = target.narrow(dim, a, b - a)
                self._read(piece.name, take, target.squeeze(0) if piece.stacked else target)

    def _source(self, name: str) -> Source:
        try:
            return self.sources[name]
        except KeyError:
            raise CheckpointError(
                f"tensor {name} of the model is not in {self.reader.checkpoint.folder}. The checkpoint belongs to another "
                "model, or is incomplete."
            ) from None

    def _read_whole(self, name: str) -> Tensor:
        weight = self.quantized.get(name)
        if weight is not None:
            whole = torch.empty(weight.shape, dtype=torch.float32)
            self._dequantize(weight, [[(0, size)] for size in weight.shape], whole)
            return whole
        info = self.infos[name]
        whole = torch.empty(info.shape, dtype=_dtype(info))
        self._read(name, [[(0, size)] for size in info.shape], whole)
        return whole

    def _read(self, name: str, take: list[list[tuple[int, int]]], target: Tensor) -> None:
        """Read ranges of a tensor on disk into a view of a local tensor, in chunks of its first dim."""
        if name in self.quantized:
            self._dequantize(self.quantized[name], take, target)
            self._count(target)
            return
        info = self.infos[name]
        dtype = _dtype(info)
        is_other_kind = dtype.itemsize == 1 or dtype.is_floating_point != target.dtype.is_floating_point
        if is_other_kind and dtype != target.dtype:
            raise CheckpointError(
                f"{info.file}: tensor {name} is {info.dtype}, which cannot be converted to the model's {target.dtype} without "
                "its scales. Dequantize the checkpoint, and load that."
            )
        direct = dtype == target.dtype and target.is_contiguous() and target.device.type == "cpu"
        if direct or target.dim() == 0:
            into = target if direct else torch.empty(target.shape, dtype=dtype)
            self.reader.read(name, take, memory_of(into))
            if not direct:
                target.copy_(into)
        else:
            row_bytes = max(1, math.prod(target.shape[1:]) * dtype.itemsize)
            rows = max(1, CHUNK_BYTES // row_bytes)
            buffer = torch.empty((min(rows, target.shape[0]), *target.shape[1:]), dtype=dtype)
            done = 0
            for piece in in_steps(take[0], rows):
                count = sum(b - a for a, b in piece)
                into = buffer[:count]
                self.reader.read(name, [piece, *take[1:]], memory_of(into))
                target[done : done + count].copy_(into)
                done += count
        self._count(target)

    def _dequantize(self, weight: QuantizedWeight, take: list[list[tuple[int, int]]], target: Tensor) -> None:
        """Read ranges of a quantized weight, and write their values into a view of a local tensor."""
        *which, first, second = take
        rows, columns = (second, first) if weight.transposed else (first, second)
        into = target if which else target[None]
        experts = [expert for start, stop in which[0] for expert in range(start, stop)] if which else [0]
        step = max(1, CHUNK_BYTES // max(1, sum(b - a for a, b in columns)))
        for place, expert in enumerate(experts):
            matrix = into[place].T if weight.transposed else into[place]
            done = 0
            for piece in in_steps(rows, step):
                part = Part.of(weight.read(self.reader, piece, columns, expert), keep=False)
                count = part.shape[0]
                matrix[done : done + count].copy_(part.rows(slice(None), torch.float32))
                done += count

    def _count(self, target: Tensor) -> None:
        """Report that a local tensor is loaded."""
        if self.progress is not None:
            self.done_bytes += target.numel() * target.itemsize
            self.progress(self.done_bytes, self.total_bytes)


def _dtype(info: TensorInfo) -> torch.dtype:
    try:
        return DTYPES[info.dtype]
    except KeyError:
        raise CheckpointError(f"{info.file}: tensor {info.name}: torch has no dtype for {info.dtype}.") from None


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor as writable memory; the tensor must outlive it."""
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    size = tensor.numel() * tensor.itemsize
    if size == 0:
        return memoryview(bytearray())
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The torch dtype of a name.

    Raises:
        ModelError: Models cannot have this dtype.
    """
    names = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype is None or dtype == "auto":
        return None
    found = names.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found not in names.values():
        raise ModelError(f"dtype must be one of {', '.join(names)}; got {dtype}.")
    return found


def as_device(device: torch.device | str | None) -> torch.device:
    """Resolve a device argument (default: this rank's CUDA device if there is one, else the CPU).

    Raises:
        ModelError: This machine has no such device.
    """
    if device is not None:
        try:
            found = torch.device(device)
            torch.empty(0, device=found)
        except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
            raise ModelError(
                f"device must be available on this machine (cpu{', cuda' if torch.cuda.is_available() else ''}, ...); got "
                f"{str(device)!r}. Leave it out for the default device."
            ) from error
        if found.type == "meta":
            raise ModelError("device must be able to store weights; got 'meta'. Leave it out for the default device.")
        return found
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
