"""The header of a safetensors file: reading, with every rule of the format checked, and encoding.

A file is 8 bytes that hold the length of the header (unsigned, little-endian), the header (JSON that begins with `{`
and may end in blanks), then the data of the tensors in C order, little-endian, without gaps.
Source: https://github.com/huggingface/safetensors#format, and its `tensor.rs` for the list of dtypes.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
import stat
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from partita.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""The format's limit for the length of a header."""

DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        "F4": 4,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        **dict.fromkeys(("BOOL", "U8", "I8"), 8),
        **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
        **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
        **dict.fromkeys(("I32", "U32", "F32"), 32),
        **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    }
)
"""Every dtype of the format, and the bits of one element."""

PICKLED = (
    "pickled weights can run code, so they are not read; `partita convert` makes safetensors of them without running it"
)

_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_REFETCH = "the file is damaged or was written incorrectly: download it or write it again"
# A legal header of MAX_HEADER_BYTES has 3 million. A list of empty lists would take 36 bytes of memory per byte.
_MAX_BRACKETS = 4_000_000

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", f"a zip archive, as torch.save writes: {PICKLED}"),
    *((bytes([0x80, protocol]) + b"\x95", f"a pickle: {PICKLED}") for protocol in (4, 5)),
    *((bytes([0x80, protocol]), f"a pickle: {PICKLED}") for protocol in (2, 3)),
    (b"version https://git-lfs", "a git-lfs pointer, not the weights: run `git lfs pull` or download the file again"),
    (b"GGUF", "a GGUF file: end its name in .gguf"),
    (b"\x93NUMPY", "a numpy array: convert it to safetensors"),
    (b"\x89HDF", "an HDF5 file: convert it to safetensors"),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    (b"<", "a web page or XML, so the download failed: download it again"),
)

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 160
_repr.maxlist = _repr.maxtuple = 8
brief = _repr.repr
"""`repr`, truncated: values from a file may have any length."""


@dataclass(frozen=True)
class TensorInfo:
    """The location of one tensor: bytes `start_bytes` to `end_bytes` of `file`, counted from the beginning of the file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start_bytes: int
    end_bytes: int

    @property
    def nbytes(self) -> int:
        """The size of its data in bytes."""
        return self.end_bytes - self.start_bytes

    @property
    def itemsize_bits(self) -> int:
        """The size of one element in bits; elements of sub-byte dtypes are smaller than a byte."""
        return DTYPE_BITS[self.dtype]


@dataclass(frozen=True)
class Header:
    """A checked header. The data begins at `header_bytes`, and `tensors` keeps the order of the header's JSON."""

    file: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    header_bytes: int


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a safetensors file; its data is not read.

    Raises CheckpointError for each violation of the format, with file, tensor, rule and value.
    """
    file = Path(path)
    raw, data_bytes = _read_raw(file)
    parsed = parse_json(raw, f"{file}: the header")
    header_bytes = 8 + len(raw)
    # MLX writes null if there is none.
    given = parsed.pop("__metadata__", None)
    metadata = _metadata(file, {} if given is None else given)
    tensors = {name: _tensor(file, name, entry, header_bytes) for name, entry in parsed.items()}
    _check_cover(file, tensors.values(), header_bytes, data_bytes)
    return Header(file, MappingProxyType(tensors), MappingProxyType(metadata), header_bytes)


def encode_header(
    tensors: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Encode the header of a file that holds `tensors`, each a (name, dtype, shape), in the given order.

    Returns the file's first bytes (length, JSON and blanks up to a multiple of 8), and for each name its (start_bytes,
    end_bytes) in the file. Raises CheckpointError for input that `read_header` would reject.
    """
    entries: dict[str, object] = {}
    if metadata:
        entries["__metadata__"] = _metadata(None, dict(metadata))
    offsets: dict[str, tuple[int, int]] = {}
    end = 0
    for name, dtype, shape in tensors:
        if name in entries or name == "__metadata__":
            rule = "is a reserved name" if name == "__metadata__" else "occurs twice; names must differ"
            raise CheckpointError(f"tensor {brief(name)} {rule}")
        _check_text(name, "a tensor's name")
        start, end = end, end + tensor_bytes(f"tensor {brief(name)}", dtype, shape)
        offsets[name] = (start, end)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"a header may have at most {MAX_HEADER_BYTES} bytes, but for {len(offsets)} tensors it has {len(raw)}: "
            "distribute them over more files"
        )
    head = len(raw).to_bytes(8, "little") + raw
    return head, {name: (len(head) + start, len(head) + end) for name, (start, end) in offsets.items()}


