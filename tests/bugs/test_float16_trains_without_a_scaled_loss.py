"""Training in float16 lost small gradients without a word: nothing scaled the loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from partita.errors import ModelError, PartitaError, PlanError
from partita.torch.collectives.groups import single_groups
from partita.torch.new import fresh
from partita.torch.train import train
from partita.torch.verify import verify
from partita.training import TrainSettings
from tests.support.models import CONFIGS
from tests.support.ranks import ranks
from tests.torch.test_schedules import tokens
from tests.torch.test_verify import written

SETTINGS = TrainSettings(steps=2, batch_size=4, sequence_length=12)
LLAMA = CONFIGS["llama-3-heads"]


def test_a_float16_model_is_refused() -> None:
    model = fresh(LLAMA, dtype="float16", groups=single_groups())
    with pytest.raises(
        ModelError, match=r"is float16, in which small gradients .* Load the model in bfloat16 or float32"
    ):
        train(model, tokens(), SETTINGS)
    with pytest.raises(
        PlanError, match=r"autocast must be bfloat16 or None, but is 'float16'\. In float16 small gradients"
    ):
        TrainSettings(autocast="float16")


def one_stage() -> str:
    """What is raised where the last stage alone has a float16 weight."""
    model = fresh(LLAMA, dtype="float32", pp=2)
    if torch.distributed.get_rank() == 1:
        model.model.norm.half()
    try:
        train(model, tokens(), SETTINGS)
    except PartitaError as error:
        return str(error)
    return "nothing"


def test_every_stage_refuses_what_one_has() -> None:
    for said in ranks(2).run(one_stage):
        assert "model.norm.weight is float16, in which small gradients become zero" in said


def test_verify_says_that_it_did_not_train(tmp_path: Path) -> None:
    report = verify(written(tmp_path, LLAMA), steps=2, dtype="float16")
    assert {row.kind for row in report.rows} == {"module", "output", "gradient", "tokens", "dtype"}
    (skip,) = report.skipped
    assert skip.kinds == ("loss", "parameter")
    assert "is float16, in which small gradients become zero" in skip.reason


def test_a_float16_model_is_refused_on_mlx() -> None:
    from partita.mlx.collectives.groups import single_groups as single
    from partita.mlx.new import fresh as fresh_on_mlx
    from partita.mlx.train import train as train_on_mlx

    model = fresh_on_mlx(LLAMA, dtype="float16", groups=single())
    with pytest.raises(
        ModelError, match=r"is float16, in which small gradients .* Load the model in bfloat16 or float32"
    ):
        train_on_mlx(model, tokens().tolist(), SETTINGS)
