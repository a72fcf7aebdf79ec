"""Activation checkpointing: the gradients of the same mesh without it, in less memory."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from partita.core.mesh import Mesh
from partita.core.plan import Plan
from partita.errors import ModelError, PlanError
from partita.mlx.collectives.groups import single_groups
from partita.mlx.load import shard
from partita.mlx.model.mlx_lm_models import quantize, spec_of
from partita.mlx.proof.family import plan_of_model
from partita.mlx.stages.pipeline import Pipeline
from partita.mlx.train import gradients_of, train
from partita.mlx.weights.adapters import add_lora
from partita.schedule import build
from partita.training import TrainSettings
from tests.mlx.compare import EXACT, SINGLE, assert_equal
from tests.mlx.test_stage import whole
from tests.support.mlx_ranks import on_mlx

LENGTH = 8
ROWS = np.array([[(5 * i * i + 3 * i + 7 * row) % 101 for i in range(LENGTH + 1)] for row in range(8)])


def compare(
    family: str, mesh: tuple[int, int, int], layout: str | None, kind: str, dtype: str, changes: dict[str, Any]
) -> None:
    """Loss and gradients of this rank with each number of layers that are recomputed at once, and without."""
    dp, pp, tp = mesh
    model = whole(family, getattr(mx, dtype), **changes)
    rules = plan_of_model(model, Mesh(tp=tp)).rules
    placement: Any = "v" if kind == "zb-v" else "loop"
    plan = Plan.make(spec_of(model), Mesh(dp, pp, tp), layout, rules, placement=placement)
    split = shard(model, plan, groups=single_groups() if mesh == (1, 1, 1) else None)
    settings = TrainSettings(batch_size=8, sequence_length=LENGTH, microbatches=4 // dp)
    schedule = build(kind, pp, settings.microbatches, plan.vpp)
    loss, expected = gradients_of(Pipeline(split, schedule), ROWS, settings)
    for layers in (1, 2, 3, 9):
        again, found = gradients_of(Pipeline(split, schedule, part_layers=layers), ROWS, settings)
        assert again == pytest.approx(loss, rel=1e-15 if dtype == "float64" else 1e-6)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert_equal(gradient, expected[name], EXACT if dtype == "float64" else SINGLE, f"{layers} {name}")


@pytest.mark.parametrize(
    ("family", "mesh", "layout", "kind", "dtype", "changes"),
    [
        ("llama", (1, 1, 1), None, "1f1b", "float64", {}),
        ("llama", (1, 1, 2), None, "1f1b", "float64", {}),
        ("llama", (2, 1, 1), None, "1f1b", "float64", {"tie_word_embeddings": False}),
        ("llama", (1, 2, 1), None, "1f1b", "float64", {}),
        ("llama", (1, 2, 1), "Et|t|t|tL", "interleaved-1f1b", "float64", {}),
        ("llama", (1, 2, 1), "E|ttttL", "zb-h1", "float64", {"tie_word_embeddings": False}),
        ("llama", (1, 2, 1), "Et|t|t|tL", "zb-v", "float64", {}),
        ("llama", (1, 2, 2), None, "1f1b", "float64", {"num_key_value_heads": 1}),
        ("gpt2", (1, 1, 2), None, "1f1b", "float64", {}),
        ("gemma2", (1, 1, 2), None, "1f1b", "float64", {}),
        ("qwen3_moe", (1, 1, 2), None, "1f1b", "float32", {}),
        ("deepseek_v3", (1, 2, 1), None, "gpipe", "float32", {}),
    ],
)
def test_gradients_are_those_without_it(
    family: str, mesh: tuple[int, int, int], layout: str | None, kind: str, dtype: str, changes: dict[str, Any]
) -> None:
    on_mlx(int(np.prod(mesh)), compare, family, mesh, layout, kind, dtype, changes)


def peaks(mesh: tuple[int, int, int]) -> list[int]:
    """Peak memory of a backward beyond the model's, without, by three layers, and by single ones."""
    dp, pp, tp = mesh
    changes = {"num_hidden_layers": 12, "hidden_size": 64, "intermediate_size": 256}
    split = shard(whole("llama", **changes), dp=dp, pp=pp, tp=tp, groups=single_groups() if mesh == (1, 1, 1) else None)
    settings = TrainSettings(batch_size=8, sequence_length=64, microbatches=1)
    rows = np.random.default_rng(0).integers(0, 101, (8, 65))
    found = []
    for layers in (0, 3, 1):
        pipeline = Pipeline(split, build("1f1b", pp, 1, 1), part_layers=layers)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        gradients_of(pipeline, rows, settings)
        pipeline.gradients = {}
        found.append(mx.get_peak_memory() - before)
    return found


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 1, 2), (1, 2, 1)])
def test_it_takes_less_memory(mesh: tuple[int, int, int]) -> None:
    layers = 12 // mesh[1]
    for without, by_three, by_one in on_mlx(int(np.prod(mesh)), peaks, mesh):
        print(f"{mesh}: {without / 2**20:.1f} MiB, by three {by_three / 2**20:.1f}, by one {by_one / 2**20:.1f}")
        # Of 12 / pp layers the activations of one remain, beside the logits, gradients and a hidden state a layer.
        assert by_one < 0.8 * by_three < 0.8 * without
        assert by_one < without / (layers / 3)


def trained(mesh: tuple[int, int, int], checkpointing: Any, adapted: bool) -> list[float]:
    dp, pp, tp = mesh
    model = whole("llama", hidden_size=128, intermediate_size=128)
    if adapted:
        quantize(model, {"quantization": {"group_size": 32, "bits": 4}})
    split = shard(model, dp=dp, pp=pp, tp=tp, groups=single_groups() if mesh == (1, 1, 1) else None)
    if adapted:
        add_lora(split, 4, dropout=0.3)
    settings = TrainSettings(
        steps=3, batch_size=8, sequence_length=LENGTH, warmup_steps=1, microbatches=2, checkpointing=checkpointing
    )
    reports = train(split, ROWS.flatten().tolist(), settings, eval_data=ROWS.flatten().tolist())
    return [number for report in reports for number in (report.loss, report.grad_norm)] + [reports[-1].eval_loss or 0.0]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("mesh", [(1, 1, 2), (1, 2, 1)])
def test_a_run_is_the_same(mesh: tuple[int, int, int], adapted: bool) -> None:
    """Also with adapters whose inputs are dropped: what is recomputed drops the same."""
    expected = trained((1, 1, 1), False, adapted)
    for checkpointing in (True, "full", 2):
        for found in on_mlx(2, trained, mesh, checkpointing, adapted):
            assert found == pytest.approx(expected, rel=1e-4)


def test_what_cannot_be_recomputed_is_refused() -> None:
    model = shard(whole("llama"), groups=single_groups())
    settings: dict[str, Any] = {"steps": 1, "batch_size": 8, "sequence_length": LENGTH}
    with pytest.raises(PlanError, match="checkpointing='selective': MLX differentiates functions"):
        train(model, ROWS.flatten().tolist(), TrainSettings(**settings, checkpointing="selective"))
    with pytest.raises(ModelError, match=r"gemma3n cannot be trained with checkpointing.*Leave checkpointing out"):
        train(
            shard(whole("gemma3n"), groups=single_groups()),
            ROWS.flatten().tolist(),
            TrainSettings(**settings, checkpointing=2),
        )
