"""The groups of a run: who is in which, for every mesh of four ranks, and the defaults that the seed's layers take."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from partita import LayerType, Layout
from partita.core.mesh import Mesh
from partita.errors import DistributedError, LayoutError, PlanError
from partita.torch import (
    ParallelGroups,
    init_parallelism,
    initialize_parallelism,
    make_groups,
    parallel_group_info,
    parallelism_is_initialized,
    reset_parallelism,
)
from partita.torch.collectives.groups import init_process_group
from tests.support.compare import assert_equal
from tests.support.ranks import RankError, Ranks, ranks

ALONE = [[0], [1], [2], [3]]
# Of 4 ranks, (model_parallelism, pipeline_parallelism) -> the groups along each axis.
MESHES = {
    # mp, pp:  mp groups          pp groups          dp groups
    (1, 1): (ALONE,             ALONE,             [[0, 1, 2, 3]]),
    (2, 1): ([[0, 1], [2, 3]],  ALONE,             [[0, 2], [1, 3]]),
    (4, 1): ([[0, 1, 2, 3]],    ALONE,             ALONE),
    (1, 2): (ALONE,             [[0, 1], [2, 3]],  [[0, 2], [1, 3]]),
    (2, 2): ([[0, 1], [2, 3]],  [[0, 2], [1, 3]],  ALONE),
    (1, 4): (ALONE,             [[0, 1, 2, 3]],    ALONE),
}  # fmt: skip


def membership(mp: int, pp: int) -> dict[str, Any]:
    assert not parallelism_is_initialized()
    groups = init_parallelism(mp, pp)
    try:
        assert parallelism_is_initialized()
        info = parallel_group_info()
        assert (info.mp.comm, info.pp.comm, info.dp.comm) == (groups.tp, groups.pp, groups.dp)
        assert groups.mesh == Mesh(4 // mp // pp, pp, mp)
        rank = dist.get_rank()
        found = {}
        for axis in ("mp", "pp", "dp"):
            group = getattr(info, axis)
            assert group.world_size == len(group.global_ranks)
            assert group.global_ranks[group.rank] == rank
            # torch takes None for all ranks, so that a group of one must be a group too.
            total = torch.tensor([rank])
            dist.all_reduce(total, group=group.group)
            assert total.item() == sum(group.global_ranks)
            # What the group says, its messages do.
            assert group.comm.all_gather(torch.tensor([rank])).tolist() == group.global_ranks
            assert group.reduce(torch.tensor([rank])).tolist() == [sum(group.global_ranks)]
            found[axis] = group.global_ranks
        return found
    finally:
        reset_parallelism()


@pytest.mark.parametrize(("mp", "pp"), MESHES)
def test_groups_of_every_mesh_of_four_ranks(mp: int, pp: int) -> None:
    found = ranks(4).run(membership, mp, pp)
    for axis, groups in zip(("mp", "pp", "dp"), MESHES[mp, pp], strict=True):
        assert [member[axis] for member in found] == [next(g for g in groups if rank in g) for rank in range(4)], axis


def again_and_again() -> None:
    first = init_parallelism(2, 1)
    with pytest.raises(DistributedError, match=r"initialized already. Call reset_parallelism\(\) first"):
        init_parallelism(4)
    reset_parallelism()
    reset_parallelism()  # forgets nothing more
    assert not parallelism_is_initialized()
    with pytest.raises(DistributedError, match="parallelism is not initialized"):
        parallel_group_info()
    # The same mesh has the same groups; another has its own.
    assert make_groups(Mesh(2, 1, 2)) is init_parallelism(2, 1) is first
    reset_parallelism()
    other = init_parallelism(model_parallelism=1, pipeline_parallelism=4)
    assert (other.tp.size, other.pp.size, other.dp.size) == (1, 4, 1)
    reset_parallelism()


def test_reset() -> None:
    ranks(4).run(again_and_again)
    assert initialize_parallelism is init_parallelism


def refuse() -> None:
    for mp, pp, match in (
        (3, 1, r"4 ranks, which is not a multiple of model_parallelism \(3\)"),
        (2, 4, "= 8"),
        (8, 1, "= 8"),
    ):
        with pytest.raises(DistributedError, match=match):
            init_parallelism(mp, pp)
    for mp, pp, match in ((0, 1, "tp must be"), (1, -1, "pp must be"), (1.5, 1, "tp must be")):
        with pytest.raises(PlanError, match=match):
            init_parallelism(mp, pp)  # type: ignore[arg-type]
    for mesh in (Mesh(), Mesh(tp=8), Mesh(dp=3)):
        with pytest.raises(DistributedError, match=f"has {mesh.size} ranks?, but the run has 4. Start {mesh.size}, or"):
            make_groups(mesh)
    assert not parallelism_is_initialized()


def test_meshes_that_do_not_fit_the_run() -> None:
    ranks(4).run(refuse)


# --- what a group does --------------------------------------------------------------------------------------------------


def use_a_group() -> None:
    init_parallelism(2, 1)
    info = parallel_group_info()
    try:
        for group in (info.mp, info.dp, info.pp):
            n = group.world_size
            x = torch.arange(4.0 * n).view(2 * n, 2).requires_grad_()
            part = group.split(x)
            assert torch.equal(part, x.detach()[2 * group.rank : 2 * group.rank + 2])
            assert_equal(group.gather(part, 0), x)
            assert_equal(group.gather(part), torch.cat(list(x.detach().chunk(n)), -1))
            (grad,) = torch.autograd.grad((part * (group.rank + 1)).sum(), x)
            assert_equal(grad, torch.cat([torch.full((2, 2), r + 1.0) for r in range(n)]))
            y = torch.full((3,), float(group.rank + 1))
            assert group.reduce(y, dist.ReduceOp.MAX) is y
            assert y.tolist() == [float(n)] * 3
            y = torch.ones(3)
            work = group.reduce(y, async_op=True)
            assert not isinstance(work, torch.Tensor)
            work.wait()
            assert y.tolist() == [float(n)] * 3
            with pytest.raises(DistributedError, match="async_op=True needs op SUM"):
                group.reduce(y, dist.ReduceOp.MAX, async_op=True)
    finally:
        reset_parallelism()


def test_reduce_split_and_gather() -> None:
    ranks(4).run(use_a_group)


def group_timeouts() -> list[float]:
    info = make_groups(Mesh(2, 1, 2))
    groups = [dist.group.WORLD, info.tp.group, info.dp.group]
    cpu = torch.device("cpu")
    return [g._get_backend(cpu).options._timeout.total_seconds() for g in groups if g is not None]


def test_sub_groups_have_the_timeout_of_the_run() -> None:
    assert ranks(4).run(group_timeouts) == [[60.0] * 3] * 4


# --- the pipeline rank that a layout asks for -----------------------------------------------------------------------------


def ask_layout() -> tuple[list[int], int, int]:
    layout = Layout("Et|ttt|m|L||tt", 2)
    with pytest.raises(LayoutError, match="`pp_rank` is needed while the parallel groups are not initialized"):
        layout.get_layer_id_list(vp_stage=0)
    layout = Layout("Et|ttt|mm|L", 2)
    init_parallelism(1, 2)
    try:
        found = (
            layout.get_layer_id_list(vp_stage=0),
            layout.get_num_layers_to_build(LayerType.mtp, vp_stage=1),
            layout.get_layer_offset(vp_stage=1),
        )
        assert layout.get_layer_id_list(vp_stage=0, pp_rank=0) == [0]  # a rank that is given is taken
    finally:
        reset_parallelism()
    with pytest.raises(LayoutError, match="`pp_rank` is needed"):
        layout.get_layer_offset(vp_stage=0)
    return found


def test_a_layout_asks_for_this_pipeline_rank() -> None:
    first, second = ([0], 2, 4), ([1, 2, 3], 0, 4)
    assert ranks(4).run(ask_layout) == [first, second, first, second]
    assert ranks(2).run(ask_layout) == [first, second]


# --- runs of one rank, and one after the other --------------------------------------------------------------------------


def test_before_anything_is_initialized() -> None:
    assert not parallelism_is_initialized()
    groups = make_groups(Mesh())
    assert isinstance(groups, ParallelGroups)
    assert [g.size for g in (groups.tp, groups.pp, groups.dp)] == [1, 1, 1]
    with pytest.raises(DistributedError, match=r"the mesh dp 1 x pp 1 x tp 2 has 2 ranks, but the run has 1"):
        make_groups(Mesh(tp=2))


@pytest.mark.fresh
def test_without_a_launcher_a_process_is_one_rank() -> None:
    program = """
