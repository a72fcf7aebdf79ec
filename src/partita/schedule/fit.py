"""Schedules and plans: check that one fits the other; forwards alone for a plan."""

from __future__ import annotations

from partita.core.plan import Plan
from partita.errors import PlanError
from partita.schedule.action import Action, Kind, Schedule


def check_schedule(schedule: Schedule, plan: Plan) -> None:
    """Raise `PlanError` unless `schedule` fits the stages of the plan."""
    homes = tuple(plan.stage_rank(index) for index in range(plan.num_stages))
    if schedule.num_ranks != plan.mesh.pp or schedule.num_stages != plan.num_stages:
        raise PlanError(
            f"the schedule is for {schedule.num_ranks} ranks and {schedule.num_stages} stages, but the plan has pp="
            f"{plan.mesh.pp} and {plan.num_stages} stages. Build it with pp={plan.mesh.pp} and vpp={plan.vpp}."
        )
    if schedule.rank_of != homes:
        raise PlanError(
            f"the schedule has its stages on ranks {list(schedule.rank_of)}, but the plan ({plan.placement}) on {list(homes)}. "
            "Make the plan with the placement of the schedule's kind."
        )


def forward_only(plan: Plan, count: int) -> Schedule:
    """Forwards of `count` micro-batches: each rank runs its stages in turn, each for all micro-batches."""
    pp, places = plan.mesh.pp, range(count)
    rows = ([Action(plan.stage_index(r, v), Kind.F, g) for v in range(plan.vpp) for g in places] for r in range(pp))
    return Schedule(tuple(map(tuple, rows)))