def tensor_bytes(where: str, dtype: object, shape: object) -> int:
    """The bytes of a tensor's data. Raises CheckpointError, beginning with `where`, if a file cannot hold it."""
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{where}: dtype must be one of {', '.join(DTYPE_BITS)}, but is {brief(dtype)}")
    if not isinstance(shape, (list, tuple)) or not all(type(size) is int and size >= 0 for size in shape):
        raise CheckpointError(f"{where}: shape must be a list of integers of at least 0, but is {brief(shape)}")
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size or 1  # a zero must not hide sizes that overflow elsewhere
        if bits > 2**63:
            raise CheckpointError(f"{where}: shape must come to less than 2**63 bits, but is {brief(shape)} of {dtype}")
    if 0 in shape:
        return 0
    if bits % 8:
        raise CheckpointError(
            f"{where}: data must be whole bytes, but shape {brief(shape)} of {dtype} comes to {bits} bits: pad a dim"
        )
    return bits // 8


def open_regular(file: Path) -> tuple[int, int]:
    """Open `file` for reading. Returns its descriptor and its size in bytes; raises CheckpointError if that fails."""
    try:
        # O_NONBLOCK: opening a named pipe would block forever. Regular files ignore it.
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be opened: {reason(error)}") from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise CheckpointError(f"{file}: must be a regular file, but is a directory, pipe or device")
    return fd, status.st_size


def read_bytes(fd: int, file: Path, start_bytes: int, size_bytes: int) -> bytes:
    """Read exactly `size_bytes` at `start_bytes`, or raise CheckpointError."""
    parts: list[bytes] = []
    while size_bytes:
        try:
            part = os.pread(fd, size_bytes, start_bytes)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read at byte {start_bytes}: {reason(error)}") from error
        if not part:
            raise CheckpointError(f"{file}: ends at byte {start_bytes}, {size_bytes} too early: it shrank while read")
        parts.append(part)
        start_bytes += len(part)
        size_bytes -= len(part)
    return b"".join(parts)


def parse_json(raw: bytes, where: str) -> dict[str, object]:
    """Parse one JSON object, or raise CheckpointError, beginning with `where`.

    Stricter than `json.loads`: keys are unique, NaN and Infinity are not allowed, integers have at most 64 bits.
    """
    if raw.count(b"[") + raw.count(b"{") > _MAX_BRACKETS:
        raise CheckpointError(f"{where} must hold at most {_MAX_BRACKETS} lists and objects, but has more; {_REFETCH}")
    try:
        parsed = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_int=_integer, parse_constant=_no_constant
        )
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{where} must be UTF-8, but its byte {error.start} is 0x{raw[error.start]:02x}: {_name_kind(raw)}"
        ) from error
    except RecursionError as error:
        raise CheckpointError(f"{where} is JSON nested too deep to read; {_REFETCH}") from error
    except ValueError as error:
        raise CheckpointError(f"{where} must be plain JSON: {error}: {_name_kind(raw)}") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{where} must be a JSON object, but is {brief(parsed)}; {_REFETCH}")
    return parsed


def reason(error: Exception) -> str:
    """The operating system's message, without the number and the path."""
    return getattr(error, "strerror", None) or str(error)


