"""The header of a GGUF file: metadata and the place of each tensor, with every rule checked; data is not read.

A file is the magic `GGUF`, the version, the numbers of tensors and of metadata entries, the metadata, one entry a tensor, then
from the next multiple of the alignment on the data. All integers are little-endian.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the types of tensors: `ggml_type` in ggml.h.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from partita.checkpoint.header import TensorInfo, brief, open_regular, read_bytes
from partita.errors import CheckpointError

MAGIC = b"GGUF"
SUFFIX = ".gguf"

BLOCKS: Mapping[str, tuple[int, int]] = MappingProxyType({
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2),
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "IQ4_NL": (32, 18), "IQ4_XS": (256, 136), "MXFP4": (32, 17),
})  # fmt: skip
"""The types that can be read: elements and bytes of a block, which lies within one row."""

PLAIN = ("F32", "F16", "BF16")
"""The types without blocks."""

_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
_FIRST_READ_BYTES = 1 << 20
_REFETCH = "the file is damaged or incomplete: download it or write it again"


@dataclass(frozen=True)
class GgufFile:
    """A checked header.

    Attributes:
        file: The file.
        metadata: Its metadata by key.
        tensors: Its tensors by their names in the file; shapes are (..., outputs, inputs), the reverse of the file's order.
        header_bytes: Where the data begins.
        file_bytes: The size of the file.
    """

    file: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    header_bytes: int
    file_bytes: int


def is_gguf(path: Path) -> bool:
    """Whether a path is a file with the name of a GGUF file."""
    return path.suffix.lower() == SUFFIX and path.is_file()


def read_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Read and check the header of a GGUF file.

    Raises:
        CheckpointError: It violates the format, is incomplete, or holds a type that cannot be read; the message names the byte.
    """
    file = Path(path)
    fd, file_bytes = open_regular(file)
    try:
        return _Parser(fd, file, file_bytes).parse()
    finally:
        os.close(fd)


