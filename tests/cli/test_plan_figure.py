"""`partita plan --picture`: a bar for each rank, whose parts come to the bytes of the plan."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from partita.cli.terminal.plan_figure import PARTS, held_bytes, part_of
from partita.core.mesh import Mesh
from partita.core.model.families import FAMILIES, spec_from_config
from partita.core.plan import Plan
from tests.cli.conftest import Run
from tests.cli.models import DEEPSEEK_V3, LLAMA_8B, TINY, write
from tests.cli.test_plan_sizes import GPT_OSS


@pytest.mark.parametrize("suffix", ["svg", "png"])
@pytest.mark.parametrize("options", ["--tp 2 --pp 2 --dp 2", "--pp 1 --vpp 2", "--tp 4 --pp 2 --vpp 1"])
def test_writes_a_picture(partita: Run, tmp_path: Path, suffix: str, options: str) -> None:
    file = tmp_path / f"plan.{suffix}"
    said = partita("plan", write(tmp_path, TINY), *options.split(), "--picture", str(file))
    assert said.code == 0
    assert said.err == f"The picture was written to {file}.\n"
    begin = file.read_bytes()[:8]
    assert begin == b"\x89PNG\r\n\x1a\n" if suffix == "png" else begin.startswith(b"<?xml")
    data = partita("plan", write(tmp_path, TINY), *options.split(), "--picture", str(file), "--json")
    assert json.loads(data.out)["family"] == "llama"


def texts(partita: Run, folder: Path, config: dict[str, Any], *options: str) -> list[str]:
    """The texts of a picture, which matplotlib notes beside their glyphs."""
    file = folder / "plan.svg"
    assert partita("plan", write(folder, config), *options, "--picture", str(file)).code == 0
    return re.findall(r"<!-- (.*?) -->", file.read_text())


def test_names_ranks_stages_parts_and_bytes(partita: Run, tmp_path: Path) -> None:
    found = texts(partita, tmp_path, LLAMA_8B, "--tp", "2", "--pp", "2")
    assert [text for text in found if text.startswith("rank ")] == ["rank 0", "rank 1", "rank 2", "rank 3"]
    assert {"pp 0: embedding, layers 0-15", "pp 1: layers 16-31, loss"} <= set(found)
    assert {"embedding", "attention", "MLP", "head"} <= set(found)
    assert "experts" not in found
    assert "weights of a rank, GiB" in found
    assert found.count("3.74 GiB") == 4
    assert "LlamaForCausalLM: 8.03 B parameters, dp 1 x pp 2 x tp 2" in found


def test_virtual_stages_and_copies(partita: Run, tmp_path: Path) -> None:
    found = texts(partita, tmp_path, GPT_OSS, "--tp", "2", "--pp", "2", "--vpp", "2")
    assert "pp 0: vpp 0: embedding, layers 0-8; vpp 1: layers 18-26" in found
    assert "complete on every rank of a layer" in found
    assert "complete on every rank of a layer" not in texts(partita, tmp_path, LLAMA_8B, "--pp", "2")


def test_ranks_that_hold_the_same_share_a_bar_of_a_large_mesh(partita: Run, tmp_path: Path) -> None:
    found = texts(partita, tmp_path, DEEPSEEK_V3, "--tp", "16", "--pp", "4")
    assert [text for text in found if text.startswith("rank")] == [
        "ranks 0-15",
        "ranks 16-31",
        "ranks 32-47",
        "ranks 48-63",
    ]


@pytest.mark.parametrize("config", [LLAMA_8B, DEEPSEEK_V3, GPT_OSS], ids=["llama", "deepseek", "gpt-oss"])
def test_the_parts_come_to_what_a_rank_holds(config: dict[str, Any]) -> None:
    plan = Plan.make(spec_from_config(config), Mesh(tp=3, pp=2))
    for rank in range(6):
        held = held_bytes(plan, rank)
        assert round(sum(held.values())) == plan.rank_bytes(rank)
        assert {part for part, _ in held} <= PARTS.keys()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_has_its_parts(family: str) -> None:
    """Of every family most bytes have a name of their own, and attention and a feed-forward part are found."""
    spec = spec_from_config({"model_type": family, "head_dim": 64, "num_key_value_heads": 1})
    plan = Plan.make(spec, Mesh())
    sizes: dict[str, int] = {}
    for name, tensor in spec.tensors.items():
        is_before = spec.layer_of(name) is None and plan.is_before_layers(name)
        part = part_of(spec, name, is_before=is_before)
        sizes[part] = sizes.get(part, 0) + tensor.numel
    assert {"embedding", "attention"} <= sizes.keys()
    assert sizes.keys() & {"MLP", "experts"}
    assert sizes.get("norms and others", 0) < 0.02 * sum(sizes.values())


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("a.pdf", "--picture must name a file that ends in .svg or .png, but is a.pdf."),
        ("/nowhere/a.svg", "--picture /nowhere/a.svg cannot be written: there is no folder /nowhere. Create it first."),
    ],
)
def test_mistakes_are_one_line(partita: Run, tmp_path: Path, file: str, message: str) -> None:
    said = partita("plan", write(tmp_path, TINY), "--picture", file)
    assert (said.code, said.out, said.err) == (2, "", f"error: {message}\n")