def _read_raw(file: Path) -> tuple[bytes, int]:
    """The header's JSON, and the number of bytes that follow it."""
    fd, file_bytes = open_regular(file)
    try:
        head = read_bytes(fd, file, 0, min(file_bytes, 64))
        if file_bytes < 8:
            raise CheckpointError(
                f"{file}: must begin with the 8 bytes of the header's length, but has {file_bytes} bytes; {_REFETCH}"
            )
        length = int.from_bytes(head[:8], "little")
        if length > MAX_HEADER_BYTES:
            rule = f"the header's length must be at most {MAX_HEADER_BYTES} bytes, but reads {length}"
        elif length > file_bytes - 8:
            rule = f"the header's length must fit the file, which has {file_bytes} bytes, but reads {length}"
        elif length == 0 or head[8:9] != b"{":
            rule = f"the header must begin with '{{', but begins with {brief(head[8 : 8 + min(length, 8)])}"
        else:
            return read_bytes(fd, file, 8, length), file_bytes - 8 - length
        raise CheckpointError(f"{file}: {rule}: {_name_kind(head)}")
    finally:
        os.close(fd)


def _name_kind(head: bytes) -> str:
    """The kind of file that `head` looks like if it is not safetensors, and the remedy."""
    return next((f"it looks like {kind}" for magic, kind in _MAGIC if head.startswith(magic)), _REFETCH)


def _tensor(file: Path, name: str, entry: object, header_bytes: int) -> TensorInfo:
    where = f"{file}: tensor {brief(name)}"
    _check_text(name, f"{file}: a tensor's name")
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where}: must be a JSON object, but is {brief(entry)}; {_REFETCH}")
    if entry.keys() != _ENTRY_KEYS:
        raise CheckpointError(
            f"{where}: must have the keys dtype, shape and data_offsets, but has {brief(sorted(entry))}; {_REFETCH}"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    size_bytes = tensor_bytes(where, dtype, shape)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise CheckpointError(
            f"{where}: data_offsets must be two integers of at least 0, but is {brief(offsets)}; {_REFETCH}"
        )
    start, end = offsets
    if start > end:
        raise CheckpointError(f"{where}: data_offsets must not decrease, but is {offsets}; {_REFETCH}")
    if end - start != size_bytes:
        raise CheckpointError(
            f"{where}: shape {brief(shape)} of {dtype} takes {size_bytes} bytes, but data_offsets {offsets} give it "
            f"{end - start}; {_REFETCH}"
        )
    return TensorInfo(file, name, dtype, tuple(shape), header_bytes + start, header_bytes + end)


def _check_cover(file: Path, tensors: Iterable[TensorInfo], header_bytes: int, data_bytes: int) -> None:
    """Check that the tensors are contiguous, from the end of the header to the end of the file."""
    in_order = sorted(tensors, key=lambda info: (info.start_bytes, info.end_bytes))
    end, before = header_bytes, "the header"
    file_bytes = header_bytes + data_bytes
    for info in in_order:
        here = f"tensor {brief(info.name)}"
        if info.end_bytes > file_bytes:
            raise CheckpointError(
                f"{file}: {here} must be inside the file, but ends at byte {info.end_bytes} of {file_bytes}: "
                "was the download or the save interrupted? Download it or write it again"
            )
        if info.start_bytes != end:
            rule = "overlap" if info.start_bytes < end else "leave a gap"
            raise CheckpointError(
                f"{file}: tensors must be contiguous, but {before}, which ends at byte {end}, and {here}, which "
                f"starts at byte {info.start_bytes}, {rule}; {_REFETCH}"
            )
        end, before = info.end_bytes, here
    if end != file_bytes:
        raise CheckpointError(
            f"{file}: the data must end with its last tensor, but {file_bytes - end} bytes follow {before}, which ends "
            f"at byte {end}; {_REFETCH}"
        )


def _metadata(file: Path | None, metadata: object) -> dict[str, str]:
    where = "__metadata__" if file is None else f"{file}: __metadata__"
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{where} must be a JSON object, but is {brief(metadata)}; {_REFETCH}")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise CheckpointError(f"{where} must map strings to strings, but {brief(key)} is {brief(value)}")
        _check_text(key, f"{where}: a key")
        _check_text(value, f"{where}: the value of {brief(key)}")
    return metadata


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{where} must be UTF-8, but is {brief(text)}: half of a surrogate pair") from error


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {brief(twice)} occurs twice")
    return unique


def _integer(digits: str) -> int | float:
    if digits == "-0":
        return -0.0  # minus zero is not an integer, and the safetensors library rejects it as one
    return int(digits) if len(digits) <= 20 else math.copysign(math.inf, 1 if digits[0] != "-" else -1)


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not a JSON number")
