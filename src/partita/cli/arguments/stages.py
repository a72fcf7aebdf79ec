"""The options for stages and schedules, checked before any rank is started."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from partita.core.layout.placement import Placement
from partita.core.request import PlanRequest
from partita.errors import PlanError
from partita.schedule import check_kind, placement_of, vpp_of


@dataclass(frozen=True)
class Stages:
    """The stages and the schedule of a run.

    Attributes:
        request: How the model is distributed over the pipeline ranks, with `vpp` and `placement` decided.
        schedule: Kind of schedule, or None for the plan's default.
        microbatches: Micro-batches of a step, for each replica.
        group_size: Group size of interleaved schedules.
    """

    request: PlanRequest
    schedule: str | None
    microbatches: int
    group_size: int | None

    @property
    def training(self) -> dict[str, Any]:
        """These values as fields of `TrainSettings`."""
        return {"schedule": self.schedule, "group_size": self.group_size, "microbatches": self.microbatches}


def choose(
    request: PlanRequest,
    schedule: str | None,
    *,
    batch_size: int,
    microbatches: int | None = None,
    group_size: int | None = None,
    is_planned: bool = False,
) -> Stages:
    """The stages and schedule that the options specify; `microbatches` defaults to enough to keep a pipeline busy.

    `is_planned`: the request comes from a plan, so its placement is decided.

    Raises:
        PartitaError: The layout, the schedule and the batch size are not compatible.
    """
    mesh, layout, vpp = request.mesh, request.layout, request.vpp
    if layout is not None:
        of_layout = layout.virtual_pipeline_model_parallel_size
        if vpp is not None and vpp != of_layout:
            raise PlanError(
                f"--vpp {vpp} and --layout {layout}, which has {of_layout} stages a rank, exclude each other. Leave --vpp out."
            )
        vpp = of_layout
    elif vpp is None:
        vpp = vpp_of(schedule, None) if schedule is not None and mesh.pp > 1 else 1
    if schedule == "zb-v" and mesh.pp == 1:
        raise PlanError(
            "--schedule zb-v needs at least two pipeline ranks, but --pp is 1. Give --pp 2 or more, or leave it out."
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
        raise PlanError("--schedule forward-only has no backward, so it cannot train. Use 1f1b.")
    if schedule is None and is_planned and request.placement == "v":
        schedule = "zb-v"
    check_kind(schedule or ("1f1b" if vpp == 1 else "interleaved-1f1b"), mesh.pp, microbatches, vpp, group_size)
    placement: Placement = "loop" if schedule is None or mesh.pp == 1 else placement_of(schedule)
    if is_planned and placement != request.placement:
        raise PlanError(
            f"--schedule {schedule} needs stages with placement {placement!r}, but the plan has placement "
            f"{request.placement!r}. Leave --schedule out, or make another plan."
        )
    return Stages(replace(request, vpp=vpp, placement=placement), schedule, microbatches, group_size)
