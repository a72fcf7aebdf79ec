"""A run that is stopped and goes on, on MLX: bit for bit on the same layout, equal on any other, and on torch and back."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from partita.errors import CheckpointError, ModelError
from partita.mlx.collectives.groups import single_groups
from partita.mlx.load import load
from partita.mlx.model.parts import parameter_homes, plan_of
from partita.mlx.model.trainable import Trainable
from partita.mlx.train import make_saver, train
from partita.mlx.training.optimizer import AdamW
from partita.mlx.weights.moments import restore_optimizer
from partita.training import StepReport, TrainSettings
from partita.training.saving import Saves
from partita.training.state import read_state
from tests.mlx.test_load import written  # noqa: F401
from tests.mlx.test_save import digest, tensors
from tests.support.mlx_ranks import mlx_ranks, on_mlx

TEXT = [(7 * i * i + 3 * i) % 100 + 1 for i in range(600)]
"""Ids without 0, with which these models pad: torch trains its embedding not at all, MLX as any other."""
SETTINGS = TrainSettings(steps=6, batch_size=8, sequence_length=12, learning_rate=1e-2, warmup_steps=2, microbatches=2)
STOPPED = 4

Mesh = tuple[int, int, int]
"""dp, pp, tp."""
ALONE: Mesh = (1, 1, 1)


def run(source: str, mesh: Mesh, folder: str, go_on: bool) -> tuple[list[StepReport], dict[str, Any]]:
    """Train to the end, from a model or from a checkpoint: the reports, and this rank's weights."""
    dp, pp, tp = mesh
    groups = single_groups() if mesh == ALONE else None
    model = load(source, dp=dp, pp=pp, tp=tp, groups=groups)
    saves = Saves(Path(folder), every=2, max_shard_bytes=60_000)
    reports = train(model, TEXT, SETTINGS, saves=saves, resume=source if go_on else None)
    return reports, {name: np.array(home[key]) for name, (home, key) in parameter_homes(model).items()}


def numbers(reports: list[StepReport]) -> list[tuple[float, float, float]]:
    return [(r.loss, r.grad_norm, r.learning_rate) for r in reports]


def stopped(folder: Path) -> str:
    return str(folder / f"step-{STOPPED:06d}")


