"""Folders as Hugging Face writes them, and each way in which one can be wrong."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from partita.checkpoint.index import INDEX_NAME, open_checkpoint
from partita.errors import CheckpointError

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def save(folder: Path, name: str, *tensors: str) -> None:
    safetensors.numpy.save_file({tensor: np.zeros(2, np.float32) for tensor in tensors}, folder / name)


def index(folder: Path, weight_map: object, **more: object) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({**more, "weight_map": weight_map}))


def shards(folder: Path, **weight_map: object) -> None:
    """Two good shards, a and b in the first and c in the second, and their index, changed by `weight_map`."""
    save(folder, ONE, "a", "b")
    save(folder, TWO, "c")
    merged: dict[str, object] = {"a": ONE, "b": ONE, "c": TWO, **weight_map}
    index(folder, {name: file for name, file in merged.items() if file is not None})


def test_one_file(tmp_path: Path) -> None:
    save(tmp_path, "model.safetensors", "a", "b")
    for path in (tmp_path, tmp_path / "model.safetensors", str(tmp_path)):
        checkpoint = open_checkpoint(path)
        assert checkpoint.folder == tmp_path
        assert [header.file.name for header in checkpoint.files] == ["model.safetensors"]
        assert set(checkpoint.tensors) == {"a", "b"}
        assert checkpoint.tensors["a"].file == tmp_path / "model.safetensors"


def test_index_decides(tmp_path: Path) -> None:
    shards(tmp_path)
    save(tmp_path, "model-old.safetensors", "old")
    save(tmp_path, "consolidated.safetensors", "other")
    checkpoint = open_checkpoint(tmp_path)
    assert {name: info.file.name for name, info in checkpoint.tensors.items()} == {"a": ONE, "b": ONE, "c": TWO}
    with pytest.raises(TypeError):
        checkpoint.tensors["d"] = checkpoint.tensors["a"]  # type: ignore[index]


def test_one_shard_alone(tmp_path: Path) -> None:
    shards(tmp_path)
    assert set(open_checkpoint(tmp_path / TWO).tensors) == {"c"}


def test_wrong_total_size_is_ignored(tmp_path: Path) -> None:
    shards(tmp_path)
    index(tmp_path, {"a": ONE, "b": ONE, "c": TWO}, metadata={"total_size": 1.5, "note": [None]})
    assert len(open_checkpoint(tmp_path).tensors) == 3


def test_without_an_index(tmp_path: Path) -> None:
    save(tmp_path, "weights.safetensors", "a")
    save(tmp_path, "._weights.safetensors", "macOS leaves such files")
    assert set(open_checkpoint(tmp_path).tensors) == {"a"}
    save(tmp_path, "more.safetensors", "b")
    assert set(open_checkpoint(tmp_path).tensors) == {"a", "b"}
    save(tmp_path, "model.safetensors", "m")
    assert set(open_checkpoint(tmp_path).tensors) == {"m"}


def test_shards_without_an_index(tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / INDEX_NAME).unlink()
    assert set(open_checkpoint(tmp_path).tensors) == {"a", "b", "c"}


def test_hub_cache(tmp_path: Path) -> None:
    """A snapshot holds symlinks to ../../blobs, the index among them."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    shards(snapshot)
    for number, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(f"../../blobs/{number}")
    assert set(open_checkpoint(snapshot).tensors) == {"a", "b", "c"}
    (blobs / "1").unlink()
    with pytest.raises(CheckpointError, match="1 are missing"):
        open_checkpoint(snapshot)


Make = Callable[[Path], None]


def text(content: str) -> Make:
    return lambda folder: (folder / INDEX_NAME).write_text(content) and None


def touch(*names: str) -> Make:
    def make(folder: Path) -> None:
        for name in names:
            (folder / name).write_bytes(b"\x80\x02}q\x00.")

    return make


def files(**tensors: str) -> Make:
    """Files by stem, each with tensors named by one letter."""

    def make(folder: Path) -> None:
        for stem, names in tensors.items():
            save(folder, f"{stem.replace('_', '-')}.safetensors", *names)

    return make


def changed(**weight_map: object) -> Make:
    return lambda folder: shards(folder, **weight_map)


def both(folder: Path) -> None:
    shards(folder)
    save(folder, TWO, "c", "a")


def outside(folder: Path) -> None:
    save(folder.parent, "outside.safetensors", "d")
    shards(folder, d="../outside.safetensors")


def absolute(folder: Path) -> None:
    save(folder, "inside.safetensors", "d")
    shards(folder, d=str(folder / "inside.safetensors"))


def damaged(folder: Path) -> None:
    shards(folder)
    (folder / TWO).write_bytes((folder / TWO).read_bytes()[:-1])


