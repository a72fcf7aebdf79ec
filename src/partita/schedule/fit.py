"""Check that a schedule fits the stages of a plan."""

from __future__ import annotations

from partita.core.plan import Plan
from partita.errors import PlanError
from partita.schedule.action import Schedule


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
