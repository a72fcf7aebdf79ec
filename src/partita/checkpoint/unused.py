"""Tensors of a checkpoint that the model loaded from it does not use: they are saved again unchanged.

A model class may leave out layers of its checkpoint (multi-token prediction, a vision tower), while the config beside it still
announces them. So a save copies them from file to file, a few megabytes at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from partita.checkpoint.header import TensorInfo
from partita.checkpoint.index import open_checkpoint
from partita.checkpoint.read import Range, Reader
from partita.errors import CheckpointError

_CHUNK_BYTES = 8 << 20

_COMPUTED = re.compile(r"(inv_freq|position_ids|masked_bias|attn\.bias|attention\.bias)$")
"""Computed buffers that older versions of transformers saved, which need no note."""

NOT_SAVED = "{}: unused tensors are not saved, and the saved config does not announce them."
"""The note to print, with the reason, if unused tensors can no longer be read."""

_ANNOUNCING = (
    "num_nextn_predict_layers",
    "num_mtp_layers",
    "mtp_num_layers",
    "mtp_num_hidden_layers",
    "num_mtp_modules",
)
"""Settings of a config that announce prediction layers."""


Write = Callable[[str, list[list[Range]], memoryview], None]
Piece = tuple[str, list[list[Range]], Callable[[], memoryview]]


@dataclass(frozen=True)
class Unused:
    """The unused tensors of a checkpoint.

    Attributes:
        folder: The checkpoint's folder.
        tensors: The unused tensors by name.
    """

    folder: Path = Path()
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)

    def __deepcopy__(self, memo: object) -> Unused:
        return self

    def __bool__(self) -> bool:
        return bool(self.tensors)

    def without(self, names: Collection[str]) -> Unused:
        """The unused tensors that are not among `names`."""
        return Unused(self.folder, {name: info for name, info in self.tensors.items() if name not in names})

    def joined(self, other: Unused) -> Unused:
        """The tensors of both; `other` is of the same folder."""
        return Unused(other.folder, {**self.tensors, **other.tensors})

    def note(self, model: str) -> str:
        """The note to print when `model` is loaded; empty if there are no unused tensors to report."""
        names = [name for name in self.tensors if not _COMPUTED.search(name)]
        if not names:
            return ""
        count = f"{len(names)} tensor{'s' if len(names) > 1 else ''}"
        return (
            f"{self.folder}: {model} does not use {count} ({names[0]}{', ...' if len(names) > 1 else ''}): "
            "not trained, and saved unchanged."
        )

    def missing(self) -> str:
        """The reason why they can no longer be read; empty if they can."""
        try:
            present = open_checkpoint(self.folder).tensors if self else {}
        except CheckpointError as error:
            return str(error)
        changed = [name for name, info in self.tensors.items() if present.get(name) != info]
        return f"{self.folder}: {changed[0]} has changed since it was loaded" if changed else ""

    def facts(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype and shape of each."""
        return [(name, info.dtype, tuple(info.shape)) for name, info in self.tensors.items()]

    def copy(self, write: Write, rank: int, size: int) -> None:
        """Pass the share of rank `rank` of `size` to `write`, piece by piece."""
        if self:
            with self.opened() as reader:
                for name, ranges, read in self.pieces(reader, rank, size):
                    write(name, ranges, read())

    def pieces(self, reader: Reader, rank: int, size: int) -> Iterator[Piece]:
        """The pieces that rank `rank` of `size` copies: for each, its tensor's name, the ranges of its dims, and a reader."""
        place = 0
        for name, info in self.tensors.items():
            rows, rest = (info.shape[0], info.shape[1:]) if info.shape else (1, ())
            step = max(1, _CHUNK_BYTES * 8 // max(1, math.prod(rest) * info.itemsize_bits))
            for start in range(0, rows, step):
                stop = min(rows, start + step)
                if place % size == rank:
                    ranges = [[(start, stop)], *([(0, length)] for length in rest)] if info.shape else []
                    size_bytes = (stop - start) * math.prod(rest) * info.itemsize_bits // 8
                    yield name, ranges, partial(_read, reader, name, ranges, size_bytes)
                place += 1

    def opened(self) -> Reader:
        """A reader with all files open, so that it can read them even after their folder is removed. The caller closes it.

        Raises:
            CheckpointError: A file cannot be opened.
        """
        reader = Reader(open_checkpoint(self.folder))
        for info in self.tensors.values():
            reader.open(info)
        return reader


def _read(reader: Reader, name: str, ranges: list[list[Range]], size_bytes: int) -> memoryview:
    """A piece of a tensor in new memory."""
    data = memoryview(bytearray(size_bytes))
    reader.read(name, ranges, data)
    return data


def announce_nothing(config: Any) -> None:
    """Remove from a config, transformers' or plain data, the announcement of layers that were not saved."""
    for name in _ANNOUNCING:
        if isinstance(config, dict):
            for part in (config, *(value for value in config.values() if isinstance(value, dict))):
                part.update({name: 0} if part.get(name) else {})
        else:
            for part in (config, config.get_text_config()):
                if getattr(part, name, None):
                    setattr(part, name, 0)
