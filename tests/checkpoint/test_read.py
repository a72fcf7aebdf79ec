"""Pieces of tensors: against numpy's slices, and against what the system says was read."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy

from partita.checkpoint import read
from partita.checkpoint.header import TensorInfo, encode_header, read_header
from partita.checkpoint.index import Checkpoint, open_checkpoint
from partita.checkpoint.read import Reader, byte_runs, read_box
from partita.errors import CheckpointError

Array = npt.NDArray[np.float32]


@pytest.fixture
def cube(tmp_path: Path) -> tuple[Array, Checkpoint]:
    array = np.arange(4 * 6 * 8, dtype=np.float32).reshape(4, 6, 8)
    safetensors.numpy.save_file(
        {"w": array, "s": np.array(3, np.float32), "a": np.zeros(9, np.uint8)}, tmp_path / "m.safetensors"
    )
    return array, open_checkpoint(tmp_path / "m.safetensors")


def info(shape: tuple[int, ...], dtype: str = "F32") -> TensorInfo:
    head, offsets = encode_header([("w", dtype, shape)])
    start, end = offsets["w"]
    return TensorInfo(Path("m.safetensors"), "w", dtype, shape, start - len(head), end - len(head))


def test_box(cube: tuple[Array, Checkpoint]) -> None:
    array, checkpoint = cube
    tensor = checkpoint.tensors["w"]
    fd = os.open(tensor.file, os.O_RDONLY)
    try:
        out = np.empty((2, 6, 3), np.float32)
        assert read_box(fd, tensor, ((1, 3), (0, 6), (5, 8)), memoryview(out)) == 2 * 6 * 3 * 4
    finally:
        os.close(fd)
    np.testing.assert_array_equal(out, array[1:3, :, 5:8])


@pytest.mark.parametrize(
    ("ranges", "runs"),
    [
        # whole dims at the end merge, ranges that touch join
        ([[(0, 4)], [(0, 6)], [(0, 8)]], [(0, 768)]),
        ([[(1, 3)], [(0, 6)], [(0, 8)]], [(192, 384)]),
        ([[(0, 1), (1, 4)], [(0, 3), (3, 3), (3, 6)], [(0, 8)]], [(0, 768)]),
        ([[(0, 1), (3, 4)], [(0, 6)], [(0, 8)]], [(0, 192), (576, 192)]),
        ([[(0, 2)], [(2, 4)], [(0, 8)]], [(64, 64), (256, 64)]),
        ([[(1, 2)], [(1, 3)], [(0, 2), (6, 8)]], [(224, 8), (248, 8), (256, 8), (280, 8)]),
        # in the order asked, again where asked again
        ([[(3, 4), (0, 1), (3, 4)], [(0, 6)], [(0, 8)]], [(576, 192), (0, 192), (576, 192)]),
        ([[(0, 4)], [(2, 2)], [(0, 8)]], []),
        ([[], [(0, 6)], [(0, 8)]], []),
    ],
)
def test_runs(ranges: list[list[tuple[int, int]]], runs: list[tuple[int, int]]) -> None:
    found = byte_runs(info((4, 6, 8)), ranges)
    assert list(found) == runs
    assert found.size_bytes == sum(size for _, size in runs)
    if runs:
        first, last = min(start for start, _ in runs), max(start + size for start, size in runs)
        assert found.span() == (first, last - first)


def test_fused_qkv(tmp_path: Path) -> None:
    """Four query heads and two of key and value each, of two rows; rank 1 of 2 has the second half of each segment."""
    qkv = np.arange(16 * 3, dtype=np.int16).reshape(16, 3)
    safetensors.numpy.save_file({"qkv": qkv}, tmp_path / "model.safetensors")
    out = np.empty((8, 3), np.int16)
    with Reader(open_checkpoint(tmp_path)) as reader:
        reader.read("qkv", [[(4, 8), (10, 12), (14, 16)], [(0, 3)]], memoryview(out))
        assert reader.bytes_read == out.nbytes
    np.testing.assert_array_equal(out, qkv[[4, 5, 6, 7, 10, 11, 14, 15]])


def test_scalar_and_nothing(cube: tuple[Array, Checkpoint]) -> None:
    _, checkpoint = cube
    out = np.empty((), np.float32)
    with Reader(checkpoint) as reader:
        reader.read("s", [], memoryview(out))
        reader.read("w", [[(0, 4)], [(3, 3)], [(0, 8)]], memoryview(bytearray()))
        reader.read("w", [[(0, 4)], [(3, 3)], [(0, 8)]], memoryview(np.empty((4, 0, 8), np.float32)))
    assert out == 3
    assert reader.bytes_read == 4


def test_parts_of_one_call(cube: tuple[Array, Checkpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs beyond what one call may take are cut; calls that come back short go on."""
    array, checkpoint = cube
    whole = [[(0, 4)], [(0, 6)], [(0, 8)]]
    monkeypatch.setattr(read, "_MAX_CALL_BYTES", 100)
    assert [size for _, size in byte_runs(checkpoint.tensors["w"], whole)] == [100] * 7 + [68]
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, [views[0][:7]], at))
    out = np.empty_like(array)
    with Reader(checkpoint) as reader:
        reader.read("w", whole, memoryview(out))
    np.testing.assert_array_equal(out, array)


