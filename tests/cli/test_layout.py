from __future__ import annotations

import json

import pytest

from tests.cli.conftest import Run


def test_shows_the_table_and_the_ids(partita: Run) -> None:
    said = partita("layout", "Et*3|(tt|)*29,m|L", "--pp", "16")
    assert said.code == 0
    assert "32 stages = 16 pipeline ranks x 2 virtual, 61 decoder layers, 1 mtp layer" in said.out
    assert "PP rank 1-13        decoder*2                  decoder*2" in said.out
    rows = [line.split() for line in said.out.splitlines()]
    assert ["0", "0", "0", "embedding,", "layers", "0-2"] in rows
    assert ["29", "13", "1", "layers", "59-60"] in rows
    assert ["30", "14", "1", "mtp", "layer", "0"] in rows
    assert ["31", "15", "1", "loss"] in rows


def test_json_has_every_stage(partita: Run) -> None:
    said = partita("layout", "Et||tL|", "--pp", "2", "--json")
    assert said.code == 0
    data = json.loads(said.out)
    assert (data["pp"], data["vpp"], data["num_layers"], data["mtp_num_layers"]) == (2, 2, 2, 0)
    assert data["stages"] == [
        {"stage": 0, "pp_rank": 0, "vpp_rank": 0, "embedding": True, "layers": [0], "mtp_layers": [], "loss": False},
        {"stage": 1, "pp_rank": 1, "vpp_rank": 0, "embedding": False, "layers": [], "mtp_layers": [], "loss": False},
        {"stage": 2, "pp_rank": 0, "vpp_rank": 1, "embedding": False, "layers": [1], "mtp_layers": [], "loss": True},
        {"stage": 3, "pp_rank": 1, "vpp_rank": 1, "embedding": False, "layers": [], "mtp_layers": [], "loss": False},
    ]


def test_many_stages_are_cut_for_people_only(partita: Run) -> None:
    text = "E|" + "t|" * 9_998 + "L"
    said = partita("layout", text, "--pp", "10000")
    assert said.code == 0
    assert "9,600 more stages: --json lists them all" in said.out
    assert len(json.loads(partita("layout", text, "--pp", "10000", "--json").out)["stages"]) == 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Ett|x", "--pp", "2"), "'x'"),
        (("e", "--pp", "1"), "write E"),
        (("Et|t|L", "--pp", "2"), "multiple"),
        (("EtL", "--pp", "0"), "at least 1"),
        (("(((t*999)*999)*999)*999", "--pp", "1"), "error: "),
    ],
)
def test_a_wrong_layout_is_one_clear_message(partita: Run, arguments: tuple[str, ...], message: str) -> None:
    said = partita("layout", *arguments)
    assert said.code == 2
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert message in said.err
    assert "Traceback" not in said.err
