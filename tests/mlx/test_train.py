"""Training over any mesh and schedule: the loss curve, norms and parameters of one rank alone, and of the torch engine."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.tuner.utils import linear_to_lora_layers

from partita.core.mesh import Mesh
from partita.core.plan import Plan
from partita.errors import ModelError, PlanError
from partita.mlx.collectives.groups import single_groups
from partita.mlx.load import load, shard
from partita.mlx.model.mlx_lm_models import quantize, spec_of
from partita.mlx.model.parts import local_ranges, parameter_homes, plan_of, take
from partita.mlx.model.trainable import Trainable
from partita.mlx.proof.family import plan_of_model
from partita.mlx.stages.pipeline import Pipeline
from partita.mlx.train import gradients_of, train
from partita.schedule import Timeline, build
from partita.training import StepReport, TrainSettings, row_starts
from partita.training.data import order
from tests.mlx.compare import assert_equal
from tests.mlx.test_stage import whole
from tests.support.mlx_ranks import mlx_ranks

TEXT = [(7 * i * i + 3 * i) % 101 for i in range(600)]
SETTINGS: dict[str, Any] = {
    "steps": 3,
    "batch_size": 8,
    "sequence_length": 12,
    "warmup_steps": 2,
    "learning_rate": 1e-2,
}
SMALL_STEP = 1e-3
"""AdamW's first steps divide gradients by their own size, so that rounding of tiny ones shows: parameters are compared to
within this share of what a step may change, a hundredth of the learning rate."""


def run(
    family: str, mesh: tuple[int, int, int], changes: dict[str, Any], settings: dict[str, Any], dtype: str = "float32"
) -> tuple[list[StepReport], list[str]]:
    """Train on this rank, and compare what it has with what one rank alone has after the same; the names of it."""
    config = {"layout": None, "placement": "loop", **changes}
    layout, placement = config.pop("layout"), config.pop("placement")
    model = whole(family, getattr(mx, dtype), **config)
    alone = shard(copy.deepcopy(model), groups=single_groups())
    dp, pp, tp = mesh
    plan = Plan.make(
        spec_of(model), Mesh(dp, pp, tp), layout, plan_of_model(model, Mesh(tp=tp)).rules, placement=placement
    )
    split = shard(model, plan)
    chosen = TrainSettings(**{**SETTINGS, **settings})
    reference = train(alone, TEXT, TrainSettings(**SETTINGS))
    reports = train(split, TEXT, chosen)
    exact = dtype == "float64"
    for mine, theirs in zip(reports, reference, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-9 if exact else 1e-5)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-6 if exact else 1e-4)
        assert mine.learning_rate == theirs.learning_rate
    expected = {name: home[key] for name, (home, key) in parameter_homes(alone).items()}
    names = []
    for name, (home, key) in parameter_homes(split).items():
        part = take(expected[name], local_ranges(home, key, name, plan, plan_of(split)[1].tp.rank))
        error = mx.abs(part.astype(mx.float64) - home[key].astype(mx.float64)).max().item()
        assert error <= (1e-6 if exact else SMALL_STEP), f"{name}: {error}"
        names.append(name)
    assert reports[-1].loss < reports[0].loss
    return reports, names


@pytest.mark.parametrize(
    ("size", "family", "mesh", "changes", "settings"),
    [
        (2, "llama", (1, 1, 2), {}, {}),
        (2, "llama", (2, 1, 1), {}, {"microbatches": 2}),
        (2, "llama", (1, 2, 1), {"tie_word_embeddings": False}, {"microbatches": 4}),
        (2, "llama", (1, 2, 1), {"layout": "E|ttttL"}, {"microbatches": 2, "schedule": "gpipe"}),
        (2, "llama", (1, 2, 1), {"layout": "Et|t|t|tL"}, {"microbatches": 4}),
        (2, "llama", (1, 2, 1), {"layout": "Et|t|t|tL", "placement": "v"}, {"microbatches": 4, "schedule": "zb-v"}),
        (2, "qwen3_moe", (1, 2, 1), {}, {"microbatches": 2}),
        (3, "gpt2", (1, 3, 1), {}, {"microbatches": 4, "schedule": "zb-h1"}),
        (4, "llama", (1, 2, 2), {"num_key_value_heads": 1}, {"microbatches": 2}),
        (4, "gemma2", (2, 2, 1), {}, {"microbatches": 2}),
    ],
)
def test_the_loss_curve_and_every_parameter(
    size: int, family: str, mesh: tuple[int, int, int], changes: dict[str, Any], settings: dict[str, Any]
) -> None:
    ranks = mlx_ranks(size).run(run, family, mesh, changes, settings)
    curves = [[number for r in reports for number in (r.loss, r.grad_norm)] for reports, _ in ranks]
    assert all(curve == curves[0] for curve in curves)


@pytest.mark.parametrize("mesh", [(1, 2, 1), (1, 1, 2)])
def test_in_float64(mesh: tuple[int, int, int]) -> None:
    mlx_ranks(2).run(run, "llama", mesh, {}, {"microbatches": 2}, "float64")


def run_lora(mesh: tuple[int, int, int], bits: int) -> list[float]:
    model = whole("llama", hidden_size=128, intermediate_size=128)
    if bits:
        quantize(model, {"quantization": {"group_size": 32, "bits": bits}})
    alone = shard(copy.deepcopy(model), groups=single_groups())
    dp, pp, tp = mesh
    split = shard(model, dp=dp, pp=pp, tp=tp)
    for made in (alone, split):
        made.freeze()
        linear_to_lora_layers(made, 4, {"rank": 4, "scale": 4.0, "dropout": 0.0})
    _begin_alike(alone, split)
    settings = TrainSettings(**{**SETTINGS, "microbatches": 2})
    reference, reports = train(alone, TEXT, settings), train(split, TEXT, settings)
    for mine, theirs in zip(reports, reference, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
    assert {name.rpartition(".")[2] for name in Trainable(split).names} == {"lora_a", "lora_b"}
    return [r.loss for r in reports]


def _begin_alike(alone: nn.Module, split: nn.Module) -> None:
    """Give an adapter on one rank alone what the ranks of a split one have together."""
    _, groups = plan_of(split)
    mine = {name: home[key] for name, (home, key) in parameter_homes(split).items() if name.endswith("lora_a")}
    for name, (home, key) in parameter_homes(alone).items():
        if name.endswith("lora_a"):
            # By the shape alone the values are the same everywhere.
            home[key] = mx.sin(mx.arange(home[key].size).astype(mx.float32)).reshape(home[key].shape) * 0.1
            if name in mine:
                layer, attribute = parameter_homes(split)[name]
                rows = home[key]
                if layer[attribute].shape != rows.shape:
                    width = layer[attribute].shape[0]
                    rows = rows[groups.tp.rank * width : (groups.tp.rank + 1) * width]
                layer[attribute] = rows


@pytest.mark.parametrize(
    ("size", "mesh", "bits"), [(2, (1, 2, 1), 4), (2, (1, 1, 2), 4), (4, (1, 2, 2), 8), (2, (1, 2, 1), 0)]
)
def test_lora_on_a_quantized_model(size: int, mesh: tuple[int, int, int], bits: int) -> None:
    ranks = mlx_ranks(size).run(run_lora, mesh, bits)
    assert all(rank == pytest.approx(ranks[0]) for rank in ranks)
    assert ranks[0][-1] < ranks[0][0]


def whole_gradients(kind: str, layout: str, placement: str, count: int) -> None:
    """Gradients of a batch over stages against those of one rank alone."""
    model = whole("llama", mx.float64)
    alone = shard(copy.deepcopy(model), groups=single_groups())
    plan = Plan.make(spec_of(model), Mesh(pp=2), layout, placement=placement)
    split = shard(model, plan)
    settings = TrainSettings(**{**SETTINGS, "microbatches": count})
    rows = np.array([TEXT[13 * i : 13 * i + 13] for i in range(8)])
    told: list[Timeline] = []
    vpp = plan.vpp
    pipeline = Pipeline(split, build(kind, 2, count, vpp))
    loss, mine = gradients_of(pipeline, rows, settings, on_timeline=told.append)
    expected_loss, expected = gradients_of(Pipeline(alone, build("1f1b", 1, 1, 1)), rows, TrainSettings(**SETTINGS))
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    for name, gradient in mine.items():
        assert_equal(gradient, expected[name], 1e-6, name)
    assert told[0].schedule.num_microbatches == count


@pytest.mark.parametrize(
    ("kind", "layout", "placement"),
    [
        ("gpipe", "Ett|ttL", "loop"),
        ("1f1b", "Ettt|tL", "loop"),
        ("zb-h1", "Ett|ttL", "loop"),
        ("interleaved-1f1b", "Et|t|t|tL", "loop"),
        ("interleaved-1f1b", "Ett||tt|L", "loop"),
        ("zb-v", "Et|t|t|tL", "v"),
    ],
)
def test_gradients_of_every_schedule(kind: str, layout: str, placement: str) -> None:
    mlx_ranks(2).run(whole_gradients, kind, layout, placement, 4)


@pytest.mark.parametrize("seed", [0, 3, 7 * 1_000_003 + 2, 123_456_789_012])
@pytest.mark.parametrize("count", [1, 2, 10, 999])
def test_the_order_of_the_data_is_that_of_torch(count: int, seed: int) -> None:
    torch = pytest.importorskip("torch")
    expected = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    assert list(order(count, seed)) == expected


def test_rows_of_a_step_do_not_depend_on_the_batches_before() -> None:
    by_four = [start for step in range(4) for start in row_starts(601, step, 4, 12, 5)]
    by_eight = [start for step in range(2) for start in row_starts(601, step, 8, 12, 5)]
    assert by_four == by_eight
    with pytest.raises(ModelError, match="the text has 12 tokens, which is less than one sequence of 12"):
        row_starts(12, 0, 4, 12, 0)


def test_the_curve_is_that_of_the_torch_engine(tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    import partita.torch as engine

    config = transformers.LlamaConfig(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    settings = TrainSettings(**SETTINGS)
    theirs = engine.train(engine.load(tmp_path, dtype="float32"), torch.tensor(TEXT), settings)
    mine = train(load(tmp_path, dtype="float32", groups=single_groups()), TEXT, settings)
    assert [r.loss for r in mine] == pytest.approx([r.loss for r in theirs], rel=1e-5)
    assert [r.grad_norm for r in mine] == pytest.approx([r.grad_norm for r in theirs], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 3, "microbatches": 2}, "batch_size must be a multiple"),
        ({"autocast": "bfloat16"}, "does not support autocast='bfloat16': load the model in that dtype"),
        ({"zero": True}, "the MLX engine does not support zero=1"),
        ({"checkpointing": "selective"}, "the MLX engine does not support checkpointing='selective'"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    model = shard(whole("llama"), groups=single_groups())
    with pytest.raises(PlanError, match=message):
        train(model, TEXT, TrainSettings(**{**SETTINGS, **changes}))


def test_a_frozen_model_has_nothing_to_train() -> None:
    model = shard(whole("llama"), groups=single_groups()).freeze()
    with pytest.raises(ModelError, match="no parameter of the model is trainable"):
        train(model, TEXT, TrainSettings(**SETTINGS))


def test_a_family_without_a_gradient_is_refused_with_the_operation() -> None:
    model = shard(whole("deepseek_v41"), groups=single_groups())
    with pytest.raises(ModelError, match=r"the gradients of deepseek_v41: \[gather_axis\] Cannot calculate VJP.*torch"):
        train(model, TEXT, TrainSettings(**SETTINGS))


def test_a_loss_that_is_not_finite_ends_it() -> None:
    model = shard(whole("llama"), groups=single_groups())
    model.model.norm.weight = model.model.norm.weight * float("nan")
    with pytest.raises(ModelError, match="step 1: the loss is nan"):
        train(model, TEXT, TrainSettings(**SETTINGS))
