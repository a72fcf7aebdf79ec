"""`verify` of a real ALBERT in float32 reported differences after two steps of training: its shared layers amplify rounding.

One direction of the weights carries the error of all parameters, so the ratio of two runs' errors is not bounded by 2.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from partita.proof.rounding import REPEATS, Rounding, judge_trained
from partita.torch.model.transformers_models import build_on_meta, read_hf_config
from partita.torch.proof.family import fill_unsplit
from partita.torch.proof.rounding import moved_by_rounding
from tests.support.models import CONFIGS

UNIT = 2.0**-24
MEASURED = [Rounding("parameter", name, 100, 100.0, (1e-7) ** 2 * 100, (6e-7) ** 2 * 100) for name in "abc"]


def judged(errors: list[float], measured: list[Rounding] = MEASURED) -> tuple[bool, int]:
    """Whether all is equal if the unsplit model's errors of further runs are `errors`, and the number of these runs."""
    seeds: list[int] = []

    def again(seed: int) -> list[Rounding]:
        seeds.append(seed)
        return [replace(one, unsplit=errors[(seed - 1) % len(errors)] ** 2 * 100) for one in measured]

    found = judge_trained(measured, again, UNIT)
    assert seeds == list(range(1, len(seeds) + 1))
    return all(one.error <= one.allowed for one in found), len(seeds)


def test_the_largest_error_of_the_unsplit_model_counts() -> None:
    assert judged([2e-7, 1e-7, 4e-7]) == (True, 3)
    assert judged([2e-7, 1e-7]) == (False, REPEATS)


def test_what_is_no_rounding_differs() -> None:
    assert judged([4e-7], [replace(one, split=1e-4**2 * 100) for one in MEASURED]) == (False, REPEATS)
    assert judged([4e-7], [replace(one, split=math.inf) for one in MEASURED]) == (False, 0)
    assert judged([4e-7], [replace(one, split=math.nan) for one in MEASURED]) == (False, 0)


def test_weights_move_by_one_rounding_at_most_and_stay_tied() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = fill_unsplit(build_on_meta(read_hf_config(CONFIGS["llama-biases-tied"]), dtype))
        moved, differences = moved_by_rounding(model, 1)
        before = dict(model.named_parameters(remove_duplicate=False))
        assert differences.keys() == before.keys()
        for name, difference in differences.items():
            limit = 1.51 * torch.finfo(dtype).eps * before[name].double().abs()
            assert (difference.abs() <= limit.clamp(min=torch.finfo(dtype).tiny)).all()
            assert difference.any()
        assert moved.lm_head.weight is moved.model.embed_tokens.weight
