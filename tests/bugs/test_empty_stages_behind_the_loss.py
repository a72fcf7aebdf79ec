"""Generating with an empty stage behind the loss hung: what it was sent was described by the shape of the next token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from partita.text import Sampling
from partita.torch.generate import generate
from partita.torch.groups import single_groups
from partita.torch.hub import build_on_meta, read_hf_config
from partita.torch.load import shard
from partita.torch.probe import fill_unsplit
from tests.support.models import CONFIGS
from tests.support.ranks import ranks

CONFIG = {**CONFIGS["llama-3-heads"], "num_hidden_layers": 3}
PROMPTS = [[1, 2, 3], [4, 5, 6, 7]]


def tokens(layout: str | None) -> list[list[int]]:
    model = fill_unsplit(build_on_meta(read_hf_config(CONFIG), torch.float64))
    options: dict[str, Any] = {"groups": single_groups()} if layout is None else {"pp": 2, "layout": layout}
    split = shard(model, **options)
    sampling = Sampling(4, temperature=0.0, ignore_eos=True, use_generation_config=False)
    return [list(one.tokens) for one in generate(split, PROMPTS, sampling)]


@pytest.mark.parametrize("layout", ["Et|tt|L|", "Ettt|L||"])
def test_same_tokens(layout: str) -> None:
    assert ranks(2).run(tokens, layout) == [tokens(None)] * 2