@pytest.mark.parametrize("mesh", [ALONE, (1, 1, 2), (1, 2, 1), (2, 1, 1)])
def test_on_the_same_layout_bit_for_bit(mesh: Mesh, written: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    size = int(np.prod(mesh))
    whole = on_mlx(size, run, str(written["llama"]), mesh, str(tmp_path / "whole"), False)
    again = on_mlx(size, run, stopped(tmp_path / "whole"), mesh, str(tmp_path / "again"), True)
    for (expected, weights), (found, their_weights) in zip(whole, again, strict=True):
        assert [r.step for r in found] == [5, 6]
        assert numbers(found) == numbers(expected[STOPPED:])
        assert weights
        assert all(np.array_equal(array, their_weights[name]) for name, array in weights.items())
    assert digest(tmp_path / "whole" / "step-000006") == digest(tmp_path / "again" / "step-000006")


@pytest.fixture(scope="module")
def alone(written: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:  # noqa: F811
    folder = tmp_path_factory.mktemp("alone")
    reports, _ = run(str(written["llama"]), ALONE, str(folder), False)
    return folder, [r.loss for r in reports]


@pytest.mark.parametrize("mesh", [(1, 1, 2), (1, 2, 1), (2, 1, 1), (1, 2, 2)])
def test_on_another_layout_equal(mesh: Mesh, alone: tuple[Path, list[float]], tmp_path: Path) -> None:
    folder, losses = alone
    for reports, _ in on_mlx(int(np.prod(mesh)), run, stopped(folder), mesh, str(tmp_path), True):
        assert [r.loss for r in reports] == pytest.approx(losses[STOPPED:], rel=1e-5)
    expected, found = tensors(folder / "step-000006"), tensors(tmp_path / "step-000006")
    assert expected.keys() == found.keys()
    assert any(name.startswith("exp_avg_sq.") for name in found)
    for name, array in expected.items():
        most = mx.abs(array).max().item()
        assert mx.abs(array - found[name]).max().item() <= 1e-4 * most, name


def write_restored(model: Any, settings: TrainSettings, source: str, saves: Saves) -> None:
    """Give an optimizer of `model` the state of the checkpoint `source`, and write both without a step between."""
    trainable, optimizer = Trainable(model), AdamW(settings.weight_decay, settings.epsilon)
    state = read_state(Path(source))
    restore_optimizer(model, trainable, optimizer, Path(source))
    with make_saver(model, trainable, optimizer, saves, state) as saver:
        saver.after(state.step)
        saver.wait()


def write_again(source: str, mesh: Mesh, folder: str) -> None:
    """Load a checkpoint, moments too, and write it without a step between."""
    dp, pp, tp = mesh
    model = load(source, dp=dp, pp=pp, tp=tp, groups=single_groups() if mesh == ALONE else None)
    write_restored(model, SETTINGS, source, Saves(Path(folder), every=1, max_shard_bytes=60_000))


def test_bytes_do_not_depend_on_the_layout(alone: tuple[Path, list[float]], tmp_path: Path) -> None:
    source = stopped(alone[0])
    for place, mesh in enumerate([ALONE, (1, 1, 2), (1, 2, 1), (2, 1, 1), (1, 2, 2), (2, 1, 2)]):
        on_mlx(int(np.prod(mesh)), write_again, source, mesh, str(tmp_path / str(place)))
        assert digest(Path(stopped(tmp_path / str(place)))) == digest(Path(source)), mesh


# --- torch --------------------------------------------------------------------------------------------------------------


def by_torch(source: Path, folder: Path, *, go_on: bool) -> list[StepReport]:
    torch = pytest.importorskip("torch")
    from partita.torch.collectives.groups import single_groups
    from partita.torch.load import load
    from partita.torch.train import train

    model = load(source, groups=single_groups())
    saves = Saves(folder, every=2, max_shard_bytes=60_000)
    reports: list[StepReport] = train(
        model, torch.tensor(TEXT), SETTINGS, saves=saves, resume=source if go_on else None
    )
    return reports


def without_dropout(source: Path, folder: Path) -> Path:
    """A copy of a model whose config drops nothing: the engines draw different numbers."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config.update({name: 0.0 for name in config if name.endswith(("pdrop", "dropout"))})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("mesh", [ALONE, (1, 2, 2)])
def test_what_torch_began_goes_on_here_and_ends_there(
    family: str,
    mesh: Mesh,
    written: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    begun = without_dropout(written[family], tmp_path / "model")
    reports = by_torch(begun, tmp_path / "torch", go_on=False)
    losses = [r.loss for r in reports]
    second = tmp_path / "torch" / "step-000002"
    for found, _ in on_mlx(int(np.prod(mesh)), run, str(second), mesh, str(tmp_path / "mlx"), True):
        assert [r.step for r in found] == [3, 4, 5, 6]
        assert [r.loss for r in found] == pytest.approx(losses[2:], rel=1e-5)
        assert [r.grad_norm for r in found] == pytest.approx([r.grad_norm for r in reports[2:]], rel=1e-3)
    third = by_torch(Path(stopped(tmp_path / "mlx")), tmp_path / "back", go_on=True)
    assert [r.loss for r in third] == pytest.approx(losses[STOPPED:], rel=1e-5)
    names = [set(tensors(tmp_path / one / "step-000006")) for one in ("torch", "mlx", "back")]
    assert names[0] == names[1] == names[2]


# --- what goes wrong ----------------------------------------------------------------------------------------------------


def test_another_run_is_refused(alone: tuple[Path, list[float]], tmp_path: Path) -> None:
    source = stopped(alone[0])
    model = load(source, groups=single_groups())
    with pytest.raises(CheckpointError, match=r"differs in seed \(0 then, 1 now\)"):
        train(model, TEXT, replace(SETTINGS, seed=1), saves=Saves(tmp_path / "run"), resume=source)
    with pytest.raises(CheckpointError, match=r"the text \(600 tokens then, 599 now"):
        train(model, TEXT[:-1], SETTINGS, saves=Saves(tmp_path / "run"), resume=source)
    assert not (tmp_path / "run").exists()


def test_moments_of_another_dtype_are_refused(alone: tuple[Path, list[float]]) -> None:
    source = stopped(alone[0])
    model = load(source, dtype="bfloat16", groups=single_groups())
    with pytest.raises(CheckpointError, match=r"is F32, but .* was loaded as mlx\.core\.bfloat16"):
        train(model, TEXT, SETTINGS, resume=source)


def loses_its_number(source: str, folder: str) -> None:
    model = load(source, tp=2)
    _, groups = plan_of(model)
    assert groups.tp.size == 2

    def spoil(report: StepReport) -> None:
        if report.step == 2:
            home, key = parameter_homes(model)["model.norm.weight"]
            home[key] = home[key] * float("nan")

    with pytest.raises(ModelError, match="step 3: the loss is nan"):
        train(model, TEXT, SETTINGS, saves=Saves(Path(folder), every=1), on_step=spoil)


def test_a_loss_that_is_no_number_leaves_what_was_saved_before(
    written: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    mlx_ranks(2).run(loses_its_number, str(written["llama"]), str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "latest", "step-000001", "step-000002"]
