"""What ranks write together is the unsplit model: the safetensors library loads it, and so do we."""

import contextlib
import errno
import json
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from partita.checkpoint.header import DTYPE_BITS
from partita.checkpoint.index import INDEX_NAME, open_checkpoint
from partita.checkpoint.read import Reader
from partita.checkpoint.write import FilePlan, Writer, create_files, index_json, plan_files, write_index
from partita.errors import CheckpointError

NUMPY = {
    "F64": "float64", "F32": "float32", "F16": "float16", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
}  # fmt: skip


def names(plan: tuple[FilePlan, ...]) -> list[tuple[str, str]]:
    return [(file.name, " ".join(file.tensors)) for file in plan]


def test_plan_one_file() -> None:
    plan = plan_files([("b", "F32", (2,)), ("a", "F32", [2])], 16)
    assert names(plan) == [("model.safetensors", "b a")]
    assert plan[0].size_bytes == len(plan[0].header) + 16


def test_plan_shards_in_order() -> None:
    tensors = [(name, "U8", [size]) for name, size in zip("abcdefg", (4, 4, 1, 20, 1, 0, 9), strict=True)]
    assert names(plan_files(tensors, 9)) == [
        ("model-00001-of-00004.safetensors", "a b c"),
        ("model-00002-of-00004.safetensors", "d"),
        ("model-00003-of-00004.safetensors", "e f"),
        ("model-00004-of-00004.safetensors", "g"),
    ]
    assert plan_files(tensors, 9) == plan_files(iter(tensors), 9)


def test_plan_aligns() -> None:
    """Each tensor begins at a multiple of its element's size, also for the library, which needs that to map them."""
    plan = plan_files(
        [("flag", "BOOL", [3]), ("w", "F64", [1]), ("h", "BF16", [1]), ("s", "F32", []), ("q", "F4", [2])], 99
    )
    assert " ".join(plan[0].tensors) == "w s h flag q"
    assert all(info.start_bytes * 8 % info.itemsize_bits == 0 for info in plan[0].tensors.values())


def test_index_as_hugging_face_writes_it(tmp_path: Path) -> None:
    plan = plan_files([("b", "F32", [2]), ("é", "F32", [2]), ("a", "F32", [2])], 16)
    assert index_json(plan) == (
        "{\n"
        '  "metadata": {\n'
        '    "total_size": 24\n'
        "  },\n"
        '  "weight_map": {\n'
        '    "a": "model-00002-of-00002.safetensors",\n'
        '    "b": "model-00001-of-00002.safetensors",\n'
        '    "\\u00e9": "model-00001-of-00002.safetensors"\n'
        "  }\n"
        "}\n"
    )
    write_index(tmp_path, plan)
    assert (tmp_path / INDEX_NAME).read_text() == index_json(plan)


