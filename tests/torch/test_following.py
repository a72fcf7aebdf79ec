"""Learning rates, optimizers, recomputation and divergence: equal to the unsplit run on every axis."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from partita.errors import DivergedError, PlanError
from partita.torch.collectives.groups import single_groups
from partita.torch.new import fresh
from partita.torch.train import train
from partita.torch.training.momentum import MasterSGD, orthogonal
from partita.training import Follow, Profile, Saves, TrainSettings
from partita.training.reporting import JsonLines
from tests.support.models import CONFIGS
from tests.support.ranks import RankError, ranks

SETTINGS = TrainSettings(
    steps=6, batch_size=4, sequence_length=12, microbatches=2, learning_rate=3e-3, warmup_steps=2, clip_norm=0.5
)
CHOICES: dict[str, dict[str, Any]] = {
    "sgd-linear": {"optimizer": "sgd", "lr_schedule": "linear", "momentum": 0.8},
    "muon-wsd": {"optimizer": "muon", "lr_schedule": "wsd", "decay_steps": 3},
    "adamw-constant": {"lr_schedule": "constant", "beta1": 0.8, "beta2": 0.99, "epsilon": 1e-6, "clip_norm": 0.0},
}
MESHES = ({"tp": 2}, {"dp": 2}, {"pp": 2})


def tokens() -> torch.Tensor:
    return torch.arange(2000) ** 2 % 23


def losses(name: str, mesh: dict[str, int] | None, changes: dict[str, Any]) -> list[tuple[float, float]]:
    where = {"groups": single_groups()} if mesh is None else mesh
    model = fresh(CONFIGS[name], dtype="float64", seed=3, **where)
    return [(r.loss, r.grad_norm) for r in train(model, tokens(), replace(SETTINGS, **changes))]


@pytest.mark.parametrize("choice", CHOICES)
def test_each_mesh_equals_the_unsplit_run(choice: str) -> None:
    # 7 heads over 2 ranks are uneven, so the gathered matrices are too.
    expected = ranks(2).run(losses, "llama-7-heads-1-kv", None, CHOICES[choice])[0]
    assert expected[-1][0] < expected[0][0]
    for mesh in MESHES:
        for found in ranks(2).run(losses, "llama-7-heads-1-kv", mesh, CHOICES[choice]):
            assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], rel=1e-9), mesh
            assert [one[1] for one in found] == pytest.approx([one[1] for one in expected], rel=1e-9), mesh


@pytest.mark.parametrize("which", ["full", "selective", 2])
def test_recomputed_activations_change_no_gradient(which: Any) -> None:
    dropping = {"attention_dropout": 0.2}
    for mesh in ({"tp": 2}, {"pp": 2}):
        kept, recomputed = (
            ranks(2).run(
                losses_of_config, {**CONFIGS["llama-7-heads-1-kv"], **dropping}, mesh, {"checkpointing": value}
            )
            for value in (False, which)
        )
        assert recomputed == kept


def losses_of_config(data: dict[str, Any], mesh: dict[str, int], changes: dict[str, Any]) -> list[tuple[float, float]]:
    model = fresh(data, dtype="float64", seed=3, **mesh)
    return [(r.loss, r.grad_norm) for r in train(model, tokens(), replace(SETTINGS, steps=3, **changes))]


def test_selective_and_every_second_layer_recompute_what_they_name() -> None:
    model = fresh(CONFIGS["llama-7-heads-1-kv"], seed=3, groups=single_groups())
    counts: dict[str, int] = {}

    def count(name: str) -> Any:
        return lambda *_: counts.__setitem__(name, counts.get(name, 0) + 1)

    for index, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj.register_forward_pre_hook(count(f"{index} attention"))
        layer.mlp.register_forward_pre_hook(count(f"{index} mlp"))
    once = replace(SETTINGS, steps=1, microbatches=1)
    seen = {}
    for which in (False, "selective", 2, "full"):
        counts.clear()
        train(model, tokens(), replace(once, checkpointing=which))
        seen[which] = dict(counts)
    assert set(seen[False].values()) == {1}
    assert seen["selective"] == {name: 2 if "attention" in name else 1 for name in seen[False]}
    assert seen[2] == {name: 2 if int(name.split()[0]) % 2 == 0 else 1 for name in seen[False]}
    assert set(seen["full"].values()) == {2}
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_sgd_is_torchs_and_muon_orthogonalizes() -> None:
    torch.manual_seed(0)
    start = torch.randn(4, 3, dtype=torch.float64)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    pair = (
        (ours, MasterSGD([ours], lr=0.1, momentum=0.9, weight_decay=0.01)),
        (theirs, torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=0.01)),
    )
    for step in range(4):
        for parameter, optimizer in pair:
            parameter.grad = torch.full_like(parameter, step - 1.5) * start
            optimizer.step()
    assert torch.allclose(ours, theirs, rtol=1e-14)
    values = torch.linalg.svdvals(orthogonal(torch.randn(2, 8, 5, dtype=torch.float64)))
    # The iteration's coefficients bring singular values to about 1, not to 1.
    assert values.min() > 0.5
    assert values.max() < 1.3


def resumed(folder: str, optimizer: str) -> list[float]:
    model = fresh(CONFIGS["llama-7-heads-1-kv"], dtype="float64", seed=3, tp=2)
    settings = replace(SETTINGS, optimizer=optimizer)
    saves = Saves(Path(folder), every=3)
    expected = [r.loss for r in train(model, tokens(), settings, saves=saves, follow=Follow([JsonLines(Path(folder))]))]
    from partita.torch.load import load

    again = load(Path(folder) / "step-000003", dp=2)
    found = train(
        again,
        tokens(),
        settings,
        saves=saves,
        resume=Path(folder) / "step-000003",
        follow=Follow([JsonLines(Path(folder))]),
    )
    assert [r.loss for r in found] == pytest.approx(expected[3:], rel=1e-9)
    return expected


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_an_optimizers_state_resumes_on_another_mesh_and_no_step_is_recorded_twice(
    optimizer: str, tmp_path: Path
) -> None:
    expected = ranks(2).run(resumed, str(tmp_path), optimizer)[0]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in rows] == pytest.approx(expected, rel=1e-9)
    assert {"grad_norm", "learning_rate", "tokens_per_s", "memory_bytes"} <= set(rows[0])


def overflowing(mesh: dict[str, int], folder: str) -> str:
    model = fresh(CONFIGS["llama-7-heads-1-kv"], seed=3, **mesh)
    seen = []

    def on_step(report: Any) -> None:
        seen.append([p.detach().clone() for p in model.parameters()])
        if report.step == 3:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "model.norm" in name:
                        parameter.fill_(3e38)  # so that logits overflow

    with pytest.raises(DivergedError) as caught:
        train(model, tokens(), SETTINGS, on_step=on_step, saves=Saves(Path(folder), every=2))
    assert len(seen) == 3
    for before, now, (name, _) in zip(seen[-1], model.parameters(), model.named_parameters(), strict=True):
        assert "model.norm" in name or torch.equal(before, now)
    return str(caught.value)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_step_that_overflows_stops_before_the_optimizer(mesh: dict[str, int], tmp_path: Path) -> None:
    first, second = ranks(2).run(overflowing, mesh, str(tmp_path))
    assert first == second
    assert first.startswith("step 4: the loss is nan, on replica 0 (")
    assert "samples 12-15 (counted from 0)" in first
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-000002"]
    assert (tmp_path / "step-000002" / "manifest.json").exists()


def one_bad_replica() -> str:
    model = fresh(CONFIGS["llama-7-heads-1-kv"], seed=3, dp=2)
    _, groups = model.partita_plan, model.partita_groups
    if groups.dp.rank == 1:
        # An infinite gradient of a finite loss, on one replica.
        model.model.norm.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(DivergedError) as caught:
        train(model, tokens(), SETTINGS)
    return str(caught.value)


def test_the_replica_with_the_gradient_is_named() -> None:
    first, second = ranks(2).run(one_bad_replica)
    assert first == second
    assert "on replica 1 (rank 1), in the run's samples 2-3 (counted from 0)" in first
    assert "the gradient of model.norm.weight on rank 1 is not finite" in first


def profiled(folder: str) -> None:
    model = fresh(CONFIGS["llama-7-heads-1-kv"], seed=3, pp=2)
    train(model, tokens(), SETTINGS, follow=Follow(profile=Profile(2, 3, Path(folder))))


def test_every_rank_writes_a_trace_of_the_chosen_steps(tmp_path: Path) -> None:
    ranks(2).run(profiled, str(tmp_path))
    for rank in range(2):
        events = json.loads((tmp_path / f"rank-{rank}.json").read_text())["traceEvents"]
        names = [event.get("name") for event in events]
        assert names.count("0F0" if rank == 0 else "1F0") == 2
        assert any("mm" in str(name) for name in names)


def too_late() -> None:
    model = fresh(CONFIGS["llama-7-heads-1-kv"], seed=3, dp=2)
    train(model, tokens(), SETTINGS, follow=Follow(profile=Profile(6, 7, Path("unused"))))


def test_a_profile_of_steps_that_do_not_run_is_refused() -> None:
    with pytest.raises(RankError, match=r"a profile of steps 6:7 is not possible: this run has steps 1 to 6"):
        ranks(2).run(too_late)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"lr_schedule": "step"}, "lr_schedule must be one of cosine, linear, constant, wsd, but is 'step'"),
        ({"decay_steps": 3}, "decay_steps is for lr_schedule wsd"),
        ({"lr_schedule": "wsd", "decay_steps": 9}, r"from 1 to steps \(6\), but is 9"),
        ({"optimizer": "adafactor"}, "row and column means"),
        ({"optimizer": "lion"}, "optimizer must be one of adamw, sgd, muon"),
        ({"beta2": 1.0}, "beta2 must be at least 0 and below 1"),
        ({"checkpointing": "some"}, "checkpointing must be full, selective"),
    ],
)
def test_settings_are_checked(change: dict[str, Any], text: str) -> None:
    with pytest.raises(PlanError, match=text):
        replace(SETTINGS, **change)
