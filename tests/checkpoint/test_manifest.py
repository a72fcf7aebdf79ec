"""A manifest tells a whole checkpoint from one that is cut short, changed or missing files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita.checkpoint.manifest import (
    MANIFEST_NAME,
    Digest,
    Manifest,
    check_contents,
    check_sizes,
    deal,
    digest,
    digests,
    read_manifest,
)
from partita.errors import CheckpointError

FILES = {"model.safetensors": b"weights" * 1000, "config.json": b"{}", "empty": b""}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    manifest = Manifest(digests(tmp_path, FILES))
    (tmp_path / MANIFEST_NAME).write_text(manifest.to_json())
    return tmp_path


def test_digests_are_sha_256(folder: Path) -> None:
    for name, data in FILES.items():
        assert digest(folder / name) == Digest(len(data), hashlib.sha256(data).hexdigest())


def test_more_than_a_chunk_is_read(tmp_path: Path) -> None:
    data = bytes(range(256)) * 40_000
    (tmp_path / "long").write_bytes(data)
    assert digest(tmp_path / "long") == Digest(len(data), hashlib.sha256(data).hexdigest())


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_characters="./\0"), min_size=1),
        st.builds(Digest, st.integers(0, 2**60), st.text("0123456789abcdef", min_size=64, max_size=64)),
    )
)
def test_a_manifest_reads_back(tmp_path_factory: pytest.TempPathFactory, files: dict[str, Digest]) -> None:
    folder = tmp_path_factory.mktemp("made")
    (folder / MANIFEST_NAME).write_text(Manifest(files).to_json(), encoding="utf-8")
    assert dict(read_manifest(folder).files) == files


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", ".", "", "a\0b"])
def test_what_is_outside_of_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text(Manifest({name: Digest(1, "0" * 64)}).to_json(), encoding="utf-8")
    with pytest.raises(CheckpointError, match="must name files in its own folder, but names"):
        read_manifest(tmp_path)


def test_a_whole_one_passes_whoever_reads_which_share(folder: Path) -> None:
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    for parts in (1, 2, 5):
        for part in range(parts):
            check_contents(folder, manifest, part, parts)


BROKEN: dict[str, tuple[Callable[[Path], object], bool, str]] = {
    # what was done to it; whether sizes tell; what is said
    "cut short": (lambda f: (f / "model.safetensors").write_bytes(b"w"), True, r"model\.safetensors: must have 7000 bytes"),
    "gone": (lambda f: (f / "config.json").unlink(), True, r"config\.json: is in the manifest, but cannot be found"),
    "changed": (
        lambda f: (f / "model.safetensors").write_bytes(b"weightz" * 1000), False,
        r"model\.safetensors: must have the SHA-256 .* it was changed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_not_whole_is_named(folder: Path, what: str) -> None:
    spoil, sizes_tell, said = BROKEN[what]
    manifest = read_manifest(folder)
    spoil(folder)
    with pytest.raises(CheckpointError, match=said):
        check_contents(folder, manifest)
    if sizes_tell:
        with pytest.raises(CheckpointError, match=said):
            check_sizes(folder, manifest)
    else:
        check_sizes(folder, manifest)


def test_one_of_the_readers_finds_what_is_changed(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"[]")
    manifest = read_manifest(folder)
    found = []
    for part in range(3):
        try:
            check_contents(folder, manifest, part, 3)
        except CheckpointError as error:
            found.append(str(error))
    assert len(found) == 1
    assert "config.json" in found[0]


def test_files_are_dealt_out_by_their_size() -> None:
    sizes = {"a": 7, "b": 6, "c": 5, "d": 4, "e": 1}
    assert [deal(sizes, parts) for parts in (1, 2, 3, 6)] == [
        [["a", "b", "c", "d", "e"]],
        [["a", "d", "e"], ["b", "c"]],
        [["a"], ["b", "e"], ["c", "d"]],
        [["a"], ["b"], ["c"], ["d"], ["e"], []],
    ]  # fmt: skip


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 1000)), st.integers(1, 9))
def test_every_file_is_dealt_to_one_and_none_has_much_more(sizes: dict[str, int], parts: int) -> None:
    dealt = deal(sizes, parts)
    assert sorted(name for mine in dealt for name in mine) == sorted(sizes)
    assert deal(dict(reversed(sizes.items())), parts) == dealt
    loads = [sum(sizes[name] for name in mine) for mine in dealt]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "the manifest"),
        ("{}", "must be a manifest with `partita_manifest: 1`"),
        (json.dumps({"partita_manifest": 2, "files": {}}), "must be a manifest"),
        (json.dumps({"partita_manifest": 1, "files": {"a": {"size": "1", "sha256": "x"}}}), "'a' must have a size"),
        (json.dumps({"partita_manifest": 1, "files": {"a": 7}}), "'a' must have a size and a sha256, but has 7"),
    ],
)
def test_what_is_no_manifest(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=said):
        read_manifest(tmp_path)


def test_none_is_no_whole_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no manifest\.json, so it is not a complete checkpoint"):
        read_manifest(tmp_path)
