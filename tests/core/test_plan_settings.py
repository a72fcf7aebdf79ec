"""The settings of a plan: round trip, old files, and values that are none."""

from __future__ import annotations

import json
from typing import Any

import pytest

from partita import Mesh, Plan, spec_from_config
from partita.core.plan_settings import PlanSettings
from partita.errors import PlanError
from tests.cli.models import TINY

PLAN = Plan.make(spec_from_config(TINY), Mesh(dp=2))
SETTINGS = PlanSettings(schedule="1f1b", microbatches=4, zero=1, recompute="selective", batch_size=8, dtype="bfloat16")


def test_a_plan_with_settings_reads_back_equal() -> None:
    plan = PLAN.with_settings(SETTINGS)
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json()) != PLAN
    assert json.loads(plan.to_json())["settings"] == SETTINGS.given


def test_a_plan_without_settings_is_written_as_before() -> None:
    assert "settings" not in json.loads(PLAN.to_json())
    assert Plan.from_json(PLAN.to_json()).settings is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero": 4}, "settings.zero must be 0, 1, 2 or 3, but is 4."),
        ({"zero": True}, "settings.zero must be 0, 1, 2 or 3, but is True."),
        ({"microbatches": 0}, "settings.microbatches must be a whole number of at least 1, but is 0."),
        ({"recompute": "some"}, "settings.recompute must be one of none, selective, full, but is 'some'."),
        ({"sequence_parallel": 2}, "settings.sequence_parallel must be true or false, but is 2."),
        ({"schedule": 3}, "settings.schedule must be the name of a schedule, but is 3."),
        ({"colour": "red"}, "settings.colour is unknown. A plan's settings are schedule, "),
        ([1], "settings must be an object, but is [1]."),
    ],
)
def test_other_values_are_refused(settings: Any, message: str) -> None:
    data = {**json.loads(PLAN.to_json()), "settings": settings}
    with pytest.raises(PlanError) as raised:
        Plan.from_json(json.dumps(data))
    assert message in str(raised.value)
