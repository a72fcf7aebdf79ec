"""What `partita measure` writes is a hardware file whose predictions are of the right size."""

from __future__ import annotations

from pathlib import Path

import pytest

from partita.core.mesh import Mesh
from partita.core.model.families import spec_from_config
from partita.cost.estimate import estimate
from partita.cost.hardware import Hardware
from partita.cost.model import ModelCost
from partita.cost.work import Arrangement, Work
from partita.ranks.launcher import start
from partita.torch.measure import PARTS, Budget


class _Clock:
    """A clock of a machine on which each call takes `call_s` seconds."""

    def __init__(self, call_s: float) -> None:
        self.now, self.call_s, self.calls = 0.0, call_s, 0

    def __call__(self) -> float:
        return self.now

    def call(self) -> float:
        self.calls += 1
        self.now += self.call_s
        return self.call_s


def test_a_slow_machine_repeats_less_and_keeps_the_budget() -> None:
    for call_s, fewest, most in ((0.01, 15, 15), (0.9, 1, 2), (30.0, 1, 1)):
        clock = _Clock(call_s)
        budget = Budget(90.0, clock)
        for part in PARTS:
            budget.begin(part)
            clock.calls = 0
            assert budget.rounds(clock.call, 15, 0.5) == [call_s] * clock.calls
            assert fewest <= clock.calls <= most
        assert clock.now <= max(90.0, call_s * len(PARTS))


def test_a_part_has_its_share_of_what_is_left() -> None:
    clock = _Clock(1.0)
    budget = Budget(100.0, clock)
    names = list(PARTS)
    budget.begin(names[0])
    assert budget.left_s == pytest.approx(100.0 * PARTS[names[0]] / sum(PARTS.values()))
    clock.now = 90.0
    budget.begin(names[-1])
    assert budget.left_s == pytest.approx(10.0)
    clock.now = 130.0
    budget.begin(names[-1])
    assert budget.left_s == 0.0
    assert budget.rounds(clock.call, 15, 0.5) == [1.0]


CONFIG = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 1000, "dtype": "float32",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_machine_is_measured(tmp_path: Path) -> None:
    file = tmp_path / "here.toml"
    one_thread = {"OMP_NUM_THREADS": "1"}
    outcome = start(["measure", "--ranks", "1", "--out", str(file)], 1, capture=True, settings=one_thread)
    assert outcome.code == 0, outcome.stderr
    assert "Gflop/s" in outcome.output.decode()
    hardware = Hardware.read(file)
    device = hardware.devices[0]
    for curve in (
        device.product_efficiency,
        device.memory_efficiency,
        device.vector_efficiency,
        device.attention_efficiency,
    ):
        assert all(value > 0 for _, value in curve)
    model = ModelCost.of(spec_from_config(CONFIG))
    found = estimate(model, Work(batch_size=4, sequence_length=128), Arrangement(mesh=Mesh()), hardware)
    assert 1e-3 < found.step_s < 60
    assert found.parts_s["compute"] > found.parts_s["tp"] == 0
