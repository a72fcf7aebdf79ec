"""What is written through windows are the bytes that calls would have written, and nothing beside them."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.checkpoint import mapped_writes
from partita.checkpoint.header import TensorInfo
from partita.checkpoint.mapped_writes import has_windows, is_short, write_runs
from partita.checkpoint.read import Range, byte_runs
from partita.checkpoint.write import Writer, create_files, plan_files

START = 4099
"""Where the tensor begins: at no multiple of anything."""


def info_of(shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(Path("file"), "w", "U8", shape, START, START + int(np.prod(shape)))


@st.composite
def pieces(draw: st.DrawFn) -> tuple[tuple[int, ...], list[list[Range]]]:
    """A shape, and for each dim ranges in any order; some cover it, some are empty."""
    shape = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    ranges = []
    for size in shape:
        one = st.integers(0, size)
        pair = st.tuples(one, one).map(lambda two: (min(two), max(two)))
        ranges.append(draw(st.one_of(st.just([(0, size)]), st.lists(pair, max_size=3))))
    return shape, ranges


@settings(deadline=None, max_examples=150)
@given(piece=pieces(), window_bytes=st.integers(1, 600), seed=st.integers(0, 99))
def test_the_bytes_of_a_piece_and_no_others(
    tmp_path_factory: pytest.TempPathFactory,
    piece: tuple[tuple[int, ...], list[list[Range]]],
    window_bytes: int,
    seed: int,
) -> None:
    shape, ranges = piece
    random = np.random.default_rng(seed)
    before = random.integers(0, 255, START + int(np.prod(shape)), np.uint8)
    want = before.copy()
    at = np.ix_(*([n for start, stop in one for n in range(start, stop)] for one in ranges))
    data = random.integers(0, 255, shape, np.uint8)
    want[START:].reshape(shape)[at] = data[at]
    file = tmp_path_factory.mktemp("window") / "file"
    file.write_bytes(before.tobytes())
    fd = os.open(file, os.O_RDWR)
    try:
        runs = byte_runs(info_of(shape), ranges)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mapped_writes, "WINDOW_BYTES", window_bytes)
            if runs.size_bytes:
                write_runs(fd, runs, memoryview(np.ascontiguousarray(data[at]).reshape(-1)))
    finally:
        os.close(fd)
    np.testing.assert_array_equal(np.frombuffer(file.read_bytes(), np.uint8), want)


@pytest.mark.parametrize(
    ("shape", "ranges", "short"),
    [
        ((4096, 4096), [[(0, 4096)], [(0, 2048)]], True),
        ((4096, 4096), [[(0, 2048)], [(0, 4096)]], False),  # one run
        ((64, 1 << 20), [[(0, 64)], [(0, 1 << 19)]], False),  # long runs
        ((16, 4096), [[(0, 16)], [(0, 2048)]], False),  # few runs
        ((8, 512, 4096), [[(2, 4)], [(0, 512)], [(0, 512), (1024, 1536)]], True),  # two parts of a fused tensor
        ((4, 0), [[(0, 4)], []], False),
    ],
)
def test_when_a_window_pays(shape: tuple[int, ...], ranges: list[list[Range]], short: bool) -> None:
    assert is_short(byte_runs(info_of(shape), ranges)) == short


def test_a_file_with_holes_has_none(tmp_path: Path) -> None:
    """A mapped page that finds no room on the disk would end the process."""
    with (tmp_path / "file").open("w+b") as file:
        file.truncate(1 << 20)
        assert not has_windows(file.fileno())


@pytest.mark.parametrize("kind", ["nfs4", "ext4", None])
def test_only_file_systems_of_one_machine_have_them(
    kind: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_files(tmp_path, plan_files([("a", "U8", [1 << 20])], 10**9))
    monkeypatch.setattr(mapped_writes, "_file_system", lambda device: kind)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        assert has_windows(file.fileno()) == (kind == "ext4" and hasattr(os, "posix_fallocate"))


@pytest.mark.parametrize("kind", ["ext4", "nfs4"])
def test_ranks_that_write_every_page_together(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks write thirds of each row of a matrix at the same time, through windows and without: the same file."""
    monkeypatch.setattr(mapped_writes, "_file_system", lambda device: kind)
    rows, columns = 2048, 3 * 1000
    whole = np.random.default_rng(0).integers(0, 255, (rows, columns), np.uint8)
    plan = plan_files([("w", "U8", whole.shape)], 10**9)
    create_files(tmp_path, plan)

    def write(rank: int) -> None:
        mine = (1000 * rank, 1000 * rank + 1000)
        with Writer(tmp_path, plan) as writer:
            writer.write("w", [[(0, rows)], [mine]], memoryview(np.ascontiguousarray(whole[:, slice(*mine)])))

    ranks = [threading.Thread(target=write, args=(rank,)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert (tmp_path / "model.safetensors").read_bytes() == plan[0].header + whole.tobytes()