class _Parser:
    """Reads the header from the start, in pieces that double."""

    def __init__(self, fd: int, file: Path, file_bytes: int) -> None:
        self.fd, self.file, self.file_bytes = fd, file, file_bytes
        self.data = b""
        self.place = 0

    def parse(self) -> GgufFile:
        num_tensors, num_entries = self._start()
        metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            start = self.place
            key = self._text("a key")
            if key in metadata:
                raise self._error(start, f"the key {brief(key)} occurs twice")
            metadata[key] = self._value(self._number("<I"), f"the value of {brief(key)}")
        entries = [self._entry() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(
                f"{self.file}: general.alignment must be a power of two, but is {brief(alignment)}; {_REFETCH}"
            )
        header_bytes = -(-self.place // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, dtype, shape, offset, size_bytes in entries:
            if name in tensors:
                raise CheckpointError(f"{self.file}: tensor {brief(name)} occurs twice; {_REFETCH}")
            start = header_bytes + offset
            tensors[name] = TensorInfo(self.file, name, dtype, shape, start, start + size_bytes)
        self._check_cover(tensors)
        return GgufFile(self.file, MappingProxyType(metadata), MappingProxyType(tensors), header_bytes, self.file_bytes)

    def _start(self) -> tuple[int, int]:
        """The numbers of tensors and of metadata entries."""
        head = self._take(4, "the magic")
        if head != MAGIC:
            raise self._error(0, f"the first bytes must be {MAGIC!r}, but are {head!r}: it is no GGUF file")
        version = self._number("<I")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            kind = "it is in big-endian order" if swapped in (2, 3) else f"it is {version}"
            raise self._error(4, f"the version must be 2 or 3, but {kind}. Convert the model again with llama.cpp")
        num_tensors, num_entries = self._number("<Q"), self._number("<Q")
        # The shortest entries have 24 and 13 bytes.
        if num_tensors * 24 > self.file_bytes or num_entries * 13 > self.file_bytes:
            what = f"{num_tensors} tensors and {num_entries} entries"
            raise self._error(8, f"{what} do not fit: the file ends at byte {self.file_bytes}")
        return num_tensors, num_entries

    def _entry(self) -> tuple[str, str, tuple[int, ...], int, int]:
        """Name, type, shape, offset and bytes of a tensor."""
        start = self.place
        name = self._text("a tensor's name")
        where = f"tensor {brief(name)}"
        num_dims = self._number("<I")
        if num_dims > _MAX_DIMS:
            raise self._error(start, f"{where} must have at most {_MAX_DIMS} dims, but has {num_dims}")
        shape = tuple(self._number("<Q") for _ in range(num_dims))[::-1]
        number, offset = self._number("<I"), self._number("<Q")
        dtype = _TYPES.get(number, f"type {number}")
        if dtype not in BLOCKS:
            raise CheckpointError(
                f"{self.file}: {where} is {dtype}, which cannot be read: {', '.join(BLOCKS)} can. Take a file of the same "
                "model in one of these types, or convert it with llama.cpp (llama-quantize --allow-requantize)."
            )
        elements, size = BLOCKS[dtype]
        count = math.prod(shape)
        if count >= 2**60 or (shape[-1] if shape else 1) % elements:
            raise self._error(
                start,
                f"{where}: a row must be whole blocks of {elements} elements of {dtype}, but the shape is {shape}",
            )
        return name, dtype, shape, offset, count // elements * size

    def _check_cover(self, tensors: Mapping[str, TensorInfo]) -> None:
        """Check that the data is inside the file, and that tensors do not overlap."""
        end, before = 0, ""
        for info in sorted(tensors.values(), key=lambda info: (info.start_bytes, info.end_bytes)):
            if info.end_bytes > self.file_bytes:
                raise CheckpointError(
                    f"{self.file}: tensor {brief(info.name)} must end at byte {info.end_bytes}, but the file ends at byte "
                    f"{self.file_bytes}: was the download interrupted? Download it again"
                )
            if info.start_bytes < end and info.nbytes:
                raise CheckpointError(
                    f"{self.file}: tensor {brief(info.name)} begins at byte {info.start_bytes}, before {brief(before)} "
                    f"ends at byte {end}; {_REFETCH}"
                )
            end, before = max(end, info.end_bytes), info.name

    def _value(self, kind: int, what: str, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text(what)
        if kind != _ARRAY or depth > 8:
            raise self._error(self.place, f"{what} must have a type from 0 to 12, but has {kind}")
        start = self.place
        inner, count = self._number("<I"), self._number("<Q")
        smallest = struct.calcsize(_SCALARS[inner]) if inner in _SCALARS else 8
        if count * smallest > self.file_bytes - self.place:
            raise self._error(start, f"{what} has {count} elements, more than the file holds")
        if inner in _SCALARS:
            size = count * smallest
            return list(struct.unpack(f"<{count}{_SCALARS[inner][1]}", self._take(size, what)))
        if inner == _STRING:
            return self._texts(count, what)
        return [self._value(inner, what, depth + 1) for _ in range(count)]

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form), "a number"))[0]

    def _text(self, what: str) -> str:
        return self._texts(1, what)[0]

    def _texts(self, count: int, what: str) -> list[str]:
        found: list[str] = []
        unpack = struct.Struct("<Q").unpack_from
        place = self.place
        for _ in range(count):
            if place + 8 > len(self.data):
                self._need(place + 8, what)
            end = place + 8 + unpack(self.data, place)[0]
            if end > len(self.data):
                self._need(end, what)
            try:
                found.append(self.data[place + 8 : end].decode("utf-8"))
            except UnicodeDecodeError as error:
                raise self._error(place + 8 + error.start, f"{what} must be UTF-8") from error
            place = end
        self.place = place
        return found

    def _take(self, size: int, what: str) -> bytes:
        end = self.place + size
        if end > len(self.data):
            self._need(end, what)
        taken, self.place = self.data[self.place : end], end
        return taken

    def _need(self, end: int, what: str) -> None:
        """Read on until `data` has `end` bytes."""
        if end > self.file_bytes:
            raise self._error(self.place, f"{what} must end at byte {end}, but the file ends at byte {self.file_bytes}")
        wanted = min(self.file_bytes, max(end, 2 * len(self.data), _FIRST_READ_BYTES))
        self.data += read_bytes(self.fd, self.file, len(self.data), wanted - len(self.data))

    def _error(self, place: int, rule: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: byte {place}: {rule}; {_REFETCH}")
