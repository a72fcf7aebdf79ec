"""A bfloat16 model was trained in bfloat16 on MLX: at the default learning rate most steps of norms were rounded away."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from partita.errors import CheckpointError
from partita.mlx.collectives.groups import single_groups
from partita.mlx.load import load
from partita.mlx.model.parts import plan_of
from partita.mlx.model.trainable import Trainable
from partita.mlx.new import fresh
from partita.mlx.stages.pipeline import Pipeline
from partita.mlx.train import gradients_of, train
from partita.mlx.training.optimizer import AdamW
from partita.mlx.training.replicas import clip_gradients
from partita.mlx.weights.adapters import add_lora
from partita.mlx.weights.moments import restore_optimizer
from partita.mlx.weights.peft_format import load_adapters
from partita.mlx.weights.save import save
from partita.training import TrainSettings, row_starts, schedule_of
from partita.training.saving import Saves
from tests.mlx.test_fresh import LLAMA
from tests.mlx.test_resume import TEXT, write_restored
from tests.mlx.test_save import digest, tensors
from tests.support.masters import distance, masters_of
from tests.support.mlx_ranks import on_mlx

SETTINGS = TrainSettings(steps=20, batch_size=4, sequence_length=12, min_learning_rate=1.0)
"""The default learning rate, after its warm-up."""
TIED: dict[str, Any] = {
    **LLAMA, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": False,
    "mlp_bias": False, "tie_word_embeddings": True, "dtype": "bfloat16",
}  # fmt: skip
"""Its head is its embedding, which two stages hold; three tensor ranks hold one of its KV heads twice."""

Mesh = tuple[int, int, int]
"""dp, pp, tp."""
ALONE: Mesh = (1, 1, 1)
MESHES: list[Any] = [(1, 1, 2), (1, 2, 1), (2, 1, 1), pytest.param((1, 1, 3), marks=pytest.mark.slow)]


def where(mesh: Mesh) -> dict[str, Any]:
    dp, pp, tp = mesh
    return {"groups": single_groups()} if mesh == ALONE else {"dp": dp, "pp": pp, "tp": tp}


def run(mesh: Mesh, folder: str, resume: str | None = None) -> None:
    """Train to the end, with checkpoints, from the beginning or from a checkpoint."""
    model = load(resume, **where(mesh)) if resume else fresh(TIED, seed=3, **where(mesh))
    train(model, TEXT, SETTINGS, saves=Saves(Path(folder), every=10, max_shard_bytes=60_000), resume=resume)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank: its checkpoint at the middle and the one at its end."""
    folder = tmp_path_factory.mktemp("alone")
    run(ALONE, str(folder))
    return folder


def test_norm_weights_move_at_the_default_rate(alone: Path) -> None:
    found = tensors(alone / "step-000020")
    masters = masters_of(found)
    weights = {n: a for n, a in found.items() if not n.startswith(("master.", "exp_avg"))}
    assert masters.keys() == weights.keys()
    for name, master in masters.items():
        assert master.dtype == found[f"exp_avg.{name}"].dtype == found[f"exp_avg_sq.{name}"].dtype == mx.float32
        assert weights[name].dtype == mx.bfloat16
        assert mx.array_equal(weights[name], master.astype(mx.bfloat16))
    norms = [a for n, a in weights.items() if "norm" in n]
    assert len(norms) == 5
    assert all(mx.any(norm != 1).item() for norm in norms)


