"""A run's folder: what is there at any moment can be gone on from, and old checkpoints go only behind newer ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.checkpoint.find import find_model
from partita.checkpoint.manifest import MANIFEST_NAME, Manifest, digests
from partita.checkpoint.run_folder import RunFolder, is_run_folder
from partita.errors import CheckpointError


def publish(run: RunFolder, step: int, keep: int | None = None, text: str = "{}") -> Path:
    partial = run.partial(step)
    partial.mkdir(parents=True)
    (partial / "config.json").write_text(text)
    (partial / MANIFEST_NAME).write_text(Manifest(digests(partial, ["config.json"])).to_json())
    return run.publish(step, keep)


def test_keep(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    there = []
    for step in (10, 20, 30, 40):
        publish(run, step, keep=2)
        there.append(run.steps())
    assert there == [
        [10],
        [10, 20],
        [20, 30],
        [30, 40],
    ]  # fmt: skip
    assert sorted(os.listdir(tmp_path)) == ["config.json", "latest", "step-000030", "step-000040"]
    assert os.readlink(tmp_path / "latest") == "step-000040"


@settings(deadline=None)
@given(st.lists(st.integers(1, 10**7), unique=True, min_size=1, max_size=6), st.integers(1, 4))
def test_the_newest_stay_whatever_the_order(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], keep: int
) -> None:
    run = RunFolder(tmp_path_factory.mktemp("run"))
    for step in steps:
        publish(run, step, keep)
        # Steps behind the one that was just written are of an earlier attempt, and stay until they are reached.
        assert step in run.steps()
        assert len([one for one in run.steps() if one <= step]) <= keep
        assert run.newest() == run.step_folder(step)


def test_old_ones_stay_where_the_new_one_cannot_be_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    publish(run, 1, keep=1)

    def refuse(source: Path, target: Path) -> None:
        raise OSError(5, "Input/output error", str(target))

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(CheckpointError, match="step-000002: cannot be moved into place: Input/output error"):
        publish(run, 2, keep=1)
    assert run.steps() == [1]
    assert run.newest() == run.step_folder(1)


def test_a_step_that_is_done_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    publish(run, 5, text="{}")
    publish(run, 5, text='{"again": 1}')
    assert (run.newest() / "config.json").read_text() == '{"again": 1}'
    assert sorted(os.listdir(tmp_path)) == ["config.json", "latest", "step-000005"]


def test_what_a_killed_run_has_left_is_removed(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "new" / "run")
    run.begin()
    publish(run, 3)
    run.partial(4).mkdir()
    (run.path / ".step-000002.old").mkdir()
    (run.path / ".mine").mkdir()
    run.begin()
    assert sorted(os.listdir(run.path)) == [".mine", "config.json", "latest", "step-000003"]


def killed_before_the_link(run: RunFolder, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is in its place, and nothing behind that was done."""

    def kill(self: RunFolder, place: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "_point_to", kill)
        with pytest.raises(KeyboardInterrupt):
            publish(run, step)


def finish_at(run: RunFolder, step: int, seconds: float) -> None:
    """Let a checkpoint have been finished so long after its run's link was made."""
    at = (run.path / "latest").lstat().st_mtime + seconds
    os.utime(run.step_folder(step) / MANIFEST_NAME, (at, at))


def test_a_link_that_a_killed_run_has_left_behind_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path)
    publish(run, 3)
    killed_before_the_link(run, 6, monkeypatch)
    finish_at(run, 6, 60)
    assert run.newest() == run.step_folder(3)  # the older one, which is whole
    run.begin()
    assert run.newest() == run.step_folder(6)
    assert os.readlink(tmp_path / "latest") == "step-000006"


def test_a_run_that_was_killed_before_its_first_link_gets_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path)
    killed_before_the_link(run, 3, monkeypatch)
    assert run.newest() == run.step_folder(3)
    run.begin()
    assert os.readlink(tmp_path / "latest") == "step-000003"
    assert (tmp_path / "config.json").exists()


def test_what_is_not_whole_or_of_an_earlier_attempt_is_not_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    publish(run, 9)
    publish(run, 3)
    finish_at(run, 9, -60)
    killed_before_the_link(run, 6, monkeypatch)
    finish_at(run, 6, 60)
    (run.step_folder(6) / "config.json").unlink()
    run.begin()
    assert os.readlink(tmp_path / "latest") == "step-000003"


def test_without_a_link_the_last_is_the_newest(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    publish(run, 3)
    publish(run, 12)
    (tmp_path / "latest").unlink()
    assert run.newest() == run.step_folder(12)
    os.symlink("step-000099", tmp_path / "latest")
    assert run.newest() == run.step_folder(12)


def test_find_model_takes_the_newest(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    publish(run, 3)
    publish(run, 12)
    assert is_run_folder(tmp_path)
    assert find_model(tmp_path) == run.step_folder(12)
    assert find_model(tmp_path / "latest") == tmp_path / "latest"
    (run.step_folder(12) / "config.json").write_text("")
    with pytest.raises(CheckpointError, match=r"step-000012/config\.json: must have 2 bytes, but has 0"):
        find_model(tmp_path)


def test_a_folder_with_weights_is_a_model(tmp_path: Path) -> None:
    publish(RunFolder(tmp_path), 3)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert not is_run_folder(tmp_path)
    assert find_model(tmp_path) == tmp_path


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be created: (File exists|Not a directory)"):
        RunFolder(tmp_path / "file").begin()
    with pytest.raises(CheckpointError, match="cannot be created: Not a directory"):
        RunFolder(tmp_path / "file" / "run").begin()
