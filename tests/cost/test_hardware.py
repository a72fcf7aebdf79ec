"""Hardware files: those in the package, those that are measured, and malformed ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from partita.core.mesh import Mesh
from partita.core.model.families import spec_from_config
from partita.cost import collectives
from partita.cost.estimate import estimate, lower_bound
from partita.cost.hardware import Group, Hardware, names, parse, value_at, write
from partita.cost.model import ModelCost
from partita.cost.work import Arrangement, Work
from partita.errors import PlanError

LLAMA = {
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 1000, "dtype": "bfloat16",
}  # fmt: skip
SMALL = """
name = "small"
devices_per_node = 2
[device]
memory_bytes = 1_000_000_000
memory_bandwidth = 1e10
peak_flops = { float32 = 1e11 }
[links.shared]
latency_s = 1e-5
bandwidth = 1e9
"""


@pytest.mark.parametrize("name", names())
def test_every_packaged_file_predicts(name: str) -> None:
    hardware = Hardware.read(name)
    assert hardware.source
    model = ModelCost.of(spec_from_config(LLAMA))
    for work in (Work(), Work(purpose="generate", sequences=2)):
        for mesh in (Mesh(dp=2), Mesh(pp=2), Mesh(tp=2)):
            found = estimate(model, work, Arrangement(mesh=mesh, microbatches=2), hardware)
            seconds, most_bytes = lower_bound(model, work, mesh, hardware)
            assert 0 < seconds <= found.step_s
            assert most_bytes <= max(use.total for use in found.memory)
            assert 0 < found.mfu < 1
            assert sum(found.parts_s.values()) == pytest.approx(found.step_s, rel=0.2)


def test_unlike_devices_have_their_own_memory_and_speed() -> None:
    hardware = Hardware.read("two-macs")
    model = ModelCost.of(
        spec_from_config({**LLAMA, "num_hidden_layers": 12, "hidden_size": 4096, "intermediate_size": 11008})
    )
    work = Work(purpose="generate", sequence_length=512)
    even, uneven = (
        estimate(model, work, Arrangement(mesh=Mesh(pp=2), layers=layers), hardware) for layers in ((6, 6), (8, 4))
    )
    assert even.limit[0] > even.limit[1]
    assert uneven.step_s < even.step_s  # the Ultra reads its weights faster
    with pytest.raises(PlanError, match="2 ranks, but 4 are needed"):
        estimate(model, work, Arrangement(mesh=Mesh(pp=4)), hardware)


@pytest.mark.parametrize(("change", "message"), [
    ("memory_bytes = 1_000_000_000", "device.memory_bytes"), ("memory_bandwidth = 1e10", "device.memory_bandwidth"),
    ("peak_flops = { float32 = 1e11 }", "device.peak_flops"), ("latency_s = 1e-5", "links.shared.latency_s"),
])  # fmt: skip
def test_what_is_missing_is_named(change: str, message: str) -> None:
    with pytest.raises(PlanError, match=f"small.toml is malformed at {message}"):
        parse(SMALL.replace(change, ""), "small.toml")


@pytest.mark.parametrize(("old", "new", "message"), [
    ("memory_bytes = 1_000_000_000", "memory_bytes = -1", "device.memory_bytes"),
    ("float32 = 1e11", "int3 = 1", "peak_flops.int3"),
    ("bandwidth = 1e9", 'bandwidth = "fast"', "links.shared.bandwidth"), ("[links.shared]", "[links.air]", "links.air"),
    ("bandwidth = 1e9", "bandwidth = 1e9\nefficiency = [[2, 1], [1, 1]]", "sizes ascending"),
    ('name = "small"', "x = 1", "at x"),
    ('name = "small"', "name =", "is not TOML"), ("[links.shared]", "[links.shared]\nalgorithms = ['star']", "ring and tree"),
])  # fmt: skip
def test_what_is_wrong_is_named(old: str, new: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse(SMALL.replace(old, new, 1), "small.toml")


def test_an_unknown_name_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"a100-80gb.*neither.*partita measure"):
        Hardware.read(str(tmp_path / "h9000"))


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("a100", "a100-80gb"),
        ("H100-80GB", "h100"),
        ("h200-141gb", "h200"),
        ("b200-192gb", "b200"),
        ("mi300x-192gb", "mi300x"),
    ],
)
def test_names_with_the_size_of_the_memory(alias: str, name: str) -> None:
    assert Hardware.read(alias) is Hardware.read(name)


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    data = {
        "name": "x", "devices_per_node": 2,
        "device": {"memory_bytes": 5, "memory_bandwidth": 1.5, "peak_flops": {"float32": 2.0}},
        "links": {"shared": {"latency_s": 0.1, "bandwidth": 3.0, "measured": {"send": [[1.0, 0.5], [2.0, 0.7]]}}},
        "backends": {"gloo": {"latency_s": 0.2, "bandwidth": 4.0}},
    }  # fmt: skip
    file = tmp_path / "x.toml"
    file.write_text(write(data, "a comment"))
    hardware = Hardware.read(file)
    assert hardware.links["shared"].measured["send"] == ((1.0, 0.5), (2.0, 0.7))
    assert hardware.with_backend("gloo").link_inside().latency_s == 0.2
    with pytest.raises(PlanError, match="backend must be one of"):
        hardware.with_backend("mpi")


def test_curves_are_interpolated_over_logarithms() -> None:
    curve = ((10.0, 1.0), (1000.0, 3.0))
    assert [value_at(curve, size) for size in (1, 10, 100, 1000, 1e9)] == [1.0, 1.0, 2.0, 3.0, 3.0]


def test_collectives_cost_what_rings_and_trees_do() -> None:
    hardware = parse(SMALL, "small")
    size = 8e6
    for n in (2, 4, 8):
        inside = Group(n, n)
        ring = 2 * (n - 1) * 1e-5 + 2 * (n - 1) / n * size / 1e9
        assert collectives.seconds(hardware, inside, "all_reduce", size) == pytest.approx(ring)
        parts = (n - 1) * 1e-5 + (n - 1) / n * size / 1e9
        assert collectives.seconds(hardware, inside, "all_gather", size) == pytest.approx(parts)
        assert collectives.seconds(hardware, inside, "reduce_scatter", size) == pytest.approx(parts)
    few_bytes = collectives.seconds(hardware, Group(64, 64), "all_reduce", 64)
    assert few_bytes == pytest.approx(2 * 6 * 1e-5, rel=1e-2)  # a tree
    assert collectives.seconds(hardware, Group(1, 1), "all_reduce", size) == 0


def test_groups_know_how_many_of_them_share_a_machine() -> None:
    hardware = Hardware.read("h100")
    assert hardware.group(1, 8, 64) == Group(8, 8)
    assert hardware.group(8, 8, 64) == Group(8, 1)
    assert hardware.group(2, 32, 64) == Group(32, 4)
    assert hardware.group(1, 16, 64) == Group(16, 8)
    assert hardware.group(4, 2, 8) == Group(2, 2)


def test_each_rank_of_an_all_to_all_sends_to_other_machines_through_its_own_port() -> None:
    hardware = Hardware.read("h100")
    network = hardware.link_between()
    for ranks, size in ((16, 1e8), (64, 4.7e8)):
        group = Group(ranks, 8)
        assert not group.is_inside
        outside = size * (1 - 8 / ranks)
        port = network.bandwidth * value_at(network.efficiency, outside)
        expected = network.latency_s + outside / port
        assert collectives.seconds(hardware, group, "all_to_all", size) == pytest.approx(expected)
