"""The seed's call on models of mlx-lm and on any module with a list of layers."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import generate_step

from partita.errors import DistributedError, ModelError, PlanError
from partita.mlx.auto import pipeline_auto_parallel
from partita.mlx.collectives.groups import init
from partita.mlx.model.mlx_lm_models import quantize
from partita.mlx.model.parts import parameter_homes
from partita.mlx.proof.family import sample_inputs
from tests.mlx.compare import SINGLE, assert_equal
from tests.mlx.test_stage import whole
from tests.support.mlx_ranks import BACKENDS, mlx_ranks, on_mlx


def call(family: str, slices: list[tuple[int, int]] | None, native: bool) -> list[str]:
    """The final output on every rank, and mlx-lm's own generation; what this rank keeps."""
    model = whole(family)
    expected = copy.deepcopy(model)
    comm = init()
    start, end = slices[comm.rank] if slices else (None, None)
    made = pipeline_auto_parallel(model, comm.group if native else comm, start, end)
    assert made is model
    ids = sample_inputs(expected)
    assert_equal(model(ids), expected(ids), SINGLE)
    tokens = [int(token) for token, _ in generate_step(ids[0], model, max_tokens=5)]
    assert tokens == [int(token) for token, _ in generate_step(ids[0], expected, max_tokens=5)]
    return [
        name
        for name in parameter_homes(model)
        if name.endswith(("q_proj.weight", "embed_tokens.weight", "norm.weight"))
    ]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_every_rank_gets_the_final_output(family: str) -> None:
    mlx_ranks(2).run(call, family, None, True)


def test_slices_as_they_are_asked_for() -> None:
    kept = mlx_ranks(3).run(call, "llama", [(0, 1), (1, 1), (1, 4)], False)
    layers = [[int(name.split(".")[2]) for name in names if "q_proj" in name] for names in kept]
    assert layers == [[0], [], [1, 2, 3]]
    # The embedding is the head too.
    assert [any("embed" in name for name in names) for names in kept] == [True, False, True]
    assert ["model.norm.weight" in names for names in kept] == [False, False, True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_each_backend(backend: str) -> None:
    mlx_ranks(2, backend).run(call, "qwen2", None, False)


def test_one_rank_alone_keeps_all() -> None:
    on_mlx(1, call, "llama", None, False)


def quantized() -> None:
    model = whole("llama")
    quantize(model, {"quantization": {"group_size": 32, "bits": 4}})
    expected = copy.deepcopy(model)
    pipeline_auto_parallel(model)
    ids = sample_inputs(expected)
    assert_equal(model(ids), expected(ids), SINGLE)


def test_a_quantized_model() -> None:
    mlx_ranks(2).run(quantized)


class Plain(nn.Module):
    """No model of mlx-lm: nothing but a list of layers, between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = [nn.Linear(8, 8) for _ in range(3)]
        self.out = nn.Linear(8, 11)

    def __call__(self, ids: mx.array) -> mx.array:
        h = self.embed(ids)
        for block in self.blocks:
            h = mx.tanh(block(h))
        return self.out(h)


def any_module() -> None:
    mx.random.seed(1)
    model, ids = Plain(), mx.array([[1, 2, 3]])
    expected = model(ids)
    assert_equal(pipeline_auto_parallel(model)(ids), expected, SINGLE)


def test_any_module_with_a_list_of_layers() -> None:
    mlx_ranks(2).run(any_module)


def refused(slices: list[Any], family: str) -> None:
    start, end = slices[init().rank]
    pipeline_auto_parallel(whole(family), None, start, end)


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ([(0, 2), (3, 4)], "rank 1 requests layers 3 to 4 .* the ranks before it end at 2 and the model has 4 layers"),
        ([(0, 2), (2, 3)], "the slices of the ranks end at layer 3, but the model has 4 layers"),
        ([(0, 4), (4, 9)], "rank 1 requests layers 4 to 9"),
    ],
)
def test_slices_that_do_not_make_up_the_model_are_refused(slices: list[Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        mlx_ranks(2).run(refused_by_all, slices)


def refused_by_all(slices: list[Any]) -> None:
    try:
        refused(slices, "llama")
    except PlanError as error:
        raise AssertionError(str(error)) from None


def test_a_family_that_cannot_be_cut_is_refused_on_every_rank() -> None:
    mlx_ranks(2).run(refused_family)


def refused_family() -> None:
    with pytest.raises((ModelError, DistributedError), match="hunyuan cannot be split into stages"):
        pipeline_auto_parallel(whole("hunyuan"))


class Twice(Plain):
    """Goes through its layers twice."""

    def __call__(self, ids: mx.array) -> mx.array:
        h = self.embed(ids)
        for block in self.blocks * 2:
            h = mx.tanh(block(h))
        return self.out(h)


def refused_module() -> None:
    with pytest.raises(
        ModelError, match="Twice cannot be split into stages: it runs its layers more than once per forward"
    ):
        pipeline_auto_parallel(Twice())


def test_a_module_that_cannot_be_cut_says_why() -> None:
    mlx_ranks(2).run(refused_module)
