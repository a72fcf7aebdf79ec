from __future__ import annotations

import json
import subprocess
import sys
from inspect import cleandoc
from pathlib import Path

import pytest

from partita.schedule import KINDS, Costs, build, lower, simulate
from tests.cli.conftest import Run
from tests.support.ranks import ROOT

SMALL = ("schedule", "--kind", "zb-h1", "--pp", "2", "--microbatches", "3")


def test_shows_grid_bubbles_makespan_and_peaks(partita: Run) -> None:
    said = partita(*SMALL)
    assert (said.code, said.err) == (0, "")
    assert said.out.rstrip() == cleandoc(
        """
        zb-h1, pp 2, 3 micro-batches

        time   0              5
        rank 0 F0 F1    B0 W0 F2 B1 W1 B2 W2
        rank 1    F0 B0 F1 B1 W0 F2 B2 W1 W2

        bubble    10.00% of the makespan, 10.00% of the longest span
        makespan  10
        alive     at most 2 micro-batches on every rank
        """
    )


def test_json(partita: Run) -> None:
    options = ("--f", "12", "--b", "11.5", "--w", "8", "--comm", "0.4")
    data = json.loads(
        partita("schedule", "--kind", "zb-h2", "--pp", "8", "--microbatches", "24", *options, "--json").out
    )
    line = simulate(build("zb-h2", 8, 24), Costs(12, 11.5, 8, 0.4))
    assert (data["kind"], data["pp"], data["vpp"], data["microbatches"]) == ("zb-h2", 8, 1, 24)
    assert (data["bubble_span"], data["bubble_makespan"]) == (line.bubble_span, line.bubble_makespan)
    assert (data["makespan"], data["peak_activations"]) == (line.makespan, [15] * 8)
    assert data["costs"] == {"f": 12.0, "b": 11.5, "w": 8.0, "comm": 0.4}


def test_costs_by_stage(partita: Run) -> None:
    said = partita(
        "schedule", "--kind", "interleaved-1f1b", "--pp", "2", "--vpp", "2", "--microbatches", "5", "--group-size", "3",
        "--f", "1,2,3,4", "--json",
    )  # fmt: skip
    data = json.loads(said.out)
    made = build("interleaved-1f1b", 2, 5, 2, group_size=3)
    assert data["makespan"] == simulate(made, Costs((1.0, 2.0, 3.0, 4.0))).makespan
    assert (data["vpp"], data["rank_of"], data["costs"]["f"]) == (2, [0, 1, 0, 1], [1.0, 2.0, 3.0, 4.0])


def test_csv_goes_out_and_comes_back(partita: Run, tmp_path: Path) -> None:
    text = partita(*SMALL, "--csv").out
    assert text == str(build("zb-h1", 2, 3))
    (tmp_path / "mine.csv").write_text(text)
    own = json.loads(partita("schedule", "--from", str(tmp_path / "mine.csv"), "--json").out)
    built = json.loads(partita(*SMALL, "--json").out)
    assert {**own, "kind": "zb-h1"} == built
    assert own["kind"] is None


def test_lowered_shows_steps(partita: Run, tmp_path: Path) -> None:
    text = partita(*SMALL, "--lowered", "--csv").out
    assert text == str(lower(build("zb-h1", 2, 3)))
    (tmp_path / "mine.csv").write_text(text)
    said = partita("schedule", "--from", str(tmp_path / "mine.csv"), "--lowered")
    assert said.code == 0
    assert "rank 0 F0      SEND_F0" in said.out
    assert "bubble    10.00% of the makespan" in said.out


def test_a_large_one_is_short(partita: Run) -> None:
    said = partita("schedule", "--kind", "1f1b", "--pp", "40", "--microbatches", "64")
    assert "(... stands for 16 ranks and " in said.out
    assert "alive     at most 40 39 38" in said.out
    assert max(map(len, said.out.splitlines())) <= 140


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_writes_a_picture_and_a_trace(partita: Run, tmp_path: Path, suffix: str) -> None:
    image, trace = tmp_path / f"a.{suffix}", tmp_path / "a.json"
    said = partita(*SMALL, "--picture", str(image), "--trace", str(trace))
    assert said.code == 0
    assert image.stat().st_size > 5000
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"]
    assert len(events) == 2 * 3 * 3
    assert {e["dur"] for e in events} == {1000.0}


