"""Every family of mlx-lm, cut between all layers of a tiny model: what can be pipelined, and why not the others."""

from __future__ import annotations

import contextlib
import io

import pytest

from partita.core.mesh import Mesh
from partita.errors import ModelError
from partita.mlx.hub import build
from partita.mlx.load import plan_of_model
from partita.mlx.stage_probe import prove_stages, refuse_undecodable
from tests.support.mlx_models import families, tiny_config


def verdict(family: str) -> tuple[str, str]:
    """Whether a family is equal in parts, equal but for its cache, refused, or not to be built here; and why."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            model = build(tiny_config(family))
        plan = plan_of_model(model, Mesh(pp=2))
    except ModelError as error:
        return "not built", str(error)
    try:
        prove_stages(model, plan)
    except ModelError as error:
        return "refused", str(error)
    try:
        refuse_undecodable(model, plan)
    except ModelError as error:
        return "no generation", str(error)
    return "equal", ""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_family_is_equal_in_parts_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    verdicts = {family: verdict(family) for family in families()}
    with capsys.disabled():
        for family, (what, why) in verdicts.items():
            print(f"{family:24s} {what:14s} {why[:120]}")
    counts = {what: sum(1 for found, _ in verdicts.values() if found == what) for what, _ in verdicts.values()}
    print(counts)
    # mlx-lm itself pipelines 17.
    assert counts["equal"] >= 105
    assert all(why for what, why in verdicts.values() if what != "equal")
