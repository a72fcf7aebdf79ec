"""What a command line says of stages and schedules, checked before any rank is started."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from partita.core.layout.placement import Placement
from partita.core.request import PlanRequest
from partita.errors import PlanError
from partita.schedule import check_kind, placement_of, vpp_of


@dataclass(frozen=True)
class Stages:
    """How the stages of a model work.

    Attributes:
        request: How the model is distributed over the pipeline ranks, with `vpp` and `placement` decided.
        schedule: The kind of schedule, or None for the plan's default.
        microbatches: Of a step, for each replica.
        group_size: Of interleaved schedules.
    """

    request: PlanRequest
    schedule: str | None
    microbatches: int
    group_size: int | None

    @property
    def training(self) -> dict[str, Any]:
        """Settings of `TrainSettings`."""
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
    """What is meant by what was given; `microbatches` is by default as many as keep a pipeline busy.

    `is_planned` tells that the request is that of a plan, whose placement is decided.

    Raises:
        PartitaError: The layout, the schedule and the batch do not go together.
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
    if schedule is None and is_planned and request.placement == "v":
        schedule = "zb-v"
    check_kind(schedule or ("1f1b" if vpp == 1 else "interleaved-1f1b"), mesh.pp, microbatches, vpp, group_size)
    placement: Placement = "loop" if schedule is None or mesh.pp == 1 else placement_of(schedule)
    if is_planned and placement != request.placement:
        raise PlanError(
            f"--schedule {schedule} needs stages placed in the form {placement!r}, but those of the plan are in the form "
            f"{request.placement!r}. Leave --schedule out, or make another plan."
        )
    return Stages(replace(request, vpp=vpp, placement=placement), schedule, microbatches, group_size)