def by_hand(mesh: Mesh) -> tuple[bool, bool]:
    """Whether `train` gives the weights of AdamW by hand, in NumPy's float32, and whether they have moved."""
    settings = replace(SETTINGS, steps=4, learning_rate=3e-3, warmup_steps=1, clip_norm=0.5, microbatches=2)
    trained, other = (fresh(TIED, seed=3, **where(mesh)) for _ in range(2))
    train(trained, TEXT, settings)
    (plan, groups), text = plan_of(other), np.asarray(TEXT, np.int64)
    trainable, pipeline = Trainable(other), Pipeline(other, schedule_of(plan, settings))
    first = {name: np.array(home[key].astype(mx.float32)) for name, (home, key) in trainable.homes.items()}
    state = {name: [a, np.zeros_like(a), np.zeros_like(a)] for name, a in first.items()}
    other.train()
    for step in range(settings.steps):
        starts = row_starts(len(text), step, settings.batch_size, settings.sequence_length, settings.seed)
        rows = np.stack([text[start : start + settings.sequence_length + 1] for start in starts])
        _, gradients = gradients_of(pipeline, rows, settings, step)
        clip_gradients(gradients, other, plan, groups, settings.clip_norm)
        rate, count = settings.learning_rate_at(step), step + 1
        for name, (weight, mean, square) in state.items():
            gradient = np.array(gradients[name].astype(mx.float32))
            mean = mean + (1 - 0.9) * (gradient - mean)
            square = 0.95 * square + (1 - 0.95) * (gradient * gradient)
            decay = 1 - rate * settings.weight_decay if weight.ndim >= 2 else 1.0
            scale = (1 - 0.95**count) ** 0.5
            weight = weight * decay - rate / (1 - 0.9**count) * (mean / (np.sqrt(square) / scale + settings.epsilon))
            assert weight.dtype == np.float32
            state[name] = [weight, mean, square]
            home, key = trainable.homes[name]
            home[key] = mx.array(weight).astype(mx.bfloat16)
    found = {name: home[key] for name, (home, key) in Trainable(trained).homes.items()}
    same = all(mx.array_equal(array, trainable.homes[n][0][trainable.homes[n][1]]).item() for n, array in found.items())
    return same, any(not np.array_equal(first[n], state[n][0]) for n in first)


@pytest.mark.parametrize("mesh", [ALONE, *MESHES], ids=str)
def test_every_rank_steps_float32_copies(mesh: Mesh) -> None:
    size = math.prod(mesh)
    assert on_mlx(size, by_hand, mesh) == [(True, True)] * size


@pytest.mark.parametrize("mesh", [ALONE, *MESHES], ids=str)
def test_resumes_bit_for_bit_on_the_same_layout(mesh: Mesh, alone: Path, tmp_path: Path) -> None:
    whole, size = alone, math.prod(mesh)
    if size > 1:
        on_mlx(size, run, mesh, str(tmp_path / "whole"))
        whole = tmp_path / "whole"
    on_mlx(size, run, mesh, str(tmp_path / "again"), str(whole / "step-000010"))
    assert digest(tmp_path / "again" / "step-000020") == digest(whole / "step-000020")


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_resumes_on_another_layout(mesh: Mesh, alone: Path, tmp_path: Path) -> None:
    on_mlx(math.prod(mesh), run, mesh, str(tmp_path), str(alone / "step-000010"))
    start, expected, found = (
        masters_of(tensors(folder))
        for folder in (alone / "step-000010", alone / "step-000020", tmp_path / "step-000020")
    )
    assert distance(found, expected, start) < 0.02


def write_again(mesh: Mesh, source: str, folder: str) -> None:
    """Load a checkpoint with the optimizer's state, and write it without a step between."""
    model = load(source, **where(mesh))
    write_restored(model, SETTINGS, source, Saves(Path(folder), every=1, max_shard_bytes=60_000))


@pytest.mark.parametrize("mesh", [ALONE, *MESHES], ids=str)
def test_masters_on_disk_do_not_depend_on_the_layout(mesh: Mesh, alone: Path, tmp_path: Path) -> None:
    on_mlx(math.prod(mesh), write_again, mesh, str(alone / "step-000010"), str(tmp_path))
    assert digest(tmp_path / "step-000010") == digest(alone / "step-000010")


