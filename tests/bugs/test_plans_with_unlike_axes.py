"""The table of plans failed with a KeyError if only some of them split sequences or distribute experts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from partita import spec_from_config
from partita.cli.arguments.planning import Question
from partita.cli.terminal.planning_table import _table
from partita.core.mesh import Mesh
from partita.cost.estimate import estimate
from partita.cost.hardware import Hardware
from partita.cost.model import ModelCost
from partita.cost.work import Arrangement, Work
from tests.cli.models import TINY


@pytest.mark.parametrize("last", [Mesh(cp=2), Mesh(dp=2)])
def test_a_table_has_all_axes_of_its_plans(last: Mesh) -> None:
    work, hardware = Work(batch_size=2, sequence_length=64), Hardware.read("h100")
    model = ModelCost.of(spec_from_config(TINY))
    plans = [estimate(model, work, Arrangement(mesh=mesh), hardware) for mesh in (Mesh(cp=2), Mesh(dp=2), last)]
    plans[0] = replace(plans[0], arrangement=replace(plans[0].arrangement, mesh=Mesh(dp=2, ep=2)))
    heads = [column.header for column in _table(tuple(plans), Question(work, 2, hardware), 200).columns]
    assert ("cp" in heads) == (last.cp > 1)
    assert "ep" in heads
