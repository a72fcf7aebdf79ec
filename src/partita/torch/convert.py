"""Conversion of a model on disk to an ordinary Hugging Face folder: plain values in safetensors."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from partita.checkpoint.durable import appear, failing_as, partial_of, start_partial
from partita.checkpoint.facts import stored_dtype
from partita.checkpoint.find import find_model
from partita.checkpoint.header import TensorInfo
from partita.checkpoint.index import Checkpoint, open_checkpoint
from partita.checkpoint.read import Range, Reader
from partita.checkpoint.write import Writer, create_files, plan_files, write_index
from partita.core.model.spec import read_config
from partita.errors import CheckpointError
from partita.generation import load_tokenizer
from partita.quantized.find import quantized_weights
from partita.quantized.weight import CHUNK_BYTES, QuantizedWeight
from partita.torch.pickled import pickled_files, read_pickled
from partita.torch.quantized.part import Part
from partita.torch.weights.fill import DTYPES, Progress, as_dtype, memory_of

MAX_SHARD_BYTES = 5_000_000_000
"""The size of a file, as in transformers."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_KEPT = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")
_NOT_KEPT = ("config.json", "gguf_tokenizer.json")

Box = list[list[Range]]


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote.

    Attributes:
        tensors: The number of tensors.
        size_bytes: Their bytes.
        files: The number of files of weights.
    """

    tensors: int
    size_bytes: int
    files: int


class _Source(Protocol):
    """Weights to convert."""

    def tensors(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype of safetensors and shape of each tensor to write."""
        ...

    def pieces(self) -> Iterator[tuple[str, Box, Tensor]]:
        """All values in pieces of a few megabytes: a tensor's name, ranges of its dims, and the values in its dtype."""
        ...


def convert(
    model: str | Path, folder: str | Path, dtype: torch.dtype | str | None = None, *, progress: Progress | None = None
) -> Converted:
    """Write a GGUF file, a folder of pickled weights, or a quantized folder as an ordinary Hugging Face folder.

    Values are converted a few megabytes at a time. The folder appears complete or not at all.

    Args:
        model: A GGUF file, a folder in Hugging Face's format or of `.bin` files, one such file, or a hub id.
        folder: The folder to write, which must not exist or be empty.
        dtype: dtype of all floating-point weights (default: their own; of quantized ones that of the others).
        progress: Called after every piece with the bytes written and their total.

    Raises:
        PartitaError: The model cannot be read, or the folder cannot be written or holds files.
    """
    place, wanted = Path(folder), as_dtype(dtype)
    with failing_as(place, "cannot be written"):
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise CheckpointError(f"{place} already exists and is not empty. Name a new folder.")
    given = Path(model)
    pickled = pickled_files(given) if given.exists() and not _has_safetensors(given) else []
    if pickled:
        home = given if given.is_dir() else given.parent
        return _write(_Pickled(pickled, wanted), home, place, wanted, progress)
    home = find_model(model)
    checkpoint = open_checkpoint(home)
    weights = quantized_weights(checkpoint, read_config(checkpoint.folder))
    with Reader(checkpoint) as reader:
        return _write(_Stored(checkpoint, weights, wanted, reader), checkpoint.folder, place, wanted, progress)


def _has_safetensors(folder: Path) -> bool:
    return folder.is_dir() and any(folder.glob("*.safetensors"))


def _write(
    source: _Source, home: Path, place: Path, wanted: torch.dtype | None, progress: Progress | None
) -> Converted:
    config = read_config(home)
    tensors = source.tensors()
    files = plan_files(tensors, MAX_SHARD_BYTES)
    total = sum(info.nbytes for file in files for info in file.tensors.values())
    partial = partial_of(place)
    start_partial(place)
    try:
        create_files(partial, files)
        write_index(partial, files)
        with Writer(partial, files) as writer:
            for name, box, values in source.pieces():
                writer.write(name, box, memory_of(values))
                if progress is not None:
                    progress(writer.bytes_written, total)
        _write_beside(home, partial, config, wanted, tensors)
        appear(partial, place)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Converted(len(tensors), total, len(files))


