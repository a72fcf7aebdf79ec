"""Saving while training goes on: whole or not at all, the same on every rank, and what came before stays.

Ranks are threads here, with a share of one tensor each; the engines' own tests do it with processes.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from partita.checkpoint.index import MODEL, open_checkpoint
from partita.checkpoint.manifest import OPTIMIZER, check_contents, read_manifest
from partita.checkpoint.read import Reader
from partita.checkpoint.run_folder import RunFolder
from partita.checkpoint.write import FilePlan, plan_files
from partita.core.mesh import Mesh
from partita.errors import CheckpointError
from partita.ranks.groups import AxisGroups
from partita.training import TrainSettings
from partita.training.background import Job, Part
from partita.training.resume import newest_whole
from partita.training.saving import Saver, SaveReport, Saves
from partita.training.state import TrainingState
from tests.support.ranks import ROOT

ROWS, COLUMNS = 8, 3000
RUN = TrainingState.of(TrainSettings(steps=20), np.arange(50))


class One:
    """A communicator that is asked for its place."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    def all_gather_object(self, value: object) -> list[Any]:
        return [value] * self.size

    def barrier(self) -> None: ...


def groups_of(comm: Any = None) -> AxisGroups[Any]:
    comm = comm if comm is not None else One()
    return AxisGroups(Mesh(dp=comm.size), One(), One(), comm, One(), comm, One(), comm)