def test_torch_goes_on_with_the_same_masters(alone: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tests.bugs.test_bfloat16_weights_did_not_move import write_again as write_again_by_torch

    expected = tensors(alone / "step-000010")
    write_again_by_torch({}, str(alone / "step-000010"), str(tmp_path / "torch"))
    write_again(ALONE, str(tmp_path / "torch" / "step-000010"), str(tmp_path / "back"))
    for folder in (tmp_path / "torch" / "step-000010", tmp_path / "back" / "step-000010"):
        found = tensors(folder)
        assert found.keys() == expected.keys()
        assert all(mx.array_equal(found[n], a) and found[n].dtype == a.dtype for n, a in expected.items())


def restored(source: Path, *, dtype: str | None = None, master_dtype: str = "float32") -> AdamW:
    """An optimizer that goes on from a checkpoint."""
    model = load(source, dtype=dtype, groups=single_groups())
    optimizer = AdamW(SETTINGS.weight_decay, SETTINGS.epsilon, master_dtype=master_dtype)
    restore_optimizer(model, Trainable(model), optimizer, source)
    return optimizer


def changed(source: Path, folder: Path, change: Any) -> Path:
    """A copy of a checkpoint whose optimizer's state is what `change` makes of it."""
    folder.mkdir()
    for file in source.iterdir():
        if not file.name.startswith("optimizer"):
            (folder / file.name).write_bytes(file.read_bytes())
    state = {n: a for n, a in tensors(source).items() if n.startswith(("master.", "exp_avg"))}
    mx.save_safetensors(str(folder / "optimizer.safetensors"), change(state))
    return folder


def test_a_checkpoint_without_masters_goes_on_from_its_weights(alone: Path, tmp_path: Path) -> None:
    def without(state: dict[str, mx.array]) -> dict[str, mx.array]:
        return {n: a.astype(mx.bfloat16) for n, a in state.items() if not n.startswith("master.")}

    source = changed(alone / "step-000010", tmp_path / "old", without)
    optimizer, weights = restored(source), tensors(source)
    assert optimizer.masters.keys() == {n for n in weights if not n.startswith("exp_avg")}
    for name, master in optimizer.masters.items():
        assert master.dtype == optimizer.means[name].dtype == mx.float32
        assert mx.array_equal(master, weights[name].astype(mx.float32))


def test_state_of_another_dtype_is_refused(alone: Path, tmp_path: Path) -> None:
    source = alone / "step-000010"
    with pytest.raises(
        CheckpointError, match=r"has master\.\S+, so \S+ was trained .* narrower dtype than mlx.core.float32"
    ):
        restored(source, dtype="float32")
    with pytest.raises(CheckpointError, match=r"has master\.\S+, .* and keep the run's master_dtype"):
        restored(source, master_dtype="model")
    wide = changed(source, tmp_path / "wide", lambda s: {n: a for n, a in s.items() if not n.startswith("master.")})
    with pytest.raises(
        CheckpointError, match=r"exp_avg\.\S+ is F32, but \S+ was loaded as mlx.core.bfloat16\. Load it"
    ):
        restored(wide)


def test_the_models_dtype_on_request(tmp_path: Path) -> None:
    model = fresh(TIED, seed=3, groups=single_groups())
    train(model, TEXT, replace(SETTINGS, steps=2, master_dtype="model"), saves=Saves(tmp_path))
    assert {array.dtype for array in tensors(tmp_path / "step-000002").values()} == {mx.bfloat16}


def adapted(mesh: Mesh, base: str, folder: str, resume: str | None = None) -> None:
    model = load(base, **where(mesh))
    if resume is None:
        add_lora(model, 2, seed=5)
    else:
        load_adapters(model, resume)
    train(model, TEXT, SETTINGS, saves=Saves(Path(folder), every=10, base=base), resume=resume)


@pytest.mark.parametrize("mesh", [ALONE, (1, 1, 2)], ids=str)
def test_adapters_of_a_bfloat16_model_have_masters(mesh: Mesh, tmp_path: Path) -> None:
    base, size = str(tmp_path / "base"), math.prod(mesh)
    save(fresh(TIED, seed=3, groups=single_groups()), base)
    on_mlx(size, adapted, mesh, base, str(tmp_path / "whole"))
    on_mlx(size, adapted, mesh, base, str(tmp_path / "again"), str(tmp_path / "whole" / "step-000010"))
    last = tmp_path / "whole" / "step-000020"
    assert digest(tmp_path / "again" / "step-000020") == digest(last)
    found = tensors(last)
    masters = masters_of(found)
    assert len(masters) == 2 * 2 * 7
    for name, master in masters.items():
        assert found[name].dtype == mx.bfloat16
        assert master.dtype == mx.float32
        assert mx.array_equal(found[name], master.astype(mx.bfloat16))
        assert not mx.array_equal(found[name].astype(mx.float32), master)
