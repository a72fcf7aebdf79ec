"""A folder appears whole or not at all, and a small file is the old one or the new one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from partita.checkpoint.durable import appear, partial_of, start_partial, write_whole
from partita.checkpoint.index import open_checkpoint
from partita.checkpoint.write import create_files, plan_files, write_index
from partita.errors import CheckpointError


def listing(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_new_folder_appears_in_one_rename(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "model"
    partial = start_partial(place)
    assert partial == partial_of(place)
    (partial / "config.json").write_text("{}")
    assert not place.exists()
    appear(partial, place)
    assert listing(place) == ["config.json"]
    assert listing(place.parent) == ["model"]


def test_what_is_there_stays_and_weights_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    partial = start_partial(tmp_path)
    plan = plan_files([("a", "U8", [4]), ("b", "U8", [4])], 4)
    create_files(partial, plan)
    write_index(partial, plan)
    (partial / "config.json").write_text("{}")
    moved = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moved.append(Path(b).name), replace(a, b)))
    appear(partial, tmp_path)
    assert moved == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert listing(tmp_path) == sorted([*moved, "notes.txt"])
    assert set(open_checkpoint(tmp_path).tensors) == {"a", "b"}


def test_a_move_that_is_cut_off_is_never_read_as_a_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = start_partial(tmp_path)
    plan = plan_files([("a", "U8", [4]), ("b", "U8", [4])], 4)
    create_files(partial, plan)
    write_index(partial, plan)
    replace = os.replace

    def cut_off(source: Path, target: Path) -> None:
        if "00002-of" in target.name:
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", cut_off)
    with pytest.raises(CheckpointError, match="cannot be moved into place: No space left on device"):
        appear(partial, tmp_path)
    with pytest.raises(CheckpointError, match="finish the download or the copy"):
        open_checkpoint(tmp_path)


def test_what_an_earlier_attempt_left_is_removed(tmp_path: Path) -> None:
    place = tmp_path / "model"
    (start_partial(place) / "old").write_text("old")
    assert listing(start_partial(place)) == []


def test_a_place_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"\.model\.partial: cannot be created: Not a directory"):
        start_partial(tmp_path / "file" / "model")


def test_a_small_file_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "state"
    write_whole(file, b"old")

    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fail)
        with pytest.raises(CheckpointError, match="state: cannot be written: Input/output error"):
            write_whole(file, b"new")
    assert file.read_bytes() == b"old"
    write_whole(file, b"new")
    assert file.read_bytes() == b"new"
    assert listing(tmp_path) == ["state"]
