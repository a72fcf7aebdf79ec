"""Over two stages the first one computes the next step before the last one has finished the step before."""

from __future__ import annotations

import time
import warnings
from typing import Any

import pytest
import torch

from partita.generation import Sampling
from partita.serving import ServeRequest, ServeSettings
from partita.torch.serving import serving_loop
from tests.support.ranks import on
from tests.support.serving import served, split_model, unsplit_model

NEW = 12


def _times(clients: int) -> tuple[list[float], list[float]]:
    """When each forward of this rank's stage begins and ends, with layers that take a while without a core."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = split_model(unsplit_model("llama", {}, torch.float64), {"pp": 2})
        loop = serving_loop(model, ServeSettings(cache_bytes=1 << 24))
        assert loop.rows.depth == 2
        begins: list[float] = []
        ends: list[float] = []
        layers = [layer for layer in model.model.layers if any(True for _ in layer.parameters())]

        def begin(*_: object) -> None:
            begins.append(time.monotonic())
            time.sleep(0.05)

        layers[0].register_forward_pre_hook(begin)
        layers[-1].register_forward_hook(lambda *_: ends.append(time.monotonic()))
        sampling = Sampling(NEW, use_generation_config=False, ignore_eos=True)
        served(loop, [ServeRequest(i, (i, 1), sampling) for i in range(clients)], pause_s=0)
    return begins, ends


@pytest.mark.slow
def test_the_first_stage_does_not_wait_for_the_last() -> None:
    (begins, _), (_, ends) = on(2, _times, 8)
    assert len(begins) == len(ends)
    ahead = sum(begin < end for begin, end in zip(begins[1:], ends[:-1], strict=True))
    assert ahead > len(ends) / 2