class Gathers:
    """An all-gather of threads."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=60)
        self.values: list[Any] = [None] * ranks

    def of(self, rank: int) -> Any:
        outer = self

        class Rank(One):
            def all_gather_object(self, value: object) -> list[Any]:
                outer.values[rank] = value
                outer.barrier.wait()
                told = list(outer.values)
                outer.barrier.wait()
                return told

        return Rank(rank, len(self.values))


class Rows:
    """Some rows of a tensor of weights and one of moments, whose values are the step's number."""

    beside: Mapping[str, bytes] = {"config.json": b"{}"}

    def __init__(self, rank: int, ranks: int) -> None:
        self.rows = (ROWS * rank // ranks, ROWS * (rank + 1) // ranks)
        self.value = 0.0
        self.files: dict[str, tuple[FilePlan, ...]] = {
            MODEL: plan_files([("w", "F32", (ROWS, COLUMNS))], 1 << 30),
            OPTIMIZER: plan_files([("exp_avg.w", "F32", (ROWS, COLUMNS))], 1 << 30, stem=OPTIMIZER),
        }
        self.parts: Callable[[list[Part]], list[Part]] = lambda parts: parts

    def copy(self) -> list[Part]:
        data = np.full((self.rows[1] - self.rows[0], COLUMNS), self.value, np.float32)
        ranges = [[self.rows], [(0, COLUMNS)]]
        return self.parts([Part(name, ranges, memoryview(data.tobytes())) for name in ("w", "exp_avg.w")])

    def counts(self, step: int) -> dict[str, int]:
        return {}


def on_ranks(ranks: int, work: Callable[[int, Any], Any]) -> list[Any]:
    """What `work(rank, comm)` returns or raises on each of so many threads."""
    gathers, ended = Gathers(ranks), [None] * ranks

    def one(rank: int) -> None:
        try:
            ended[rank] = work(rank, gathers.of(rank))
        except BaseException as error:
            ended[rank] = error  # type: ignore[call-overload]

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    return ended


def train(
    rank: int,
    ranks: int,
    comm: Any,
    saves: Saves,
    steps: int,
    spoil: Callable[[int, Rows], None] = lambda step, rows: None,
) -> list[SaveReport]:
    """A run whose weights are the number of the step."""
    rows, told = Rows(rank, ranks), []
    with Saver(saves, rows, RUN, groups_of(comm), on_save=told.append) as saver:
        for step in range(1, steps + 1):
            rows.value = step
            spoil(step, rows)
            saver.after(step)
            rows.value = -1.0
        rows.value = steps
        saver.finish(steps)
    return told


def values(folder: Path, stem: str = MODEL, name: str = "w") -> set[float]:
    checkpoint = open_checkpoint(folder, stem=stem)
    data = bytearray(ROWS * COLUMNS * 4)
    with Reader(checkpoint) as reader:
        reader.read(name, [[(0, ROWS)], [(0, COLUMNS)]], memoryview(data))
    return set(np.frombuffer(data, np.float32).tolist())


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_checkpoint_has_the_values_of_its_step(ranks: int, tmp_path: Path) -> None:
    told = on_ranks(ranks, lambda rank, comm: train(rank, ranks, comm, Saves(tmp_path, every=2, keep=2), 7))
    assert [[report.step for report in mine] for mine in told] == [[2, 4, 6, 7]] * ranks
    assert sum(report.bytes_written for mine in told for report in mine) == 4 * 2 * ROWS * COLUMNS * 4
    assert sorted(os.listdir(tmp_path)) == ["config.json", "latest", "step-000006", "step-000007"]
    for step in (6, 7):
        folder = tmp_path / f"step-{step:06d}"
        check_contents(folder, read_manifest(folder))
        assert set(read_manifest(folder).files) == {
            "model.safetensors", "optimizer.safetensors", "config.json", "training_state.json",
        }  # fmt: skip
        assert values(folder) == values(folder, OPTIMIZER, "exp_avg.w") == {step}


def test_the_last_step_alone(tmp_path: Path) -> None:
    on_ranks(1, lambda rank, comm: train(rank, 1, comm, Saves(tmp_path), 5))
    assert RunFolder(tmp_path).steps() == [5]


def test_training_goes_on_while_a_slow_disk_is_written(tmp_path: Path) -> None:
    """Steps are done between the copy and the end of its writing, and change nothing of what is written."""
    gate = threading.Event()
    rows = Rows(0, 1)
    rows.parts = lambda parts: Acting(parts, lambda: gate.wait(30))
    told: list[SaveReport] = []
    with Saver(Saves(tmp_path, every=1000), rows, RUN, groups_of(), on_save=told.append) as saver:
        rows.value = 1000.0
        saver.after(1000)
        for step in range(1001, 1101):
            rows.value = float(step)
            saver.after(step)
        assert not told
        assert RunFolder(tmp_path).steps() == []
        gate.set()
        saver.wait()
    assert [report.step for report in told] == [1000]
    assert values(tmp_path / "step-001000") == {1000.0}


class Acting(list[Part]):
    """Parts of which the taking of each is preceded by an act."""

    def __init__(self, parts: list[Part], act: Callable[[], object]) -> None:
        super().__init__(parts)
        self.act = act

    def pop(self, *args: Any) -> Part:
        self.act()
        return super().pop(*args)


def failing(ranks: int, where: int, folder: Path, spoil: Callable[[Path, Rows], None]) -> list[str]:
    """What each rank says when the save of step 4 of a run fails on rank `where`; that of step 2 is whole."""

    def spoiled(rank: int) -> Callable[[int, Rows], None]:
        def at(step: int, rows: Rows) -> None:
            if step == 4 and rank == where:
                rows.parts = lambda parts: Acting(parts, lambda: spoil(*folder.glob(".step-000004.*.partial"), rows))

        return at

    ended = on_ranks(ranks, lambda rank, comm: train(rank, ranks, comm, Saves(folder, every=2), 400, spoiled(rank)))
    assert [type(error) for error in ended] == [CheckpointError] * ranks
    return [str(error) for error in ended]


def remove(partial: Path, rows: Rows) -> None:
    (partial / "model.safetensors").unlink(missing_ok=True)


def cut_short(partial: Path, rows: Rows) -> None:
    os.truncate(partial / "model.safetensors", 100)


def fail(partial: Path, rows: Rows) -> None:
    raise OSError(28, "No space left on device")


SPOILED: dict[str, tuple[Callable[[Path, Rows], None], str]] = {
    "removed": (remove, r"step-000004\.[0-9a-f]{8}\.partial/model\.safetensors: cannot be opened"),
    "cut short": (
        cut_short,
        r"step-000004\.[0-9a-f]{8}\.partial/model\.safetensors: must have the plan's \d+ bytes, but has 100",
    ),
    "disk full": (fail, "No space left on device"),
}


@pytest.mark.parametrize("what", SPOILED)
@pytest.mark.parametrize(("ranks", "where"), [(1, 0), (2, 1), (3, 2)])
def test_what_fails_on_one_rank_is_told_on_all_and_what_was_before_stays(
    what: str, ranks: int, where: int, tmp_path: Path
) -> None:
    spoil, said = SPOILED[what]
    errors = failing(ranks, where, tmp_path, spoil)
    assert len(set(errors)) == 1
    assert "the checkpoint of step 4 could not be written: " in errors[0]
    assert errors[0].endswith("; step-000002, from before, is unchanged.")
    with pytest.raises(CheckpointError, match=said):
        raise CheckpointError(errors[0])
    assert newest_whole(tmp_path) == tmp_path / "step-000002"
    assert values(tmp_path / "step-000002") == {2.0}
    assert sorted(os.listdir(tmp_path)) == ["config.json", "latest", "step-000002"]


def test_data_that_changes_while_it_is_written_makes_no_checkpoint(tmp_path: Path) -> None:
    """A file that grows behind the writer's back: its size is not the plan's."""

    def grow(partial: Path, rows: Rows) -> None:
        with (partial / "model.safetensors").open("ab") as file:
            file.write(b"more")

    # The writer begins with the weights: it has their file open when it takes the second part.
    acts = iter([lambda partial, rows: None, grow])
    errors = failing(1, 0, tmp_path, lambda partial, rows: next(acts)(partial, rows))
    assert "model.safetensors: was changed while it was written" in errors[0]


def test_each_rank_begins_at_another_place_of_the_files(tmp_path: Path) -> None:
    """In the order in which they lie there: of two ranks that write one file each waits for the other in every call."""
    plan = plan_files([(name, "U8", (4,)) for name in "abcdef"], 8)
    taken = []
    for rank in range(3):
        parts = [Part(name, [[(0, 4)]], memoryview(bytes(4))) for name in "fbdace"]
        job = Job(RunFolder(tmp_path), 1, None, rank, 3, {MODEL: plan}, parts, {})
        job._order(list(plan))
        taken.append("".join(job.parts.pop().name for _ in range(6)))
    assert taken == [
        "abcdef",
        "cdefab",
        "efabcd",
    ]  # fmt: skip


@contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_small_files_are_those_that_were_written(tmp_path: Path) -> None:
    """A config that is changed behind the writer's back."""
    errors = failing(1, 0, tmp_path, lambda partial, rows: os.truncate(partial / "config.json", 1))
    assert "config.json: was changed while it was written" in errors[0]


def test_no_room_for_the_files(tmp_path: Path) -> None:
    """What the system refuses: a limit stands in for a full disk."""
    with files_of_at_most(20_000), pytest.raises(CheckpointError) as raised:
        train(0, 1, None, Saves(tmp_path, every=1), 400)
    assert "model.safetensors: cannot be created: File too large; there was none before." in str(raised.value)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_told_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "run"
    ended = on_ranks(2, lambda rank, comm: train(rank, 2, comm, Saves(place, every=1), 3))
    assert len({str(error) for error in ended}) == 1
    assert str(ended[0]) == f"{place}: cannot be created: Not a directory"


def test_a_run_does_not_begin_in_the_folder_of_another(tmp_path: Path) -> None:
    train(0, 1, None, Saves(tmp_path), 3)
    with pytest.raises(CheckpointError, match=r"already holds a run \(its last checkpoint is of step 3\)\. Resume it"):
        train(0, 1, None, Saves(tmp_path), 3)
    with Saver(Saves(tmp_path, every=1), Rows(0, 1), RUN.at(3), groups_of()) as saver:
        saver.after(4)
        saver.wait()
    assert RunFolder(tmp_path).steps() == [3, 4]


def test_a_rank_that_is_lost_leaves_no_thread_behind(tmp_path: Path) -> None:
    """One of two ranks never comes: the other ends its writing when it leaves."""
    rows = Rows(0, 2)
    before = threading.active_count()
    gathers = Gathers(2)
    gathers.barrier.abort()

    with (
        pytest.raises(threading.BrokenBarrierError),
        Saver(Saves(tmp_path, every=1), rows, RUN, groups_of(One(0, 2))) as saver,
    ):
        train_on(saver, gathers)
    assert threading.active_count() == before
    assert os.listdir(tmp_path) == []


def train_on(saver: Saver, gathers: Gathers) -> None:
    saver.after(1)
    gathers.of(0).all_gather_object(None)


def test_at_most_one_save_at_a_time(tmp_path: Path) -> None:
    busy, most = 0, 0
    lock = threading.Lock()

    def slowly() -> None:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        time.sleep(0.02)
        with lock:
            busy -= 1

    def slow(step: int, rows: Rows) -> None:
        rows.parts = lambda parts: Acting(parts, slowly)

    told = train(0, 1, None, Saves(tmp_path, every=1), 4, slow)
    assert most == 1
    assert [report.step for report in told] == [1, 2, 3, 4]
    # A step that comes too early waits for the save before it, which is charged with it.
    assert all(report.held_s > 0.01 for report in told)


# --- going on -----------------------------------------------------------------------------------------------------------


def test_the_newest_whole_one_is_found_by_all_ranks_together(tmp_path: Path) -> None:
    train(0, 1, None, Saves(tmp_path, every=1), 4)
    (tmp_path / "step-000004" / "training_state.json").unlink()
    with (tmp_path / "step-000003" / "optimizer.safetensors").open("r+b") as file:
        file.seek(5000)
        file.write(b"\xff")
    for ranks in (1, 2, 3):
        said: list[list[str]] = [[] for _ in range(ranks)]

        def find(rank: int, comm: Any, ranks: int = ranks, said: list[list[str]] = said) -> Path:
            axes = [comm] if ranks > 1 else []
            return newest_whole(tmp_path, axes, rank, ranks, on_broken=said[rank].append)

        assert on_ranks(ranks, find) == [tmp_path / "step-000002"] * ranks
        assert said == [said[0]] * ranks
        assert [text.split(": ")[0].rpartition("/step-")[2] for text in said[0]] == [
            "000004", "000003/optimizer.safetensors",
        ]  # fmt: skip
    assert newest_whole(tmp_path, verify=False) == tmp_path / "step-000003"


def test_no_whole_one_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no complete checkpoint to resume from\. Start without"):
        newest_whole(tmp_path)
    train(0, 1, None, Saves(tmp_path), 1)
    (tmp_path / "step-000001" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"to resume from \(.*has no manifest\.json"):
        newest_whole(tmp_path)


FOREVER = """
import sys
from pathlib import Path
from partita.checkpoint.run_folder import RunFolder
from partita.training.resume import newest_whole
from partita.training.saving import Saver, Saves
from tests.checkpoint.test_saving import RUN, Rows, groups_of
folder = Path(sys.argv[1])
first = int(newest_whole(folder).name[5:]) if RunFolder(folder).steps() else 0
rows = Rows(0, 1)
with Saver(Saves(folder, every=1, keep=2), rows, RUN.at(first), groups_of()) as saver:
    print("begun", flush=True)
    for step in range(first + 1, 1_000_000):
        rows.value = step
        saver.after(step)
"""


@pytest.mark.fresh
def test_whenever_a_run_is_killed_it_can_go_on(tmp_path: Path) -> None:
    """A run that does nothing but save is killed, and goes on, again and again."""
    before = 0
    for kill in range(6):
        process = subprocess.Popen([sys.executable, "-c", FOREVER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"begun\n"
            time.sleep(0.05 + 0.037 * kill)
            process.kill()
        steps = RunFolder(tmp_path).steps()
        if steps:  # before the first is whole there may be none
            found = newest_whole(tmp_path)
            assert values(found) == {float(int(found.name[5:]))}
            assert steps[-1] >= before
            before = steps[-1]
    assert before > 5


@pytest.mark.parametrize("name", ["every", "keep"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True])
def test_saves_are_checked(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{name} must be a whole number of at least 1, or None"):
        Saves(tmp_path, **{name: value})
