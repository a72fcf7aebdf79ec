from __future__ import annotations

import json
import subprocess
import sys
from inspect import cleandoc
from pathlib import Path
from xml.etree import ElementTree

import pytest

from partita import Schedule, ScheduleError
from partita.schedule import Costs, Timeline, build, chrome_trace, grid, lower, picture, simulate
from tests.support.ranks import ROOT

SVG = "{http://www.w3.org/2000/svg}"


def line(kind: str, pp: int, m: int, costs: Costs = Costs()) -> Timeline:
    return simulate(build(kind, pp, m), costs)


def test_a_timeline_is_drawn_to_scale() -> None:
    assert grid(line("zb-h1", 2, 3, Costs(2, 2, 1, 0.5))) == cleandoc(
        """
        time   0              5              10             15
        rank 0 F0--- F1---          B0--- W0 F2--- B1--- W1       B2--- W2
        rank 1         F0--- B0--- F1--- B1--- W0    F2--- B2--- W1 W2
        """
    )


def test_a_schedule_is_drawn_by_steps() -> None:
    assert grid(lower(build("1f1b", 2, 1))) == cleandoc(
        """
        step   0       1       2       3
        rank 0 F0      SEND_F0 RECV_B0 BW0
        rank 1 RECV_F0 F0      BW0     SEND_B0
        """
    )
    assert grid(build("forward-only", 2, 1, 2)) == cleandoc(
        """
        step   0   1
        rank 0 0F0 2F0
        rank 1 1F0 3F0
        """
    )


@pytest.mark.parametrize("width", [40, 80, 140])
@pytest.mark.parametrize("timed", [True, False])
def test_a_large_one_is_shown_in_short(width: int, timed: bool) -> None:
    made = build("zb-v", 40, 100)
    text = grid(simulate(made, Costs()) if timed else made, width)
    lines = text.splitlines()
    assert max(map(len, lines[:-1])) <= width
    assert len(lines) == 1 + 24 + 1 + 1
    assert lines[-1].startswith("(... stands for 16 ranks and ")
    assert [row.split()[1] for row in lines[1:-1] if row.startswith("rank")] == [
        str(rank) for rank in (*range(12), *range(28, 40))
    ]
    assert len(grid(made).splitlines()) == 41


def test_what_is_too_short_for_its_text_loses_its_end() -> None:
    made = build("gpipe", 2, 2)
    text = grid(simulate(made, Costs((100.0, 0.001), (100.0, 0.0), (100.0, 0.0))))
    assert max(map(len, text.splitlines())) < 400
    assert "BW1---" in text


def test_an_svg_has_every_micro_batch_and_the_bubbles(tmp_path: Path) -> None:
    lines = {"predicted": line("zb-h1", 3, 6), "again": line("interleaved-1f1b", 3, 6)}
    picture(lines, tmp_path / "a.svg", "Two schedules")
    text = (tmp_path / "a.svg").read_text()
    root = ElementTree.fromstring(text)
    bars = [path for group in root.iter(f"{SVG}g") if group.get("id", "").startswith("PolyColl") for path in group]
    assert len(bars) >= 3 * 6 * 3 + 6 * 6 * 2
    for words in (
        "Two schedules",
        "predicted",
        "again",
        f"bubble {lines['predicted'].bubble_makespan:.1%} of makespan",
    ):
        assert f"<!-- {words}" in text
    assert "<image" not in text
    picture(lines, tmp_path / "b.svg", "Two schedules")
    assert len((tmp_path / "b.svg").read_text()) == len(text)


def test_a_large_svg_is_pixels(tmp_path: Path) -> None:
    picture({"large": line("1f1b", 32, 400)}, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert "<image" in text
    assert len(text) < 1_000_000


def test_a_png(tmp_path: Path) -> None:
    picture({"one rank": line("gpipe", 1, 1, Costs(0, 0, 0))}, str(tmp_path / "a.PNG"))
    assert (tmp_path / "a.PNG").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "message"),
    [("a.pdf", "path must end with .svg or .png, but is"), ("a", "must end"), ("no/a.svg", "there is no folder")],
)
def test_where_no_picture_can_go(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        picture({"a": line("gpipe", 1, 1)}, tmp_path / name)
    with pytest.raises(ScheduleError, match="timelines is empty"):
        picture({}, tmp_path / "a.svg")


def test_a_trace_has_a_process_a_timeline_and_a_thread_a_rank() -> None:
    made = Schedule.from_csv("0F0,0SEND_F0\n1RECV_F0,1F0")
    measured = Timeline(made, ((5.0, 6.0), (5.0, 6.5)), ((6.0, 6.5), (6.5, 7.5)))
    trace = json.loads(json.dumps(chrome_trace({"predicted": simulate(made, Costs()), "measured": measured})))
    named = {(e["pid"], e.get("tid")): e["args"]["name"] for e in trace["traceEvents"] if e["name"].endswith("_name")}
    assert named == {
        (0, None): "predicted", (0, 0): "rank 0", (0, 1): "rank 1",
        (1, None): "measured", (1, 0): "rank 0", (1, 1): "rank 1",
    }  # fmt: skip
    events = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert [(e["pid"], e["tid"], e["name"], e["cat"], e["ts"], e["dur"]) for e in events] == [
        (0, 0, "0F0", "compute", 0.0, 1e6),
        (0, 1, "1F0", "compute", 1e6, 1e6),
        (1, 0, "0F0", "compute", 0.0, 1e6),
        (1, 0, "0SEND_F0", "transfer", 1e6, 0.5e6),
        (1, 1, "1RECV_F0", "transfer", 0.0, 1.5e6),
        (1, 1, "1F0", "compute", 1.5e6, 1e6),
    ]
    assert events[0]["args"] == {"stage": 0, "microbatch": 0, "kind": "F"}
    assert chrome_trace({"a": measured}, unit_us=1000)["traceEvents"][3]["dur"] == 1000


@pytest.mark.fresh
def test_only_a_picture_loads_matplotlib(tmp_path: Path) -> None:
    program = (
        "import sys; import partita; from partita.schedule import *\n"
        "line = simulate(lower(build('zb-v', 2, 4)), Costs()); grid(line); chrome_trace({'a': line})\n"
        "assert not {'torch', 'mlx', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        f"picture({{'a': line}}, {str(tmp_path / 'a.png')!r}); assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