def test_help_tells_every_kind_and_the_units(partita: Run) -> None:
    said = partita("schedule", "--help")
    assert said.code == 0
    assert all(f"{kind}: " in said.out for kind in KINDS)
    assert "all in the same unit of time" in said.out


OWN = "0F0,0BW0\n1F0,1BW0\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--kind", "zbh1", "--pp", "2", "--microbatches", "3"), "kind 'zbh1' is not known. Did you mean zb-h1?"),
        (("--pp", "2"), "--kind, --microbatches missing: give --kind, --pp and --microbatches, or --from FILE.csv."),
        (("--kind", "1f1b", "--pp", "0", "--microbatches", "3"), "pp must be a whole number of at least 1, but is 0."),
        ((*SMALL[1:], "--f", "1,x"), "--f must be a number, or one per stage separated by commas, but is '1,x'."),
        ((*SMALL[1:], "--f", "1,2,3"), "costs.f has 3 values, but the schedule has 2 stages"),
        ((*SMALL[1:], "--b", "-1"), "costs.b must be a finite number of at least 0"),
        ((*SMALL[1:], "--comm", "nan"), "costs.comm must be a finite number of at least 0, but is nan."),
        ((*SMALL[1:], "--group-size", "4"), "group_size (4) is for interleaved-1f1b only"),
        ((*SMALL[1:], "--json", "--csv"), "give --json or --csv, not both."),
        ((*SMALL[1:], "--picture", "a.pdf"), "--picture must name a file that ends in .svg or .png, but is a.pdf."),
        ((*SMALL[1:], "--picture", "/nowhere/a.svg"), "there is no folder /nowhere. Create it first."),
        ((*SMALL[1:], "--trace", "/nowhere/a.json"), "--trace /nowhere/a.json cannot be written"),
        (("--from", "{own}", "--pp", "2"), "specifies the complete schedule: leave out --pp."),
        (("--from", "/nowhere/a.csv"), "--from /nowhere/a.csv cannot be read: No such file or directory."),
    ],
)
def test_mistakes_are_one_line(partita: Run, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    (tmp_path / "own.csv").write_text(OWN)
    said = partita("schedule", *(argument.replace("{own}", str(tmp_path / "own.csv")) for argument in arguments))
    assert said.code == 2
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert message in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0BW0\n1F0,1BX0\n", "row 2 (rank 1), cell 2: '1BX0' is not an action"),
        ("0F0,0BW0\n1BW0,1F0\n", "rank 1, step 0: 1BW0 needs 1F0, which comes later (step 1)."),
        ("", "the schedule has no ranks."),
    ],
)
def test_a_wrong_schedule_of_ones_own(partita: Run, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "own.csv").write_text(text)
    said = partita("schedule", "--from", str(tmp_path / "own.csv"))
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith(f"error: --from {tmp_path}/own.csv: ")
    assert message in said.err
    assert "Traceback" not in said.err


def test_a_fault_is_shown_in_the_grid(partita: Run, tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("0F0,0BW0\n1BW0,1F0\n")
    said = partita("schedule", "--from", str(tmp_path / "own.csv"))
    assert said.err.splitlines()[1:] == [
        "step    0      1      2",
        "rank 0  0F0    0BW0",
        "rank 1 >1BW0< >1F0<",
    ]


def test_a_file_that_is_not_text(partita: Run, tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_bytes(b"0F0\xff")
    said = partita("schedule", "--from", str(tmp_path / "own.csv"))
    assert said.code == 2
    assert "own.csv is not UTF-8 text" in said.err


@pytest.mark.fresh
def test_loads_no_engine_and_no_matplotlib() -> None:
    program = (
        f"import sys; from partita.cli import main; sys.argv = ['partita', *{SMALL!r}]\n"
        "try: main()\n"
        "finally: assert not {'torch', 'mlx', 'numpy', 'matplotlib'} & set(sys.modules)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert ended.returncode == 0, ended.stderr
    assert "makespan  10" in ended.stdout