import torch, torch.distributed as dist
from partita import Layout
from partita.torch import ColumnParallelLinear, init_parallelism, parallel_group_info
init_parallelism()
info = parallel_group_info()
assert [g.world_size for g in (info.mp, info.pp, info.dp)] == [1, 1, 1] and dist.get_world_size() == 1
assert Layout("EtL", 1).get_layer_id_list() == [0]
assert ColumnParallelLinear(3, 5)(torch.ones(2, 3)).shape == (2, 5)
dist.destroy_process_group()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def next_run(store: str) -> list[int]:
    before = make_groups(Mesh(tp=2))
    rank = dist.get_rank()
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    after = make_groups(Mesh(tp=2))
    assert after is not before
    init_process_group()  # does nothing, as there is one
    return list(after.tp.all_gather(torch.tensor([rank])).tolist())


@pytest.mark.fresh
def test_another_process_group_has_other_groups(tmp_path: Any) -> None:
    pool = Ranks(2)
    try:
        assert pool.run(next_run, str(tmp_path / "store")) == [[0, 1], [0, 1]]
    finally:
        pool.close()


def fail_on_one() -> None:
    if dist.get_rank() == 1:
        init_parallelism(3)


def test_the_pool_tells_which_rank_failed() -> None:
    with pytest.raises(RankError, match=r"^rank 1: (.|\n)*DistributedError"):
        ranks(2).run(fail_on_one)


def _listening() -> list[str]:
    """Addresses on which this process listens, in the hexadecimal of Linux."""
    mine = set()
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            mine.add(os.readlink(fd).removeprefix("socket:[").removesuffix("]"))
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return [row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in mine]


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux")
def test_ranks_of_one_machine_listen_on_the_loopback_only() -> None:
    found = ranks(2).run(_listening)
    assert found[0]
    assert {address for one in found for address in one} == {"0100007F"}
