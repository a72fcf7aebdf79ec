"""Replicas drew adapters of their own, and summed only the gradients that each of them happened to have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from partita.errors import ModelError
from partita.torch.collectives.groups import single_groups
from partita.torch.model.float64 import Float64Everywhere
from partita.torch.model.parts import plan_of
from partita.torch.new import fresh
from partita.torch.proof.compare import compare_parameters
from partita.torch.train import TrainSettings, train
from partita.torch.weights.adapters import add_lora
from tests.support.mlx_ranks import mlx_ranks
from tests.support.models import CONFIGS
from tests.support.ranks import ranks
from tests.torch.test_schedules import tokens

SETTINGS = TrainSettings(steps=3, batch_size=4, sequence_length=12, learning_rate=3e-3, warmup_steps=1, epsilon=1e-4)
DROPPING = {**CONFIGS["opt"], "num_hidden_layers": 4, "layerdrop": 0.5, "dropout": 0.0}


def rank_number() -> int:
    return torch.distributed.get_rank()


def adapters_of(mesh: dict[str, int], seed: int | None) -> dict[str, list[float]]:
    """The unsplit `lora_A` of this rank's adapters, of ranks whose generators differ."""
    model = fresh(CONFIGS["llama-3-heads"], dtype="float64", seed=3, **mesh)
    torch.manual_seed(100 + rank_number())
    add_lora(model, 2, seed=seed)
    return {n: p.flatten().tolist() for n, p in model.named_parameters() if "lora_A" in n and "o_proj" not in n}


@pytest.mark.parametrize("seed", [None, 7])
def test_replicas_and_tensor_ranks_have_the_same_adapters(seed: int | None) -> None:
    for mesh in ({"dp": 2}, {"tp": 2}):
        first, second = ranks(2).run(adapters_of, mesh, seed)
        columns = {name for name in first if "down_proj" not in name}
        assert len(columns) == 2 * 5
        assert {name: first[name] for name in columns} == {name: second[name] for name in columns}


def test_adapters_of_stages_are_those_of_one_rank() -> None:
    first, second = ranks(2).run(adapters_of, {"pp": 2}, 7)
    whole, _ = ranks(2).run(adapters_of, {"dp": 2}, 7)
    assert first | second == whole
    first, second = ranks(2).run(adapters_of, {"pp": 2}, None)
    assert len({tuple(values) for values in (first | second).values()}) == len(first) + len(second)


def unlike_at_first() -> list[float]:
    """A trained bias that each replica had begun with a value of its own."""
    model = fresh(CONFIGS["qwen2-14-heads-2-kv"], dtype="float64", seed=3, dp=2)
    bias = next(p for n, p in model.named_parameters() if n.endswith("q_proj.bias"))
    with torch.no_grad():
        bias.fill_(float(rank_number()))
    train(model, tokens(), SETTINGS)
    return bias.flatten().tolist()  # type: ignore[no-any-return]


def test_replicas_begin_with_the_first_ones_parameters() -> None:
    first, second = ranks(2).run(unlike_at_first)
    assert first == second
    assert max(abs(value) for value in first) < 0.5


def unlike_on_mlx() -> list[list[float]]:
    """Adapters that mlx-lm put on with random numbers of each rank's own."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    from partita.mlx.collectives.groups import init
    from partita.mlx.new import fresh as fresh_on_mlx
    from partita.mlx.train import train as train_on_mlx

    model = fresh_on_mlx(CONFIGS["llama-3-heads"], seed=3, dp=2)
    model.freeze()
    mx.random.seed(100 + init().rank)
    linear_to_lora_layers(model, 2, {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]})
    train_on_mlx(model, [token % 23 for token in range(500)], SETTINGS)
    return [array.flatten().tolist() for _, array in tree_flatten(model.trainable_parameters())]


def test_replicas_on_mlx_begin_with_the_first_ones_adapters() -> None:
    first, second = mlx_ranks(2).run(unlike_on_mlx)
    assert len(first) == 2 * 2
    assert first == second


def dropped(zero: int) -> tuple[float, float]:
    """How far two replicas of a model with layer drop are from one rank that has their micro-batches."""
    with Float64Everywhere():
        whole = fresh(DROPPING, dtype="float64", seed=3, groups=single_groups())
        expected = train(whole, tokens(), replace(SETTINGS, microbatches=2))
        split = fresh(DROPPING, dtype="float64", seed=3, dp=2)
        reports = train(split, tokens(), replace(SETTINGS, zero=zero))
    loss = max(abs(a.loss / b.loss - 1) for a, b in zip(reports, expected, strict=True))
    return loss, max(one.error for one in compare_parameters(whole, split, *plan_of(split)))


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_replicas_that_leave_out_other_layers_train_like_one_rank(zero: int) -> None:
    for loss, parameter in ranks(2).run(dropped, zero):
        assert max(loss, parameter) <= 1e-12, (loss, parameter)


def over_stages(own_loop: bool) -> str:
    model: Any = fresh(DROPPING, dtype="float64", seed=3, pp=2)
    try:
        if own_loop:
            model.train()
            model(input_ids=tokens()[:24].view(2, 12))
        else:
            train(model, tokens(), SETTINGS)
    except ModelError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("own_loop", [False, True])
def test_layer_drop_over_stages_is_refused(own_loop: bool) -> None:
    for said in ranks(2).run(over_stages, own_loop):
        assert said.startswith("layerdrop=0.5 skips whole layers in training")
        assert "or use pp=1" in said


def skipping(which: int) -> str:
    """What is raised where a model leaves out a layer of its own accord."""
    model: Any = fresh({**DROPPING, "layerdrop": 0.0}, dtype="float64", seed=3, pp=2)
    decoder = model.model.decoder
    forward = type(decoder).forward
    left_out = list(range(4))[which]

    class Skipping(type(decoder)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            items = self.layers.run.items
            self.layers.run.items = items[:left_out] + items[left_out + 1 :]
            return forward(self, *args, **kwargs)

    decoder.__class__ = Skipping
    try:
        with torch.no_grad():
            from partita.torch.stages.layers import Message
            from partita.torch.stages.run import run_stage

            plan, groups = plan_of(model)
            received = Message((torch.ones(2, 12, 56, dtype=torch.float64),)) if groups.pp.rank else None
            run_stage(
                model, plan, groups.pp.rank, received, {"input_ids": tokens()[:24].view(2, 12), "use_cache": False}
            )
    except ModelError as error:
        return str(error)
    return "nothing"


def test_a_layer_at_the_edge_of_a_stage_that_is_left_out_is_an_error() -> None:
    for said in ranks(2).run(skipping, 2):
        assert "skipped the first or the last layer of a stage" in said
