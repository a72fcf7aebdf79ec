"""Learning rates, optimizers, reports and divergence on MLX: as on one rank, and as torch writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from partita.core.mesh import Mesh
from partita.core.plan import Plan
from partita.errors import DivergedError, PlanError
from partita.mlx.collectives.groups import single_groups
from partita.mlx.load import load, shard
from partita.mlx.model.mlx_lm_models import spec_of
from partita.mlx.model.parts import parameter_homes
from partita.mlx.proof.family import plan_of_model
from partita.mlx.train import train
from partita.training import Follow, Profile, Saves, TrainSettings
from partita.training.reporting import JsonLines
from tests.mlx.test_stage import whole
from tests.mlx.test_train import TEXT
from tests.support.mlx_ranks import mlx_ranks

SETTINGS: dict[str, Any] = {
    "steps": 4, "batch_size": 8, "sequence_length": 12, "microbatches": 2, "warmup_steps": 2, "learning_rate": 1e-2,
}  # fmt: skip
CHOICES: dict[str, dict[str, Any]] = {
    "sgd-wsd": {"optimizer": "sgd", "lr_schedule": "wsd", "decay_steps": 2, "clip_norm": 0.0},
    "adamw-linear": {"lr_schedule": "linear", "beta1": 0.8, "beta2": 0.99, "epsilon": 1e-6},
}
MESHES = ((2, 1, 1), (1, 2, 1), (1, 1, 2))


def model_on(mesh: tuple[int, int, int] | None) -> Any:
    model = whole("llama", mx.float64)
    if mesh is None:
        return shard(model, groups=single_groups())
    dp, pp, tp = mesh
    return shard(model, Plan.make(spec_of(model), Mesh(dp, pp, tp), None, plan_of_model(model, Mesh(tp=tp)).rules))


def losses(mesh: tuple[int, int, int] | None, changes: dict[str, Any]) -> list[float]:
    return [r.loss for r in train(model_on(mesh), TEXT, TrainSettings(**{**SETTINGS, **changes}))]


@pytest.mark.parametrize("choice", CHOICES)
def test_each_mesh_equals_the_unsplit_run(choice: str) -> None:
    expected = mlx_ranks(2).run(losses, None, CHOICES[choice])[0]
    assert expected[-1] < expected[0]
    for mesh in MESHES:
        for found in mlx_ranks(2).run(losses, mesh, CHOICES[choice]):
            assert found == pytest.approx(expected, rel=1e-9), mesh


def resumed(folder: str) -> list[float]:
    settings = TrainSettings(**{**SETTINGS, "optimizer": "sgd"})
    place = Path(folder)
    saves = Saves(place, every=2)
    expected = [
        r.loss for r in train(model_on((1, 1, 2)), TEXT, settings, saves=saves, follow=Follow([JsonLines(place)]))
    ]
    again = load(place / "step-000002", dp=2)
    follow = Follow([JsonLines(place)], Profile(3, 4, place / "profile"))
    found = train(again, TEXT, settings, saves=saves, resume=place / "step-000002", follow=follow)
    assert [r.loss for r in found] == pytest.approx(expected[2:], rel=1e-9)
    return expected


def test_a_resumed_run_has_its_velocities_and_records_no_step_twice(tmp_path: Path) -> None:
    expected = mlx_ranks(2).run(resumed, str(tmp_path))[0]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["loss"] for row in rows] == pytest.approx(expected, rel=1e-9)
    for rank in range(2):
        events = json.loads((tmp_path / "profile" / f"rank-{rank}.json").read_text())["traceEvents"]
        assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {"step 3", "step 4"}
        assert sum(e["name"] == "0F0" for e in events) == 2


def overflowing(mesh: tuple[int, int, int], folder: str) -> str:
    model = model_on(mesh)
    before: dict[str, mx.array] = {}

    def on_step(report: Any) -> None:
        homes = parameter_homes(model)
        for name, (home, key) in homes.items():
            if report.step == 3 and name == "model.norm.weight":
                home[key] = mx.full(home[key].shape, 1e308, mx.float64)  # so that logits overflow
            before[name] = mx.array(home[key])

    with pytest.raises(DivergedError) as caught:
        train(model, TEXT, TrainSettings(**SETTINGS), on_step=on_step, saves=Saves(Path(folder), every=2))
    for name, (home, key) in parameter_homes(model).items():
        assert mx.array_equal(home[key], before[name]).item(), name
    return str(caught.value)


@pytest.mark.parametrize("mesh", [(2, 1, 1), (1, 2, 1)], ids=str)
def test_a_step_that_overflows_stops_before_the_optimizer(mesh: tuple[int, int, int], tmp_path: Path) -> None:
    first, second = mlx_ranks(2).run(overflowing, mesh, str(tmp_path))
    assert first == second
    assert first.startswith("step 4: the loss is nan, on replica 0 (")
    assert "samples 24-31 (counted from 0)" in first
    assert (tmp_path / "step-000002" / "manifest.json").exists()


def test_what_this_engine_lacks_is_refused() -> None:
    with pytest.raises(PlanError, match=r"does not have optimizer muon\. Use adamw or sgd, or the torch engine"):
        train(model_on(None), TEXT, TrainSettings(**SETTINGS, optimizer="muon"))