WHOLE = [[(0, 4)], [(0, 6)], [(0, 8)]]


@pytest.mark.parametrize(
    ("name", "ranges", "size_bytes", "says"),
    [
        ("v", WHOLE, 768, "tensor 'v' is not in this checkpoint, which holds 3 tensors: ["),
        ("w", WHOLE[:2], 768, "there must be ranges for 3 dims, but there are 2"),
        ("w", [[(0, 5)], *WHOLE[1:]], 960, "a range of dim 0 must be within 0 to 4, but is (0, 5)"),
        ("w", [[(-1, 4)], *WHOLE[1:]], 960, "but is (-1, 4)"),
        ("w", [*WHOLE[:2], [(0, 2), (4, 3)]], 96, "a range of dim 2 must be within 0 to 8, but is (4, 3)"),
        ("w", WHOLE, 767, "out must be 768 bytes in C order, but has 767"),
        ("w", WHOLE, 769, "but has 769"),
    ],
)
def test_refuses(
    cube: tuple[Array, Checkpoint], name: str, ranges: list[list[tuple[int, int]]], size_bytes: int, says: str
) -> None:
    _, checkpoint = cube
    with Reader(checkpoint) as reader, pytest.raises(CheckpointError) as caught:
        reader.read(name, ranges, memoryview(bytearray(size_bytes)))
    assert says in str(caught.value)
    assert f"tensor '{name}'" in str(caught.value)
    assert reader.bytes_read == 0


def test_refuses_memory(cube: tuple[Array, Checkpoint]) -> None:
    array, checkpoint = cube
    with Reader(checkpoint) as reader:
        for memory, says in [
            (memoryview(bytes(768)), "out must be writable memory, but is read-only"),
            (memoryview(bytearray(1536))[::2], "in C order, but has 768 in another order"),
            (memoryview(array.T), "in C order, but has 768 in another order"),
        ]:
            with pytest.raises(CheckpointError, match=says):
                reader.read("w", WHOLE, memory)


@pytest.mark.parametrize(
    ("dtype", "shape", "ranges", "runs"),
    [
        ("F4", (3, 4), [[(1, 3)], [(0, 4)]], [(2, 4)]),
        ("F4", (2, 8), [[(0, 2)], [(2, 6)]], [(1, 2), (5, 2)]),
        ("F4", (2, 3), [[(0, 2)], [(0, 3)]], [(0, 3)]),
        ("F4", (2, 3), [[(0, 1)], [(0, 3)]], None),
        ("F4", (2, 8), [[(0, 2)], [(1, 5)]], None),
        ("F4", (2, 8), [[(0, 2)], [(0, 3)]], None),
        ("F4", (4, 3), [[(0, 4)], [(0, 2)]], None),
        ("F6_E2M3", (2, 8), [[(0, 2)], [(4, 8)]], [(3, 3), (9, 3)]),
        ("F6_E3M2", (2, 8), [[(0, 2)], [(0, 2)]], None),
        ("F8_E4M3", (2, 3), [[(0, 2)], [(1, 2)]], [(1, 1), (4, 1)]),
    ],
)
def test_sub_byte(
    dtype: str, shape: tuple[int, ...], ranges: list[list[tuple[int, int]]], runs: list[tuple[int, int]] | None
) -> None:
    if runs is None:
        with pytest.raises(
            CheckpointError, match=f"tensor 'w': {dtype} has . bits an element, so it must be split between"
        ):
            byte_runs(info(shape, dtype), ranges)
    else:
        assert list(byte_runs(info(shape, dtype), ranges)) == runs


