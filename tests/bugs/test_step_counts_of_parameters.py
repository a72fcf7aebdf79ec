"""AdamW counts the steps of each parameter, but a resumed run gave all of them the run's count.

So what had no gradient in some steps (a layer that was dropped, something frozen for a while) was trained differently after a
resume. What was frozen while a checkpoint was written had zeros for moments in it. The counts are kept by the names on disk.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from partita.torch.collectives.groups import single_groups
from partita.torch.load import load
from partita.torch.model.parts import local_tensors, plan_of
from partita.torch.new import fresh
from partita.torch.train import train
from partita.training import StepReport
from partita.training.saving import Saves
from tests.support.models import CONFIGS
from tests.support.ranks import on
from tests.torch.test_resume import ALONE, LLAMA, SETTINGS, Layout, digest, size_of, stopped, tokens, write_again

DROPPING_LAYERS: dict[str, Any] = {**CONFIGS["opt"], "num_hidden_layers": 4, "layerdrop": 0.5}
FROZEN = "model.layers.1.mlp.up_proj.weight"
LAST = f"step-{SETTINGS.steps:06d}"


def run(config: dict[str, Any], layout: Layout, folder: str, resume: str | None, freezes: bool) -> list[StepReport]:
    """Train to the end, with `FROZEN` frozen in steps 2 and 3 if it `freezes`."""
    where = {name: value for name, value in layout.items() if name not in ("zero", "schedule")}
    if size_of(layout) == 1:
        where["groups"] = single_groups()
    model = load(resume, **where) if resume is not None else fresh(config, seed=3, dtype="float32", **where)
    frozen = local_tensors(model, plan_of(model)[0]).get(FROZEN)

    def freeze(report: StepReport) -> None:
        if freezes and frozen is not None:
            frozen.requires_grad_(report.step not in (1, 2))

    settings = replace(SETTINGS, zero=layout.get("zero", False))
    return train(model, tokens(), settings, saves=Saves(Path(folder), every=2), resume=resume, on_step=freeze)


def counts(folder: Path) -> dict[str, int]:
    return dict(json.loads((folder / "training_state.json").read_text()).get("optimizer_steps", {}))


@pytest.mark.parametrize(
    "layout", [ALONE, {"dp": 2, "zero": True}, pytest.param({"tp": 3}, marks=pytest.mark.slow)], ids=str
)
def test_layers_that_are_dropped(layout: Layout, tmp_path: Path) -> None:
    size, whole, again = size_of(layout), tmp_path / "whole", tmp_path / "again"
    expected = on(size, run, DROPPING_LAYERS, layout, str(whole), None, False)
    there = counts(Path(stopped(whole)))
    assert set(there.values()) <= {0, 1, 2, 3}
    assert {name.split(".")[4] for name in there}, "no layer was dropped in the first four steps"
    found = on(size, run, DROPPING_LAYERS, layout, str(again), stopped(whole), False)
    for theirs, mine in zip(expected, found, strict=True):
        assert [(r.loss, r.grad_norm) for r in mine] == [(r.loss, r.grad_norm) for r in theirs[4:]]
    assert digest(whole / LAST) == digest(again / LAST)


@pytest.mark.parametrize("layout", [{"pp": 2}, pytest.param({"tp": 2, "dp": 2}, marks=pytest.mark.slow)], ids=str)
def test_a_parameter_that_is_frozen_for_a_while(layout: Layout, tmp_path: Path) -> None:
    size, whole, again = size_of(layout), tmp_path / "whole", tmp_path / "again"
    on(size, run, LLAMA, layout, str(whole), None, True)
    assert counts(Path(stopped(whole))) == {FROZEN: 2}
    # The second step was done without it, so its moments are still those of the first.
    while_frozen = load_file(whole / "step-000002" / "optimizer.safetensors")
    assert while_frozen[f"exp_avg_sq.{FROZEN}"].abs().max() > 0
    on(size, run, LLAMA, layout, str(again), stopped(whole), False)
    assert digest(whole / LAST) == digest(again / LAST)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run(LLAMA, ALONE, str(folder), None, True)
    return folder


@pytest.mark.parametrize(
    "layout", [ALONE, {"tp": 2}, pytest.param({"dp": 2, "zero": True}, marks=pytest.mark.slow)], ids=str
)
def test_any_layout_keeps_the_counts(layout: Layout, alone: Path, tmp_path: Path) -> None:
    on(size_of(layout), write_again, layout, stopped(alone), str(tmp_path))
    assert counts(Path(stopped(tmp_path))) == {FROZEN: 2}


def test_mlx_goes_on_with_them(alone: Path, tmp_path: Path) -> None:
    """Its own optimizer steps all arrays in each step, as every one of them has a gradient; what torch counted goes on."""
    pytest.importorskip("mlx_lm")
    from partita.mlx.collectives.groups import single_groups as mlx_groups
    from partita.mlx.load import load as mlx_load
    from partita.mlx.train import train as mlx_train

    source = stopped(alone)
    mlx_train(
        mlx_load(source, groups=mlx_groups()),
        tokens().tolist(),
        SETTINGS,
        saves=Saves(tmp_path, every=2),
        resume=source,
    )
    assert counts(tmp_path / LAST) == counts(alone / LAST) == {FROZEN: 4}
    mine, theirs, before = (
        load_file(folder / "model.safetensors")[FROZEN].numpy()
        for folder in (tmp_path / LAST, alone / LAST, Path(source))
    )
    moved = np.abs(theirs - before).max()
    assert np.abs(mine - theirs).max() <= 1e-3 * moved
