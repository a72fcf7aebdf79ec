"""Fused experts in bfloat16: their inputs were widened to the router's float32, so that generating and training crashed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from partita.core.mesh import Mesh
from partita.proof.rounding import FACTOR
from partita.torch import Sampling, generate
from partita.torch.collectives.groups import single_groups
from partita.torch.load import shard
from partita.torch.model.float64 import Float64Everywhere
from partita.torch.model.transformers_models import build_on_meta, read_hf_config
from partita.torch.proof.family import fill_unsplit
from partita.torch.proof.rounding import in_float64
from partita.torch.train import TrainSettings, train
from tests.support.models import CONFIGS
from tests.support.ranks import ranks
from tests.torch.test_rounding import measured

MINIMAX = {
    **CONFIGS["qwen3-moe"], "model_type": "minimax_m2", "num_local_experts": 12, "rotary_dim": 4, "intermediate_size": 24,
}  # fmt: skip
MODELS = {"mixtral": CONFIGS["mixtral"], "deepseek_v3": CONFIGS["deepseek-v3"], "minimax_m2": MINIMAX}
SETTINGS = TrainSettings(steps=2, batch_size=2, sequence_length=8, warmup_steps=1, learning_rate=1e-3, epsilon=1e-4)


def generated_and_trained(
    data: dict[str, Any], autocast: bool
) -> tuple[list[int], list[float], list[float], list[float]]:
    """The length of what the split model generates; losses of the float64, unsplit and split model."""
    dtype = torch.float32 if autocast else torch.bfloat16
    unsplit = fill_unsplit(build_on_meta(read_hf_config(data), dtype))
    exact = shard(in_float64(unsplit), groups=single_groups())
    split = shard(copy.deepcopy(unsplit), tp=2)
    whole = shard(unsplit, groups=single_groups())
    made = generate(split, [[5, 6, 7, 8], [9, 10]], Sampling(max_new_tokens=4, ignore_eos=True))
    tokens = torch.randint(0, 101, (64,), generator=torch.Generator().manual_seed(0))
    settings = TrainSettings(**{**vars(SETTINGS), "autocast": "bfloat16" if autocast else None})
    with Float64Everywhere():
        losses = [[report.loss for report in train(exact, tokens, SETTINGS)]]
    losses += [[report.loss for report in train(model, tokens, settings)] for model in (whole, split)]
    return [len(one.tokens) for one in made], *losses


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_generates_and_trains(family: str, autocast: bool) -> None:
    for lengths, exact, unsplit, split in ranks(2).run(generated_and_trained, MODELS[family], autocast):
        assert lengths == [4, 4]
        error, own = (
            max(abs(a - b) / abs(b) for a, b in zip(losses, exact, strict=True)) for losses in (split, unsplit)
        )
        assert error <= FACTOR * max(own, torch.finfo(torch.bfloat16).eps / 2)


@pytest.mark.parametrize("family", MODELS)
def test_rounds_as_the_unsplit_model_does(family: str) -> None:
    for judged, dtypes in ranks(2).run(measured, MODELS[family], Mesh(tp=2), "bfloat16"):
        assert dtypes == {}
        assert [one for one in judged if not one[2] <= one[3]] == []