def large(folder: Path) -> None:
    with open(folder / INDEX_NAME, "wb") as opened:
        opened.truncate(100_000_001)


WRONG: Mapping[str, tuple[Make, str]] = {
    "empty folder": (touch(), f"must hold a {INDEX_NAME} or *.safetensors files"),
    "other files": (touch("config.json"), "but holds neither"),
    "pytorch_model.bin": (touch("pytorch_model.bin"), "but ['pytorch_model.bin'] is not: pickled weights can run code"),
    "model.pth": (touch("model.pth", "a.txt"), "but ['model.pth'] is not"),
    "pickle by our name": (touch("model.safetensors"), "header"),
    "index not JSON": (text("{weight_map}"), "the index must be plain JSON"),
    "index empty": (text(""), "the index must be plain JSON"),
    "index an LFS pointer": (text("version https://git-lfs.github.com/spec/v1\n"), "looks like a git-lfs pointer"),
    "index a list": (text("[]"), "the index must be a JSON object, but is []"),
    "index nested": (text('{"weight_map":' * 100_000), "nested too deep"),
    "index with a key twice": (text('{"weight_map": {"a": "x", "a": "y"}}'), "the key 'a' occurs twice"),
    "index a folder": (lambda folder: (folder / INDEX_NAME).mkdir(), "must be a regular file"),
    "index too large": (large, "must have at most 100000000 bytes, but has 100000001"),
    "no weight_map": (text("{}"), "weight_map must map tensors to files, but is None"),
    "weight_map a list": (text('{"weight_map": ["a"]}'), "but is ['a']"),
    "weight_map empty": (text('{"weight_map": {}}'), "but is {}"),
    "file a number": (changed(d=1), "tensor 'd' must be in a file of this folder, named without a path"),
    "file null": (text('{"weight_map": {"d": null}}'), "but weight_map says None"),
    "file empty": (changed(d=""), "but weight_map says ''"),
    "file is the folder": (changed(d="."), "but weight_map says '.'"),
    "file above": (changed(d=".."), "but weight_map says '..'"),
    "file outside": (outside, "but weight_map says '../outside.safetensors'"),
    "file absolute": (absolute, "named without a path, but weight_map says '/"),
    "file in a folder": (changed(d="x/../../y.safetensors"), "but weight_map says 'x/"),
    "file of Windows": (changed(d="..\\y.safetensors"), "named without a path"),
    "file with NUL": (changed(d="y\0.safetensors"), "named without a path"),
    "file pickled": (changed(d="pytorch_model.bin"), "but ['pytorch_model.bin'] is not: pickled"),
    "file not there": (
        changed(d="model-3.safetensors"),
        "1 are missing: ['model-3.safetensors']: finish the download",
    ),
    "file of half a surrogate": (changed(d="\ud800"), "1 are missing"),
    "tensor not in its file": (changed(d=TWO), f"tensor 'd' must be in '{TWO}', but that file does not hold it"),
    "tensor in another file": (changed(a=TWO), f"tensor 'a' must be in '{TWO}', but is in {ONE}"),
    "tensor not listed": (changed(b=None), f"must list every tensor of its files, but {ONE} also holds ['b']"),
    "tensor in two files": (both, f"each tensor must be in one file, but 'a' is in {ONE} and in {TWO}"),
    "shard cut short": (damaged, "tensor 'c' must be inside the file"),
    "no index, a tensor twice": (files(x="ab", y="bc"), "but 'b' is in x.safetensors and in y.safetensors"),
    "no index, first shard missing": (
        files(m_00002_of_00002="a"),
        "m-*-of-2 must be 2 files, numbered from 1, but only [2]",
    ),
    "no index, last shard missing": (files(m_1_of_3="a", m_2_of_3="b"), "but only [1, 2] are there"),
    "no index, shard zero": (files(m_0_of_2="a", m_1_of_2="b"), "but only [0, 1] are there"),
    "no index, of two counts": (files(m_1_of_2="a", m_2_of_3="b"), "m-*-of-2 must be 2 files"),
    "no index, of a billion": (files(m_1_of_999999999="a"), "must be 999999999 files"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong(tmp_path: Path, kind: str) -> None:
    make, says = WRONG[kind]
    folder = tmp_path / "model"
    folder.mkdir()
    make(folder)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    assert says in str(caught.value)
    assert str(caught.value).startswith(str(folder))


def test_wrong_path(tmp_path: Path) -> None:
    touch("pytorch_model.bin")(tmp_path)
    with pytest.raises(CheckpointError, match="pickled weights"):
        open_checkpoint(tmp_path / "pytorch_model.bin")
    for path in (tmp_path / "none", "a\0b"):
        with pytest.raises(CheckpointError, match="does not exist: give a model's folder"):
            open_checkpoint(path)
