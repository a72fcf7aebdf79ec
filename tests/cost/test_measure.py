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

CONFIG = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 1000, "dtype": "float32",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_machine_is_measured(tmp_path: Path) -> None:
    file = tmp_path / "here.toml"
    outcome = start(["measure", "--ranks", "1", "--out", str(file)], 1, capture=True)
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