def _write_beside(
    home: Path,
    partial: Path,
    config: Mapping[str, Any],
    wanted: torch.dtype | None,
    tensors: list[tuple[str, str, tuple[int, ...]]],
) -> None:
    """Write the config without its quantization, the tokenizer, and the other small files of the model."""
    counts: dict[str, int] = {}
    for _, name, shape in tensors:
        if DTYPES[name].is_floating_point:
            counts[name] = counts.get(name, 0) + math.prod(shape)
    stored = DTYPES[max(counts, key=lambda name: counts[name])] if counts else torch.float32
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype")}
    plain["dtype"] = str(wanted or stored).removeprefix("torch.")
    with failing_as(partial, "cannot be written"):
        for pattern in _KEPT:
            for file in sorted(home.glob(pattern)):
                if file.is_file() and file.name not in _NOT_KEPT and not file.name.endswith(".index.json"):
                    shutil.copyfile(file, partial / file.name)
        (partial / "config.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    if (home / "gguf_tokenizer.json").exists():
        load_tokenizer(home).save(partial)


@dataclass(frozen=True)
class _Stored:
    """A checkpoint of safetensors or GGUF files, quantized or not."""

    checkpoint: Checkpoint
    weights: Mapping[str, QuantizedWeight]
    wanted: torch.dtype | None
    reader: Reader
    plain: Mapping[str, TensorInfo] = field(init=False)

    def __post_init__(self) -> None:
        parts = {name for weight in self.weights.values() for name in weight.tensors}
        plain = {name: info for name, info in self.checkpoint.tensors.items() if name not in parts}
        object.__setattr__(self, "plain", plain)

    def _dtype(self, name: str) -> torch.dtype:
        if name in self.weights:
            stored = self.weights[name].form
            own = DTYPES.get(stored) or as_dtype(stored_dtype(self.checkpoint)) or torch.float32
        else:
            own = _torch_dtype(self.plain[name])
        return self.wanted if self.wanted is not None and own.is_floating_point else own

    def tensors(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """See `_Source`."""
        shapes = {name: info.shape for name, info in self.plain.items()}
        shapes |= {name: weight.shape for name, weight in self.weights.items()}
        return [(name, _NAMES[self._dtype(name)], shape) for name, shape in sorted(shapes.items())]

    def pieces(self) -> Iterator[tuple[str, Box, Tensor]]:
        """See `_Source`."""
        for name, weight in self.weights.items():
            yield from self._dequantized(name, weight)
        for name, info in self.plain.items():
            dtype = _torch_dtype(info)
            for box, shape in _boxes(info.shape, dtype.itemsize):
                values = torch.empty(shape, dtype=dtype)
                self.reader.read(name, box, memory_of(values))
                yield name, box, values.to(self._dtype(name))

    def _dequantized(self, name: str, weight: QuantizedWeight) -> Iterator[tuple[str, Box, Tensor]]:
        *stacked, first, second = weight.shape
        outputs, inputs = (second, first) if weight.transposed else (first, second)
        for expert in range(math.prod(stacked)):
            for [rows, columns], _ in _boxes((outputs, inputs), 4):
                part = Part.of(weight.read(self.reader, rows, columns, expert))
                values = part.rows(slice(None), torch.float32).to(self._dtype(name))
                box = [columns, rows] if weight.transposed else [rows, columns]
                if weight.transposed:
                    values = values.T
                yield name, [[(expert, expert + 1)]] * len(stacked) + box, values.contiguous()


@dataclass(frozen=True)
class _Pickled:
    """Files of pickled weights."""

    files: list[Path]
    wanted: torch.dtype | None

    def _dtype(self, own: torch.dtype) -> torch.dtype:
        return self.wanted if self.wanted is not None and own.is_floating_point else own

    def tensors(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """See `_Source`."""
        found: list[tuple[str, str, tuple[int, ...]]] = []
        for file in self.files:
            for name, tensor in read_pickled(file).items():
                if tensor.dtype not in _NAMES:
                    raise CheckpointError(f"{file}: tensor {name} is {tensor.dtype}, which safetensors cannot hold.")
                found.append((name, _NAMES[self._dtype(tensor.dtype)], tuple(tensor.shape)))
        return found

    def pieces(self) -> Iterator[tuple[str, Box, Tensor]]:
        """See `_Source`."""
        for file in self.files:
            for name, tensor in read_pickled(file).items():
                for box, _ in _boxes(tuple(tensor.shape), tensor.itemsize):
                    part = tensor[box[0][0][0] : box[0][0][1]] if box else tensor
                    yield name, box, part.to(self._dtype(tensor.dtype)).contiguous()


def _boxes(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[Box, tuple[int, ...]]]:
    """Boxes of a few megabytes that cover a tensor, along its first dim."""
    if not shape:
        yield [], ()
        return
    others = [[(0, size)] for size in shape[1:]]
    step = max(1, CHUNK_BYTES // max(1, math.prod(shape[1:]) * itemsize))
    for start in range(0, shape[0], step):
        stop = min(shape[0], start + step)
        yield [[(start, stop)], *others], (stop - start, *shape[1:])


def _torch_dtype(info: TensorInfo) -> torch.dtype:
    try:
        return DTYPES[info.dtype]
    except KeyError:
        raise CheckpointError(f"{info.file}: tensor {info.name}: torch has no dtype for {info.dtype}.") from None
