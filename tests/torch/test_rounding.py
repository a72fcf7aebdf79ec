"""Every promised family in the dtypes that are run, against its unsplit self: at most twice the rounding, the same dtypes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from partita.core.mesh import Mesh
from partita.torch.collectives.groups import make_groups
from partita.torch.model.transformers_models import build_on_meta, read_hf_config
from partita.torch.proof.family import fill_unsplit, plan_of_model, sample_inputs
from partita.torch.proof.rounding import compare_rounding, in_float64
from partita.torch.split.apply import apply_plan
from partita.torch.split.finish import finish
from tests.support.models import CONFIGS
from tests.support.ranks import ranks


def measured(
    data: dict[str, Any], mesh: Mesh, dtype: str
) -> tuple[list[tuple[str, str, float, float]], dict[str, str]]:
    unsplit = fill_unsplit(build_on_meta(read_hf_config(data), getattr(torch, dtype)))
    plan = plan_of_model(unsplit, mesh)
    groups = make_groups(mesh)
    split = finish(apply_plan(copy.deepcopy(unsplit), plan, groups), plan, groups)
    found = compare_rounding(in_float64(unsplit), unsplit, split, plan, groups, sample_inputs(unsplit))
    return [(j.kind, j.name, j.error, j.allowed) for j in found.judged], found.dtypes


def check(name: str, mesh: Mesh, dtype: str) -> None:
    for judged, dtypes in ranks(mesh.size).run(measured, CONFIGS[name], mesh, dtype):
        assert dtypes == {}
        assert {kind for kind, *_ in judged} == {"module", "output", "gradient"}
        assert [one for one in judged if not one[2] <= one[3]] == []


@pytest.mark.parametrize("name", CONFIGS)
def test_split_rounds_at_most_twice_as_much(name: str) -> None:
    check(name, Mesh(tp=2), "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("mesh", [Mesh(tp=4), Mesh(tp=2, pp=2), Mesh(pp=2)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_on_other_meshes_and_in_other_dtypes(name: str, mesh: Mesh, dtype: str) -> None:
    check(name, mesh, dtype)


def test_pipelines_round_as_the_unsplit_model_does() -> None:
    check("mixtral", Mesh(pp=2), "bfloat16")
