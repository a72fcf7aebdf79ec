"""Every rule of the format, broken once each; and the safetensors library as the judge of what we accept and write."""

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from partita.checkpoint.header import DTYPE_BITS, MAX_HEADER_BYTES, TensorInfo, encode_header, read_header
from partita.errors import CheckpointError

U8 = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
FOUR = bytes(4)


def file_of(header: object, data: bytes = FOUR, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def one(**changes: object) -> bytes:
    return file_of({"w": {**U8, **changes}})


def raw_one(**texts: str) -> bytes:
    """One entry whose values are JSON text, so that they may be no JSON."""
    parts = {"dtype": '"U8"', "shape": "[4]", "data_offsets": "[0, 4]", **texts}
    return file_of(("{" + f'"w": {{{", ".join(f"{json.dumps(k)}: {v}" for k, v in parts.items())}}}' + "}").encode())


def two(first: list[int], second: list[int], data: bytes) -> bytes:
    entries = {
        "b": {"dtype": "U8", "shape": [second[1] - second[0]], "data_offsets": second},
        "a": {"dtype": "U8", "shape": [first[1] - first[0]], "data_offsets": first},
    }
    return file_of(entries, data)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 988097824\n"

MALFORMED = {
    # the length and the first bytes
    "empty file": (b"", "has 0 bytes"),
    "seven bytes": (b"\1" * 7, "must begin with the 8 bytes of the header's length, but has 7 bytes"),
    "length only": (bytes(8), "must begin with '{', but begins with b''"),
    "length of nothing": (file_of(b"", length=0), "must begin with '{'"),
    "length beyond the file": (file_of({"w": U8}, length=1000), "must fit the file, which has"),
    "length one beyond": (file_of(b"{}", b"", length=3), "has 10 bytes, but reads 3"),
    "length beyond the limit": (file_of(b"{}", length=MAX_HEADER_BYTES + 1), f"at most {MAX_HEADER_BYTES} bytes"),
    "length of 2**64-1": (file_of(b"{}", length=2**64 - 1), f"but reads {2**64 - 1}"),
    "leading blank": (file_of(b" {}", b""), "must begin with '{', but begins with b' {}'"),
    "byte order mark": (file_of(b"\xef\xbb\xbf{}", b""), "must begin with '{'"),
    "an array": (file_of(b"[]", b""), "must begin with '{', but begins with b'[]'"),
    # other files by this name
    "zip": (b"PK\x03\x04\x14\x00\x00\x00" + bytes(99), "looks like a zip archive, as torch.save writes: pickled"),
    "pickle 2": (pickle.dumps({"w": [1.5] * 9}, 2), "looks like a pickle: pickled weights can run code"),
    "pickle 4": (pickle.dumps({"w": [1.5] * 9}, 4), "looks like a pickle"),
    "pickle 5": (pickle.dumps({"w": [1.5] * 9}, 5), "not read; `partita convert` makes safetensors"),
    "git-lfs pointer": (LFS_POINTER, "looks like a git-lfs pointer, not the weights: run `git lfs pull`"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(99), "looks like a GGUF file"),
    "html": (b"<!DOCTYPE html><html></html>", "looks like a web page"),
    "npy": (b"\x93NUMPY\x01\x00v\x00", "looks like a numpy array"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(range(1, 9)), "looks like a gzip"),
    # JSON
    "bad UTF-8": (file_of(b'{"\xff": 1}'), "must be UTF-8, but its byte 2 is 0xff"),
    "not JSON": (file_of(b"{w: 1}"), "must be plain JSON: Expecting property name"),
    "unterminated": (file_of(b'{"w": {'), "must be plain JSON"),
    "two objects": (file_of(b"{}{}"), "must be plain JSON: Extra data"),
    "NUL padding": (file_of(b"{}\0\0"), "must be plain JSON: Extra data"),
    "trailing comma": (file_of(b"{,}"), "must be plain JSON"),
    "duplicate tensor": (file_of(b'{"w": {}, "w": {}}'), "the key 'w' occurs twice"),
    "duplicate escaped": (file_of(b'{"w": {}, "\\u0077": {}}'), "the key 'w' occurs twice"),
    "duplicate in entry": (file_of(b'{"w": {"dtype": "U8", "dtype": "U8"}}'), "the key 'dtype' occurs twice"),
    "duplicate in metadata": (file_of(b'{"__metadata__": {"a": "", "a": ""}}'), "the key 'a' occurs twice"),
    "NaN": (raw_one(shape="[NaN]"), "NaN is not a JSON number"),
    "Infinity": (raw_one(data_offsets="[0, -Infinity]"), "-Infinity is not a JSON number"),
    "deep lists": (raw_one(shape="[" * 200_000 + "]" * 200_000), "nested too deep"),
    "deep objects": (file_of(b'{"a":' * 200_000), "nested too deep"),
    "control character": (file_of(b'{"a\nb": {}}'), "must be plain JSON: Invalid control character"),
    "half a surrogate": (file_of(b'{"\\ud800": {}}'), "half of a surrogate pair"),
    # entries
    "entry of null": (file_of({"w": None}), "tensor 'w': must be a JSON object, but is None"),
    "entry a list": (file_of({"w": []}), "tensor 'w': must be a JSON object, but is []"),
    "entry without dtype": (
        file_of({"w": {"shape": [4], "data_offsets": [0, 4]}}),
        "but has ['data_offsets', 'shape']",
    ),
    "entry without anything": (file_of({"w": {}}), "must have the keys dtype, shape and data_offsets, but has []"),
    "unknown key": (one(strides=[1]), "but has ['data_offsets', 'dtype', 'shape', 'strides']"),
    "unknown dtype": (one(dtype="F128"), "dtype must be one of F4, F6_E2M3"),
    "torch's dtype": (one(dtype="float32"), "but is 'float32'"),
    "dtype in lower case": (one(dtype="u8"), "but is 'u8'"),
    "dtype a list": (one(dtype=["U8"]), "but is ['U8']"),
    "shape a number": (one(shape=4), "shape must be a list of integers of at least 0, but is 4"),
    "shape null": (one(shape=None), "shape must be a list of integers"),
    "shape of a bool": (one(shape=[True, 4]), "but is [True, 4]"),
    "shape of floats": (one(shape=[4.0]), "but is [4.0]"),
    "shape of strings": (one(shape=["4"]), "but is ['4']"),
    "shape negative": (one(shape=[-4]), "but is [-4]"),
    "shape minus zero": (raw_one(shape="[-0]", data_offsets="[0, 0]"), "but is [-0.0]"),
    "shape of huge digits": (raw_one(shape="[" + "9" * 100_000 + "]"), "but is [inf]"),
    "shape nested": (one(shape=[[4]]), "but is [[4]]"),
    "shape overflows": (one(shape=[2**62, 4]), "shape must come to less than 2**63 bits"),
    "shape wraps to its size": (one(shape=[2**63, 2, 4, 2**60 + 1]), "shape must come to less than 2**63 bits"),
    "shape overflows to zero": (one(shape=[0, 2**40, 2**40], data_offsets=[0, 0]), "less than 2**63 bits"),
    "sub-byte remainder": (one(dtype="F4", shape=[7]), "whole bytes, but shape [7] of F4 comes to 28 bits"),
    "offsets null": (one(data_offsets=None), "data_offsets must be two integers of at least 0, but is None"),
    "one offset": (one(data_offsets=[0]), "but is [0]"),
    "three offsets": (one(data_offsets=[0, 4, 4]), "but is [0, 4, 4]"),
    "offset bool": (one(data_offsets=[False, 4]), "but is [False, 4]"),
    "offset float": (one(data_offsets=[0.0, 4]), "but is [0.0, 4]"),
    "offset negative": (one(data_offsets=[-4, 0]), "but is [-4, 0]"),
    "offsets reversed": (one(data_offsets=[4, 0]), "data_offsets must not decrease, but is [4, 0]"),
    "size too small": (one(dtype="F32"), "shape [4] of F32 takes 16 bytes, but data_offsets [0, 4] give it 4"),
    "size too large": (one(shape=[3]), "shape [3] of U8 takes 3 bytes, but data_offsets [0, 4] give it 4"),
    "scalar of no bytes": (one(shape=[], data_offsets=[0, 0]), "shape [] of U8 takes 1 bytes"),
    # the data
    "beyond the file": (one(shape=[5], data_offsets=[0, 5]), "must be inside the file, but ends at byte"),
    "cut short": (file_of({"w": U8}, bytes(3)), "was the download or the save interrupted?"),
    "far beyond the file": (one(shape=[2**50], data_offsets=[0, 2**50]), "must be inside the file"),
    "overlap": (two([0, 4], [2, 6], bytes(6)), "but tensor 'a', which ends at byte"),
    "same bytes": (two([0, 4], [0, 4], bytes(4)), "overlap"),
    "one in the other": (two([0, 4], [1, 3], bytes(4)), "overlap"),
    "empty in the other": (two([0, 4], [2, 2], bytes(4)), "overlap"),
    "hole": (two([0, 4], [6, 8], bytes(8)), "tensor 'b', which starts at byte"),
    "hole before": (one(data_offsets=[1, 5]) + b"\0", "but the header, which ends at byte"),
    "trailing bytes": (file_of({"w": U8}, bytes(9)), "but 5 bytes follow tensor 'w'"),
    "data of no tensor": (file_of({}, bytes(3)), "but 3 bytes follow the header"),
    # metadata
    "metadata a string": (file_of({"__metadata__": "pt"}, b""), "__metadata__ must be a JSON object, but is 'pt'"),
    "metadata of a number": (file_of({"__metadata__": {"a": 1}}, b""), "map strings to strings, but 'a' is 1"),
    "metadata nested": (file_of({"__metadata__": {"a": {}}}, b""), "map strings to strings, but 'a' is {}"),
    "metadata a tensor": (file_of({"__metadata__": U8}), "but 'shape' is [4]"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed(tmp_path: Path, kind: str) -> None:
    content, says = MALFORMED[kind]
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"{file}: ")
    assert len(str(caught.value)) < len(str(file)) + 600


def test_errors_stay_short(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(file_of({"n" * 100_000: {**U8, "shape": ["x" * 100_000] * 50}}))
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    assert len(str(caught.value)) < len(str(file)) + 2000


def test_lists_by_the_million_are_not_built(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(raw_one(shape="[" + "[]," * 4_000_001 + "[]]"))
    with pytest.raises(CheckpointError, match="must hold at most 4000000 lists and objects"):
        read_header(file)


def test_torch_zip(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"never loaded")
    with pytest.raises(CheckpointError, match="zip archive"):
        read_header(file)


def test_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (tmp_path / "pipe.safetensors", tmp_path, "/dev/zero"):
        with pytest.raises(CheckpointError, match="must be a regular file"):
            read_header(path)
    for path in (tmp_path / "none", "a\0b", tmp_path / ("n" * 300)):
        with pytest.raises(CheckpointError, match="cannot be opened"):
            read_header(path)


def test_only_the_header_is_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    head, offsets = encode_header([("w", "F64", [2**37])])  # a terabyte
    with open(file, "wb") as opened:
        opened.write(head)
        opened.truncate(offsets["w"][1])
    info = read_header(file).tensors["w"]
    assert (info.nbytes, info.itemsize_bits, info.start_bytes) == (2**40, 64, len(head))


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    arrays = {f"层.{np.dtype(code)}": np.arange(6).reshape(2, 3).astype(code) for code in "dfeqihbQIHB?F"}
    arrays |= {"scalar": np.array(2.5), "empty": np.zeros((3, 0, 2), np.float32)}
    safetensors.numpy.save_file(arrays, file, {"format": "np", "ключ": "значение"})
    header = read_header(str(file))
    assert header.metadata == {"format": "np", "ключ": "значение"}
    assert header.tensors.keys() == arrays.keys()
    content = file.read_bytes()
    for name, array in arrays.items():
        info = header.tensors[name]
        assert info.shape == array.shape
        assert info.itemsize_bits == array.itemsize * 8
        assert content[info.start_bytes : info.end_bytes] == array.tobytes()
    with pytest.raises(TypeError):
        header.tensors["w"] = info  # type: ignore[index]


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_is_the_librarys(tmp_path: Path, dtype: str) -> None:
    head, offsets = encode_header([("w", dtype, (2, 4))])
    size_bytes = DTYPE_BITS[dtype]
    assert offsets == {"w": (len(head), len(head) + size_bytes)}
    content = head + bytes(size_bytes)
    [(name, loaded)] = safetensors.deserialize(content)
    assert (name, loaded["dtype"], loaded["shape"]) == ("w", dtype, [2, 4])
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    assert read_header(file).tensors["w"] == TensorInfo(file, "w", dtype, (2, 4), *offsets["w"])


def test_encodes_as_the_library_byte_for_byte() -> None:
    arrays = {"a": np.ones((2, 3), np.float32), 'b\n"é\u2028': np.ones(5, np.float32), "c": np.float32(1)}
    head, _ = encode_header([(name, "F32", array.shape) for name, array in arrays.items()], {"format": "pt"})
    expected = safetensors.numpy.save({k: np.asarray(v) for k, v in arrays.items()}, {"format": "pt"})
    assert len(head) % 8 == 0
    assert head == expected[: len(head)]


@pytest.mark.parametrize(
    ("tensors", "metadata", "says"),
    [
        ([("w", "F32", [1]), ("w", "F32", [1])], {}, "tensor 'w' occurs twice"),
        ([("__metadata__", "F32", [1])], {}, "tensor '__metadata__' is a reserved name"),
        ([("w", "F33", [1])], {}, "tensor 'w': dtype must be one of"),
        ([("w", "F32", [-1])], {}, "tensor 'w': shape must be a list of integers"),
        ([("w", "F4", [3])], {}, "tensor 'w': data must be whole bytes"),
        ([("w\ud800", "F32", [1])], {}, "half of a surrogate pair"),
        ([], {"a": 1}, "must map strings to strings"),
        ([], {"a": "\udfff"}, "__metadata__: the value of 'a' must be UTF-8"),
        ([], {"a": "x" * MAX_HEADER_BYTES}, "a header may have at most"),
    ],
)
def test_encode_refuses(tensors: list[tuple[str, str, list[int]]], metadata: dict[str, str], says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        encode_header(tensors, metadata)
    assert says in str(caught.value)


def sample() -> bytes:
    arrays = {"a": np.arange(4, dtype=np.float32), "b": np.arange(6, dtype=np.int16), "c": np.zeros((2, 0), np.int8)}
    return safetensors.numpy.save(arrays, {"format": "np"})


def judge(file: Path, content: bytes) -> None:
    """A value or CheckpointError; and what we accept, the library accepts too, and understands the same."""
    file.write_bytes(content)
    try:
        header = read_header(file)
    except CheckpointError:
        return
    theirs = dict(safetensors.deserialize(content))
    assert theirs.keys() == header.tensors.keys()
    for name, info in header.tensors.items():
        assert (theirs[name]["dtype"], tuple(theirs[name]["shape"])) == (info.dtype, info.shape)
        assert bytes(theirs[name]["data"]) == content[info.start_bytes : info.end_bytes]


@settings(deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
    cut=st.tuples(st.integers(0, 400), st.integers(0, 400)),
    cuts=st.booleans(),
)
def test_mutated_bytes(tmp_path: Path, changes: list[tuple[int, int]], cut: tuple[int, int], cuts: bool) -> None:
    content = bytearray(sample())
    for at, value in changes:
        content[at % len(content)] = value
    judge(tmp_path / "model.safetensors", bytes(content[: cut[0]] + content[cut[1] :] if cuts else content))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from([*DTYPE_BITS]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NUMBER = st.integers(0, 12)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPE_BITS]) | JSON,
        "shape": st.lists(NUMBER, max_size=2) | JSON,
        "data_offsets": st.tuples(NUMBER, NUMBER) | JSON,
    }
)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entries=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), ENTRY | JSON, max_size=3),
    data=st.binary(max_size=12),
)
def test_any_json(tmp_path: Path, entries: dict[str, object], data: bytes) -> None:
    judge(tmp_path / "model.safetensors", file_of(entries, data))


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=64), length=st.none() | st.integers(0, 70))
def test_any_bytes(tmp_path: Path, content: bytes, length: int | None) -> None:
    judge(tmp_path / "model.safetensors", file_of(content, b"", length) if length is not None else content)


def test_the_package_needs_no_framework() -> None:
    code = (
        "import sys, partita.checkpoint.write; "
        "print([m for m in ('torch', 'mlx', 'numpy', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
