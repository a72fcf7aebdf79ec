"""`verify` on MLX: it calls equal what is equal, over every mesh and schedule, and wrong what is not."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from partita.core.mesh import Mesh
from partita.mlx.collectives.groups import make_groups, single_groups
from partita.mlx.load import shard
from partita.mlx.model.mlx_lm_models import quantize
from partita.mlx.model.parts import parameter_homes, plan_of
from partita.mlx.proof.compare import compare_parameters
from partita.mlx.proof.family import plan_of_model
from partita.mlx.train import train
from partita.mlx.verify import verify
from partita.mlx.weights.save import save
from partita.proof.differences import Difference, largest_of_ranks
from partita.training import TrainSettings
from tests.mlx.test_stage import whole
from tests.support.mlx_models import tiny_config
from tests.support.mlx_ranks import mlx_ranks

KINDS = {"module", "output", "gradient", "tokens", "loss", "parameter"}


def verified(file: str, options: dict[str, Any]) -> list[tuple[str, str, float, float]]:
    """The rows of a report, on this rank."""
    report = verify(file, **options)
    assert report.equal, [row for row in report.rows if not row.ok]
    not_trained = {"loss", "parameter"} if options.get("dtype") == "float16" else set()
    assert {kind for skip in report.skipped for kind in skip.kinds} == not_trained
    return [(row.kind, row.name, row.error, row.tolerance) for row in report.rows]


@pytest.mark.parametrize(
    ("size", "family", "options"),
    [
        (2, "llama", {"tp": 2}),
        (2, "llama", {"dp": 2, "microbatches": 2}),
        (2, "llama", {"pp": 2, "microbatches": 4}),
        (2, "llama", {"pp": 2, "microbatches": 3, "schedule": "zb-h1"}),
        (2, "llama", {"pp": 2, "vpp": 2, "microbatches": 4, "schedule": "interleaved-1f1b", "group_size": 2}),
        (2, "llama", {"pp": 2, "vpp": 2, "placement": "v", "microbatches": 3, "schedule": "zb-v"}),
        (2, "llama", {"pp": 2, "layout": "E|ttttL", "microbatches": 2, "schedule": "gpipe"}),
        (4, "llama", {"pp": 2, "tp": 2, "microbatches": 2}),
        (4, "gpt2", {"pp": 2, "dp": 2, "microbatches": 2}),
        (2, "gemma2", {"tp": 2}),
    ],
)
def test_in_float64_to_the_last_digits(size: int, family: str, options: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**tiny_config(family), "tie_word_embeddings": True}))
    ranks = mlx_ranks(size).run(verified, str(file), {**options, "steps": 3, "dtype": "float64"})
    assert all(rows == ranks[0] for rows in ranks)
    kinds = [kind for kind, *_ in ranks[0]]
    assert set(kinds) == KINDS
    modules = {name for kind, name, *_ in ranks[0] if kind == "module"}
    if "tp" not in options:
        assert modules >= {name.rpartition(".")[0] for name in parameter_homes(whole(family))}
    assert kinds.count("loss") == 3
    parameters = {name for kind, name, *_ in ranks[0] if kind == "parameter"}
    assert parameters == set(parameter_homes(whole(family)))
    assert {name for kind, name, *_ in ranks[0] if kind == "gradient"} == parameters
    trained = [(error, tolerance) for kind, _, error, tolerance in ranks[0] if kind in ("loss", "parameter")]
    assert {tolerance for _, tolerance in trained} == {1e-12}


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_in_float32(family: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(tiny_config(family)))
    rows, _ = mlx_ranks(2).run(verified, str(file), {"tp": 2, "steps": 2})
    assert {tolerance for kind, _, _, tolerance in rows if kind == "parameter"} == {1e-5}


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {"tp": 2}), ("gpt2", {"tp": 2}), ("llama", {"pp": 2, "microbatches": 2}), ("gemma2", {"tp": 2})],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounds_at_most_twice_as_much(family: str, options: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(tiny_config(family)))
    rows, other = mlx_ranks(2).run(verified, str(file), {**options, "steps": 2, "dtype": dtype})
    assert rows == other
    not_trained = {"loss", "parameter"} if dtype == "float16" else set()
    assert {kind for kind, *_ in rows} == {*KINDS, "dtype"} - not_trained
    errors = [error for kind, _, error, _ in rows if kind == "gradient"]
    unit = 2.0**-8 if dtype == "bfloat16" else 2.0**-11
    assert unit / 4 < max(errors) < 64 * unit


def test_no_steps_train_nothing(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(tiny_config("llama")))
    assert {row.kind for row in verify(file, steps=0).rows} == KINDS - {"loss", "parameter"}


def test_a_quantized_checkpoint(tmp_path: Path) -> None:
    """What is packed is compared too, but not trained."""
    model = whole("llama")
    quantize(model, {"quantization": {"group_size": 32, "bits": 4}})
    save(shard(model, groups=single_groups()), tmp_path / "model")
    rows, _ = mlx_ranks(2).run(verified, str(tmp_path / "model"), {"tp": 2, "steps": 2})
    parameters = {name for kind, name, *_ in rows if kind == "parameter"}
    assert {"model.layers.0.mlp.up_proj.scales", "model.layers.3.input_layernorm.weight"} <= parameters
    assert "model.layers.0.mlp.up_proj.weight" not in parameters  # its bits are no number


def test_a_quantized_config_without_weights_stands_for_a_model_that_is_not(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**tiny_config("llama"), "quantization": {"group_size": 32, "bits": 4}}))
    report = verify(file, steps=1)
    assert report.equal
    assert "model.layers.0.mlp.up_proj.weight" in {row.name for row in report.rows if row.kind == "parameter"}


def one_wrong(tp: int, pp: int, name: str, wrong_rank: int) -> list[tuple[str, float]]:
    """What differs when one rank has another value at one place of one array."""
    model = whole("llama", mx.float64)
    mesh = Mesh(tp=tp, pp=pp)
    split = shard(copy.deepcopy(model), plan_of_model(model, mesh))
    plan, groups = plan_of(split)
    homes = parameter_homes(split)
    if groups.rank == wrong_rank:
        home, key = homes[name]
        home[key] = home[key] + mx.zeros_like(home[key]).at[..., -1:].add(1e-6)
    return [(d.name, d.error) for d in compare_parameters(model, split, plan, groups)]


@pytest.mark.parametrize(
    ("tp", "pp", "name", "wrong_rank"),
    [
        (2, 1, "model.layers.1.self_attn.o_proj.weight", 1),
        (2, 1, "model.norm.weight", 0),
        (1, 2, "model.layers.3.mlp.up_proj.weight", 1),
        (1, 2, "model.layers.0.input_layernorm.weight", 0),
    ],
)
def test_one_wrong_number_on_one_rank_is_named_on_all(tp: int, pp: int, name: str, wrong_rank: int) -> None:
    ranks = mlx_ranks(2).run(one_wrong, tp, pp, name, wrong_rank)
    assert ranks[0] == ranks[1]
    assert [found for found, error in ranks[0] if error > 1e-12] == [name]
    assert [found for found, _ in ranks[0]] == list(parameter_homes(whole("llama")))


def test_other_data_gives_other_parameters() -> None:
    model = whole("llama", mx.float64)
    one, other = (shard(copy.deepcopy(model), groups=single_groups()) for _ in range(2))
    settings = TrainSettings(steps=1, batch_size=1, sequence_length=8)
    train(one, np.arange(9), settings)
    train(other, np.arange(9) + 1, settings)
    plan, groups = plan_of(other)
    errors = {d.name: d.error for d in compare_parameters(one, other, plan, groups)}
    assert min(error for name, error in errors.items() if name.endswith("proj.weight")) > 1e-6


def test_not_a_number_is_not_equal() -> None:
    model = whole("llama", mx.float64)
    split = shard(copy.deepcopy(model), groups=make_groups(Mesh()))
    split.model.norm.weight = split.model.norm.weight * float("nan")
    plan, groups = plan_of(split)
    assert [d.name for d in compare_parameters(model, split, plan, groups) if not d.error <= 1e-12] == [
        "model.norm.weight"
    ]


def worst_of(errors: list[float]) -> list[float]:
    groups = make_groups(Mesh(tp=len(errors)))
    mine = [Difference("output", "the model", errors[groups.rank])]
    return [d.error for d in largest_of_ranks(mine, (groups.tp, groups.pp), [d.name for d in mine])]


@pytest.mark.parametrize("errors", [[0.0, 1e-3], [1e-3, 0.0], [float("inf"), 0.5], [0.0, 0.0]])
def test_the_worst_rank_speaks_for_all(errors: list[float]) -> None:
    assert mlx_ranks(2).run(worst_of, errors) == [[max(errors)]] * 2


@pytest.mark.parametrize("place", [0, 1])
def test_not_a_number_is_worse_than_any(place: int) -> None:
    errors = [0.5, 0.5]
    errors[place] = float("nan")
    for (worst,) in mlx_ranks(2).run(worst_of, errors):
        assert np.isnan(worst)