def test_cut_short_since(cube: tuple[Array, Checkpoint]) -> None:
    _, checkpoint = cube
    os.truncate(checkpoint.files[0].file, checkpoint.tensors["w"].start_bytes + 100)
    with (
        Reader(checkpoint) as reader,
        pytest.raises(CheckpointError, match=r"tensor 'w': the file must reach byte .* truncated"),
    ):
        reader.read("w", WHOLE, memoryview(bytearray(768)))


def test_gone_since(cube: tuple[Array, Checkpoint]) -> None:
    _, checkpoint = cube
    checkpoint.files[0].file.unlink()
    with Reader(checkpoint) as reader, pytest.raises(CheckpointError, match="cannot be opened: No such file"):
        reader.read("w", WHOLE, memoryview(bytearray(768)))


def test_system_error(cube: tuple[Array, Checkpoint]) -> None:
    _, checkpoint = cube
    fd = os.open(checkpoint.files[0].file, os.O_WRONLY)
    try:
        with pytest.raises(CheckpointError, match="tensor 's': cannot be read: Bad file descriptor") as caught:
            read_box(fd, checkpoint.tensors["s"], (), memoryview(bytearray(4)))
        assert isinstance(caught.value.__cause__, OSError)
    finally:
        os.close(fd)


def test_opens_once_and_closes(cube: tuple[Array, Checkpoint]) -> None:
    _, checkpoint = cube

    def opened() -> int:
        fds = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
        return sum(os.path.realpath(fd) == os.path.realpath(checkpoint.files[0].file) for fd in fds)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc")
    with Reader(checkpoint) as reader:
        assert opened() == 0
        for _ in range(3):
            reader.read("s", [], memoryview(bytearray(4)))
            assert opened() == 1
    assert opened() == 0


def rchar() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(not os.access("/proc/self/io", os.R_OK), reason="the system does not count reads")
@pytest.mark.parametrize(
    "ranges", [[[(0, 512)], [(0, 256)]], [[(128, 256)], [(0, 256)]], [[(0, 512)], [(7, 71), (200, 256)]]]
)
def test_reads_only_its_bytes(tmp_path: Path, ranges: list[list[tuple[int, int]]]) -> None:
    safetensors.numpy.save_file({"w": np.zeros((512, 256), np.float32)}, tmp_path / "model.safetensors")
    size_bytes = 4 * int(np.prod([sum(stop - start for start, stop in one) for one in ranges]))
    out = memoryview(bytearray(size_bytes))
    with Reader(open_checkpoint(tmp_path)) as reader:
        idle = rchar()
        idle = rchar() - idle  # what the measurement itself reads
        before = rchar()
        reader.read("w", ranges, out)
        seen = rchar() - before - idle
    assert reader.bytes_read == size_bytes
    assert size_bytes - 8 <= seen <= 1.02 * size_bytes  # the count's own text may be a few digits longer


def test_threads(tmp_path: Path) -> None:
    arrays = {f"w{i}": np.random.default_rng(i).integers(0, 255, (64, 64), np.uint8) for i in range(8)}
    for name, array in arrays.items():
        safetensors.numpy.save_file({name: array}, tmp_path / f"{name}.safetensors")

    with Reader(open_checkpoint(tmp_path)) as reader:

        def check(job: int) -> None:
            name, column = f"w{job % 8}", job % 63
            out = np.empty((64, 2), np.uint8)
            reader.read(name, [[(0, 64)], [(column, column + 2)]], memoryview(out))
            np.testing.assert_array_equal(out, arrays[name][:, column : column + 2])

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(check, range(200)))
        assert reader.bytes_read == 200 * 128


def test_library_and_header_agree_on_a_read(cube: tuple[Array, Checkpoint]) -> None:
    array, checkpoint = cube
    assert read_header(checkpoint.files[0].file).tensors == checkpoint.tensors
    theirs = safetensors.numpy.load_file(checkpoint.files[0].file)
    np.testing.assert_array_equal(theirs["w"], array)