def test_one_file_has_no_index(tmp_path: Path) -> None:
    write_index(tmp_path, plan_files([("a", "F32", [2])], 100))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("tensors", "max_shard_bytes", "says"),
    [
        ([("a", "U8", [1])], 0, "max_shard_bytes must be above 0, but is 0"),
        ([("a", "U8", [1]), ("b", "U8", [1]), ("a", "U8", [1])], 1, "tensor 'a' occurs twice"),
        ([("a", "float32", [1])], 9, "tensor 'a': dtype must be one of"),
        ([("a", "U8", [1.0])], 9, "tensor 'a': shape must be a list of integers"),
        ([("__metadata__", "U8", [1])], 9, "'__metadata__' is a reserved name"),
    ],
)
def test_plan_refuses(tensors: list[tuple[str, str, list[int]]], max_shard_bytes: int, says: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        plan_files(tensors, max_shard_bytes)
    assert says in str(caught.value)


def whole(shape: tuple[int, ...]) -> list[list[tuple[int, int]]]:
    return [[(0, size)] for size in shape]


def save(folder: Path, arrays: dict[str, npt.NDArray[np.generic]], max_shard_bytes: int) -> tuple[FilePlan, ...]:
    kinds = {name: dtype for dtype, name in NUMPY.items()}
    plan = plan_files([(name, kinds[array.dtype.name], array.shape) for name, array in arrays.items()], max_shard_bytes)
    create_files(folder, plan)
    with Writer(folder, plan) as writer:
        for name, array in arrays.items():
            writer.write(name, whole(array.shape), memoryview(array.tobytes()))
    write_index(folder, plan)
    return plan


@pytest.mark.parametrize("max_shard_bytes", [1, 100, 10**6])
def test_the_library_loads_every_dtype(tmp_path: Path, max_shard_bytes: int) -> None:
    arrays = {dtype: (np.arange(12).reshape(3, 4) % 2).astype(name) for dtype, name in NUMPY.items()}
    arrays |= {"scalar": np.array(7, np.int16), "empty": np.zeros((0, 3), np.float64)}
    plan = save(tmp_path / "new", arrays, max_shard_bytes)
    checkpoint = open_checkpoint(tmp_path / "new")
    assert len(checkpoint.files) == len(plan)
    theirs = {
        name: array
        for file in plan
        for name, array in safetensors.numpy.load_file(tmp_path / "new" / file.name).items()
    }
    assert theirs.keys() == arrays.keys() == checkpoint.tensors.keys()
    with Reader(checkpoint) as reader:
        for name, array in arrays.items():
            np.testing.assert_array_equal(theirs[name], array, strict=True)
            out = bytearray(array.nbytes)
            reader.read(name, whole(array.shape), memoryview(out))
            assert out == array.tobytes()
    with safetensors.safe_open(tmp_path / "new" / plan[0].name, "np") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_the_librarys_file_byte_for_byte(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(5, np.int8)}
    save(tmp_path, arrays, 10**6)
    assert (tmp_path / "model.safetensors").read_bytes() == safetensors.numpy.save(arrays, {"format": "pt"})


def test_two_ranks_write_one_file(tmp_path: Path) -> None:
    array = np.arange(16 * 6, dtype=np.int16).reshape(16, 6)
    plan = plan_files([("qkv", "I16", array.shape), ("o", "I16", array.shape)], 10**6)
    create_files(tmp_path, plan)
    for rank in range(2):
        rows = [(4 * rank, 4 * rank + 4), (8 + 2 * rank, 10 + 2 * rank), (12 + 2 * rank, 14 + 2 * rank)]
        columns = [(3 * rank, 3 * rank + 3)]
        with Writer(tmp_path, plan) as writer:
            mine = np.concatenate([array[start:stop] for start, stop in rows])
            writer.write("qkv", [rows, [(0, 6)]], memoryview(mine))
            writer.write("o", [[(0, 16)], columns], memoryview(np.ascontiguousarray(array[:, slice(*columns[0])])))
            assert writer.bytes_written == array.nbytes
    theirs = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(theirs["qkv"], array)
    np.testing.assert_array_equal(theirs["o"], array)


SIZES = st.lists(st.integers(0, 5), max_size=3)


@st.composite
def pieces(draw: st.DrawFn) -> tuple[str, tuple[int, ...], list[list[tuple[int, int]]]]:
    """A dtype, a shape, and ranges along each dim: any number of them, in any order, empty and repeated ones too."""
    shape = tuple(draw(SIZES))
    bound = [st.integers(0, size) for size in shape]
    ranges = [draw(st.lists(st.tuples(one, one).map(lambda pair: (min(pair), max(pair))), max_size=3)) for one in bound]
    return draw(st.sampled_from([name for name, bits in DTYPE_BITS.items() if bits % 8 == 0])), shape, ranges


@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.lists(pieces(), min_size=1, max_size=3), max_shard_bytes=st.integers(1, 200), seed=st.integers(0, 99))
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    drawn: list[tuple[str, tuple[int, ...], list[list[tuple[int, int]]]]],
    max_shard_bytes: int,
    seed: int,
) -> None:
    """Write tensors whole, overwrite pieces of them, read pieces and all: numpy's indexing says what must come."""
    folder = tmp_path_factory.mktemp("round")
    random = np.random.default_rng(seed)
    plan = plan_files([(f"w{i}", dtype, shape) for i, (dtype, shape, _) in enumerate(drawn)], max_shard_bytes)
    create_files(folder, plan)
    write_index(folder, plan)
    with Writer(folder, plan) as writer, Reader(open_checkpoint(folder)) as reader:
        for i, (dtype, shape, ranges) in enumerate(drawn):
            item = DTYPE_BITS[dtype] // 8
            array = random.integers(0, 255, (*shape, item), np.uint8)
            writer.write(f"w{i}", whole(shape), memoryview(array.reshape(-1)))
            at = np.ix_(*([n for start, stop in one for n in range(start, stop)] for one in ranges), np.arange(item))
            piece = array[at]
            out = np.empty_like(piece)
            reader.read(f"w{i}", ranges, memoryview(out.reshape(-1)))
            np.testing.assert_array_equal(out, piece)
            # The inverse; where ranges repeat an element, its copies hold the same value.
            array[...] = random.integers(0, 255, array.shape, np.uint8)
            writer.write(f"w{i}", ranges, memoryview(np.ascontiguousarray(array[at]).reshape(-1)))
            now = np.empty_like(array)
            reader.read(f"w{i}", whole(shape), memoryview(now.reshape(-1)))
            np.testing.assert_array_equal(now[at], array[at])
        assert writer.bytes_written == reader.bytes_read
    for file in plan:
        safetensors.deserialize((folder / file.name).read_bytes())


