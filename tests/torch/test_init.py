"""Initial weights: of the kind asked for, and the same unsplit weight whatever the mesh."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from partita.core.sharding.split import Split
from partita.errors import DistributedError, PlanError
from partita.torch import (
    ColumnParallelLinear,
    Communicator,
    InitType,
    LoraLinear,
    ParallelEmbedding,
    RowParallelLinear,
    init_parallelism,
    initialize_model_parallel_affine_weight_,
    reset_parallelism,
)
from partita.torch.layers import init
from tests.support.compare import assert_equal, part, world
from tests.support.ranks import on

KINDS: tuple[InitType, ...] = get_args(InitType)
SIZES = pytest.mark.parametrize("size", [2, 3, 4])


def masters(comm: Communicator, dtype: torch.dtype) -> dict[str, Tensor]:
    """The unsplit tensors of layers that were all made one after the other from one seed."""
    torch.manual_seed(7)
    found: dict[str, Tensor] = {}
    for kind in KINDS:
        for stride in (1, 2):
            column = ColumnParallelLinear(6, 10, True, True, kind, stride, group=comm, dtype=dtype)
            row = RowParallelLinear(10, 6, True, False, kind, stride, group=comm, dtype=dtype)
            for name, layer in (("column", column), ("row", row)):
                assert layer.master_bias is not None
                found[f"{name} {kind} {stride}"] = layer.master_weight
                found[f"{name} {kind} {stride} bias"] = layer.master_bias
        found[f"embedding {kind}"] = ParallelEmbedding(9, 7, 3, init_type=kind, group=comm, dtype=dtype).master_weight
    # An adapter draws too, and what is made after it must not notice how many ranks drew what.
    for make in (ColumnParallelLinear, RowParallelLinear):
        layer = make(7, 9, lora_rank=3, group=comm, dtype=dtype)
        lora = layer.linear
        assert isinstance(lora, LoraLinear)
        weight = lora.lora_A.weight.detach()
        found[f"{make.__name__} lora_A"] = (
            comm.gather_split(weight, 1, layer.split) if make is RowParallelLinear else weight.clone()
        )
        assert not lora.lora_B.weight.any()
    found["after"] = ColumnParallelLinear(7, 9, group=comm, dtype=dtype).master_weight
    found["next"] = torch.rand(3)
    return found


def same_on_every_mesh() -> list[bytes]:
    comm = Communicator()
    digests = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        split, whole = masters(comm, dtype), masters(Communicator.single(), dtype)
        assert split.keys() == whole.keys()
        for name, tensor in split.items():
            assert_equal(tensor, whole[name], 0, f"{dtype}: {name}")
            digests.append(tensor.double().numpy().tobytes())
    return digests


@SIZES
def test_weights_do_not_depend_on_the_mesh_or_the_rank(size: int) -> None:
    first, *others = on(size, same_on_every_mesh)
    assert all(other == first for other in others)


def block_by_block() -> None:
    comm, before = world(), init.BLOCK_ELEMENTS
    try:
        for block in (1, 6, 13, 25, 60, 10_000):
            init.BLOCK_ELEMENTS = block
            for kind in ("normal", "xavier_uniform", "orthogonal", "dirac"):
                found = []
                for group in (comm, Communicator.single()):
                    torch.manual_seed(3)
                    found.append(ColumnParallelLinear(6, 10, True, True, kind, 2, group=group).master_weight)
                    found.append(RowParallelLinear(10, 6, True, True, kind, group=group).master_weight)
                assert_equal(found[0], found[2], 0, f"{kind}, blocks of {block}")
                assert_equal(found[1], found[3], 0, f"{kind}, blocks of {block}")
                if kind == "orthogonal":
                    assert_equal(found[0].T @ found[0], torch.eye(6), 1e-5)  # of float32
    finally:
        init.BLOCK_ELEMENTS = before


@SIZES
def test_large_weights_are_drawn_in_blocks(size: int) -> None:
    on(size, block_by_block)


def default_group() -> None:
    init_parallelism(world().size)
    try:
        comm = world()
        for dim, stride in ((0, 1), (0, 2), (1, 1), (1, 2)):
            split = Split.even(10, comm.size, segments=(10 // stride,) * stride)
            n = split.local_size(comm.rank)
            weight = torch.empty((n, 6) if dim == 0 else (6, n))
            shape = (10, 6) if dim == 0 else (6, 10)
            torch.manual_seed(5)
            initialize_model_parallel_affine_weight_(weight, *shape, n, dim, "kaiming_normal", stride)
            torch.manual_seed(5)
            whole = torch.empty(shape)
            initialize_model_parallel_affine_weight_(
                whole, *shape, 10, dim, "kaiming_normal", stride, rank=0, world_size=1
            )
            assert_equal(weight, part(whole, dim, split.ranges(comm.rank)), 0)
        # Rank and world size may be given instead.
        weight = torch.empty(2, 6)
        initialize_model_parallel_affine_weight_(weight, 10, 6, 2, 0, "ones", rank=4, world_size=5)
        assert bool((weight == 1).all())
        with pytest.raises(PlanError, match=r"per_partition_size must be .* got 11"):
            initialize_model_parallel_affine_weight_(weight, 10, 6, 11, 0)
    finally:
        reset_parallelism()


@SIZES
def test_initialize_model_parallel_affine_weight(size: int) -> None:
    on(size, default_group)


# --- of the kind asked for ----------------------------------------------------------------------------------------------


def whole_weight(kind: InitType, rows: int, columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(1)
    layer = ColumnParallelLinear(columns, rows, init_type=kind, group=Communicator.single(), dtype=dtype)
    return layer.weight.detach()


# torch's own initializer of the same name, from the same seed; gains of 1, as the seed's functions have.
TORCH: dict[InitType, Callable[[Tensor], Tensor]] = {
    "orthogonal": nn.init.orthogonal_,
    "normal": lambda w: nn.init.normal_(w, 0.0, init.STD),
    "biased_normal": lambda w: nn.init.normal_(w, 0.0, init.STD),
    "uniform": nn.init.uniform_,
    "kaiming_uniform": lambda w: nn.init.kaiming_uniform_(w, 0.0),
    "kaiming_normal": lambda w: nn.init.kaiming_normal_(w, 0.0),
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "trunc_normal": lambda w: nn.init.trunc_normal_(w, 0.0, init.STD, -2 * init.STD, 2 * init.STD),
    "dirac": lambda w: nn.init.dirac_(w.unsqueeze(-1)),
    "constant": lambda w: nn.init.constant_(w, init.CONSTANT),
    "zeros": nn.init.zeros_,
    "ones": nn.init.ones_,
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_are_those_of_torch(kind: InitType) -> None:
    for rows, columns in ((30, 50), (50, 30), (7, 7)):
        expected = torch.empty(rows, columns, dtype=torch.float64)
        torch.manual_seed(1)
        TORCH[kind](expected)
        # The same draws; bounds and deviations may differ in the last bit.
        assert_equal(whole_weight(kind, rows, columns), expected, 1e-14, kind)


#   kind               mean    standard deviation             largest magnitude
STATISTICS: dict[str, tuple[float, float, float | None]] = {
    "normal":          (0.0,   0.02,                          None),
    "biased_normal":   (0.0,   0.02,                          None),
    "uniform":         (0.5,   1 / math.sqrt(12),             1.0),
    "kaiming_uniform": (0.0,   math.sqrt(2 / 400),            math.sqrt(6 / 400)),
    "kaiming_normal":  (0.0,   math.sqrt(2 / 400),            None),
    "xavier_uniform":  (0.0,   math.sqrt(2 / 700),            math.sqrt(6 / 700)),
    "xavier_normal":   (0.0,   math.sqrt(2 / 700),            None),
    "trunc_normal":    (0.0,   0.02 * 0.8796,                 0.04),
    "orthogonal":      (0.0,   1 / math.sqrt(400),            None),
}  # fmt: skip


@pytest.mark.parametrize("kind", STATISTICS)
@pytest.mark.parametrize("block", [1 << 24, 7_000])
def test_statistics(kind: InitType, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init, "BLOCK_ELEMENTS", block)
    weight = whole_weight(kind, 300, 400)
    mean, deviation, largest = STATISTICS[kind]
    # Of 120,000 draws the mean strays by std / 346 and the deviation by std / 490; five times that.
    assert abs(float(weight.mean()) - mean) < 5 * deviation / 346
    assert abs(float(weight.std()) / deviation - 1) < 5 / 490
    if largest is not None:
        assert 0.99 * largest < float(weight.abs().max()) <= largest
    # Rows of different blocks are not the same rows again.
    assert len({row.numpy().tobytes() for row in weight}) == 300


def test_only_biased_normal_draws_a_bias() -> None:
    for kind in KINDS:
        for make in (ColumnParallelLinear, RowParallelLinear):
            layer = make(300, 300, init_type=kind, group=Communicator.single())
            bias = layer.bias
            assert bias is not None
            assert bool(bias.any()) == (kind == "biased_normal")
            if kind == "biased_normal":
                assert abs(float(bias.detach().std()) / 0.02 - 1) < 5 / math.sqrt(600)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_kind_in_half_precision(kind: InitType, dtype: torch.dtype) -> None:
    weight = whole_weight(kind, 12, 8, dtype)
    assert weight.dtype == dtype
    assert bool(weight.isfinite().all())


def test_arguments_that_cannot_be() -> None:
    weight = torch.empty(5, 4)
    fill = initialize_model_parallel_affine_weight_
    for arguments, keywords, match in (
        ((10, 4, 4, 0), {"rank": 0, "world_size": 2}, "per_partition_size must be 5 on rank 0 of 2; got 4"),
        ((10, 4, 5, 2), {"rank": 0, "world_size": 2}, "partition_dim must be 0 or 1; got 2"),
        ((10, 4, 5, 0, "he"), {"rank": 0, "world_size": 2}, "init_type must be one of .*; got 'he'"),
        ((10, 4, 5, 0, "ones", 3), {"rank": 0, "world_size": 2}, r"stride must divide the split dimension \(10\)"),
        ((1, 4, 1, 0), {"rank": 0, "world_size": 2}, "1 unit cannot be distributed over 2 ranks"),
    ):
        with pytest.raises(PlanError, match=match):
            fill(weight, *arguments, **keywords)  # type: ignore[arg-type]
    with pytest.raises(DistributedError, match="parallelism is not initialized"):
        fill(weight, 10, 4, 5, 0)
