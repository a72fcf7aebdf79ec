"""What a command line says of stages and schedules, checked before any rank is started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from partita.core.layout.layout import Layout
from partita.core.layout.placement import Placement
from partita.core.mesh import Mesh
from partita.errors import PlanError
from partita.schedule import check_kind, placement_of, vpp_of


@dataclass(frozen=True)
class Stages:
    """How a model is dealt out over the pipeline ranks, and in which order they work.

    Attributes:
        mesh: All ranks.
        layout: Which layers each stage runs, or None for even parts.
        vpp: Stages a rank.
        placement: Which rank runs which.
        schedule: The kind of schedule, or None for the plan's default.
        microbatches: Of a step, for each replica.
        group_size: Of interleaved schedules.
    """

    mesh: Mesh
    layout: str | None
    vpp: int
    placement: Placement
    schedule: str | None
    microbatches: int
    group_size: int | None

    @property
    def plan(self) -> dict[str, Any]:
        """Arguments of `load`, `fresh` and `verify`."""
        mesh = self.mesh
        return {
            "tp": mesh.tp, "pp": mesh.pp, "dp": mesh.dp, "layout": self.layout, "vpp": self.vpp, "placement": self.placement,
        }  # fmt: skip

    @property
    def training(self) -> dict[str, Any]:
        """Settings of `TrainSettings`."""
        return {"schedule": self.schedule, "group_size": self.group_size, "accumulate": self.microbatches}


def choose(
    mesh: Mesh,
    layout: str | None,
    vpp: int | None,
    schedule: str | None,
    *,
    batch_size: int,
    microbatches: int | None = None,
    group_size: int | None = None,
) -> Stages:
    """What is meant by what was given; `microbatches` is by default as many as keep a pipeline busy.

    Raises:
        PartitaError: The layout, the schedule and the batch do not go together.
    """
    if layout is not None:
        of_layout = Layout(layout, mesh.pp).virtual_pipeline_model_parallel_size
        if vpp is not None and vpp != of_layout:
            raise PlanError(
                f"--vpp {vpp} and --layout {layout}, which has {of_layout} stages a rank, exclude each other. Leave --vpp out."
            )
        vpp = of_layout
    elif vpp is None:
        vpp = vpp_of(schedule, None) if schedule is not None and mesh.pp > 1 else 1
    if schedule == "zb-v" and mesh.pp == 1:
        raise PlanError(
            "--schedule zb-v turns round between ranks, but --pp is 1. Give --pp 2 or more, or leave it out."
        )
    replicas = batch_size // mesh.dp
    if batch_size % mesh.dp:
        raise PlanError(f"--batch-size must be a multiple of --dp ({mesh.dp}), but is {batch_size}.")
    if microbatches is None:
        most = 1 if mesh.pp == 1 else 4 * mesh.pp
        microbatches = max(n for n in range(1, min(replicas, most) + 1) if replicas % n == 0)
    elif replicas % microbatches:
        raise PlanError(
            f"--microbatches must divide the {replicas} sequences of a replica (--batch-size {batch_size} / --dp {mesh.dp}), "
            f"but is {microbatches}."
        )
    if schedule == "forward-only":
        raise PlanError("--schedule forward-only has no backward, so it trains nothing. Use 1f1b.")
    check_kind(schedule or ("1f1b" if vpp == 1 else "interleaved-1f1b"), mesh.pp, microbatches, vpp, group_size)
    placement: Placement = "loop" if schedule is None or mesh.pp == 1 else placement_of(schedule)
    return Stages(mesh, layout, vpp, placement, schedule, microbatches, group_size)