def test_create_makes_room_and_no_holes(tmp_path: Path) -> None:
    plan = plan_files([("a", "U8", [1 << 20])], 10**9)
    create_files(tmp_path / "deep" / "folder", plan)
    made = os.stat(tmp_path / "deep" / "folder" / "model.safetensors")
    assert made.st_size == plan[0].size_bytes
    if hasattr(os, "posix_fallocate"):
        assert made.st_blocks * 512 >= 1 << 20


def test_room_without_fallocate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, start: int, size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    plan = plan_files([("a", "U8", [100])], 10**9)
    create_files(tmp_path, plan)
    assert (tmp_path / "model.safetensors").stat().st_size == plan[0].size_bytes


def test_disk_full_at_creation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: cannot be created: No space left on device"
    ) as caught:
        create_files(tmp_path, plan_files([("a", "U8", [1])], 10**9))
    assert isinstance(caught.value.__cause__, OSError)
    assert os.listdir(tmp_path) == []


def test_disk_full_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_files([("a", "U8", [9])], 10**9)
    create_files(tmp_path, plan)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Writer(tmp_path, plan) as writer:
        writer.write("a", [[(0, 9)]], memoryview(bytes(9)))
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(CheckpointError, match="tensor 'a': cannot be written: No space left on device"):
                writer.write("a", [[(0, 9)]], memoryview(bytes(9)))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be flushed: No space left"):
                writer.finish()
            with pytest.raises(CheckpointError, match="cannot be written: No space left"):
                write_index(tmp_path, plan_files([("a", "U8", [9]), ("b", "U8", [9])], 9))


def test_short_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:3], at))
    save(tmp_path, {"a": np.arange(50, dtype=np.int16)}, 10**9)
    np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / "model.safetensors")["a"], np.arange(50))


@pytest.mark.parametrize("old", ["model.safetensors", "other.safetensors", INDEX_NAME])
def test_never_mixes_with_old_weights(tmp_path: Path, old: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / old).write_text("old")
    with pytest.raises(CheckpointError, match="must hold no weights before a save"):
        create_files(tmp_path, plan_files([("a", "U8", [1])], 10**9))
    assert (tmp_path / old).read_text() == "old"


def test_folder_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be created: File exists"):
        create_files(tmp_path / "file", plan_files([("a", "U8", [1])], 10**9))


def test_writer_refuses(tmp_path: Path) -> None:
    plan = plan_files([("a", "F32", [4, 2])], 10**9)
    cells = [[(0, 4)], [(0, 2)]]
    with Writer(tmp_path, plan) as writer:
        with pytest.raises(CheckpointError, match="one rank must call create_files first"):
            writer.write("a", cells, memoryview(bytes(32)))
        create_files(tmp_path, plan_files([("a", "F32", [4, 4])], 10**9))
        with pytest.raises(CheckpointError, match="every rank must use the plan of create_files"):
            writer.write("a", cells, memoryview(bytes(32)))
        (tmp_path / "model.safetensors").unlink()
        create_files(tmp_path, plan)
        for name, ranges, data, says in [
            ("b", cells, bytes(32), "tensor 'b' is not in this plan, which has 1 tensors: \\['a'\\]"),
            (
                "a",
                cells[:1],
                bytes(32),
                "tensor 'a' of shape \\(4, 2\\): there must be ranges for 2 dims, but there are 1",
            ),
            ("a", [[(0, 5)], [(0, 2)]], bytes(40), "a range of dim 0 must be within 0 to 4, but is \\(0, 5\\)"),
            ("a", cells, bytes(31), "data must be 32 bytes in C order, but has 31"),
        ]:
            with pytest.raises(CheckpointError, match=says):
                writer.write(name, ranges, memoryview(data))
        assert writer.bytes_written == 0


def test_leaving_on_an_error_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_files([("a", "U8", [4])], 10**9)
    create_files(tmp_path, plan)
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    with contextlib.suppress(KeyError), Writer(tmp_path, plan) as writer:
        writer.write("a", [[(0, 4)]], memoryview(bytes(4)))
        raise KeyError
    assert synced == []
    with Writer(tmp_path, plan) as writer:
        writer.write("a", [[(0, 4)]], memoryview(bytes(4)))
    assert len(synced) == 1


def test_index_matches_weight_map(tmp_path: Path) -> None:
    plan = save(tmp_path, {f"w{i}": np.full(3, i, np.float32) for i in range(12)}, 25)
    written = json.loads((tmp_path / INDEX_NAME).read_text())["weight_map"]
    assert written == {name: file.name for file in plan for name in file.tensors}
    assert list(written) == sorted(written)
