"""Generating with an empty stage behind the loss hung on torch: what it was sent was described by the shape of the next token.

On MLX a stage with the loss alone failed on every prompt: it was run although nothing was to be computed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from partita.generation import Sampling
from partita.torch.collectives.groups import single_groups as alone
from partita.torch.generate import generate
from partita.torch.load import shard
from partita.torch.model.transformers_models import build_on_meta, read_hf_config
from partita.torch.proof.family import fill_unsplit
from tests.support.mlx_models import tiny_config
from tests.support.mlx_ranks import mlx_ranks
from tests.support.models import CONFIGS
from tests.support.ranks import ranks

CONFIG = {**CONFIGS["llama-3-heads"], "num_hidden_layers": 3}
PROMPTS = [[1, 2, 3], [4, 5, 6, 7]]


def tokens(layout: str | None) -> list[list[int]]:
    model = fill_unsplit(build_on_meta(read_hf_config(CONFIG), torch.float64))
    options: dict[str, Any] = {"groups": alone()} if layout is None else {"pp": 2, "layout": layout}
    split = shard(model, **options)
    sampling = Sampling(4, temperature=0.0, ignore_eos=True, use_generation_config=False)
    return [list(one.tokens) for one in generate(split, PROMPTS, sampling)]


@pytest.mark.parametrize("layout", ["Et|tt|L|", "Ettt|L||"])
def test_same_tokens(layout: str) -> None:
    assert ranks(2).run(tokens, layout) == [tokens(None)] * 2


def tokens_on_mlx(layout: str | None) -> list[list[int]]:
    mx = pytest.importorskip("mlx.core")
    from partita.mlx.collectives.groups import single_groups
    from partita.mlx.generate import generate
    from partita.mlx.load import shard
    from partita.mlx.model.mlx_lm_models import build
    from partita.mlx.proof.family import fill

    mx.random.seed(0)
    model = fill(build(tiny_config("llama")), mx.float64)
    options: dict[str, Any] = {"groups": single_groups()} if layout is None else {"pp": 2, "layout": layout}
    sampling = Sampling(4, temperature=0.0, ignore_eos=True, use_generation_config=False)
    return [list(one.tokens) for one in generate(shard(model, **options), PROMPTS, sampling)]


@pytest.mark.parametrize("layout", ["Et|ttt|L|", "Etttt|L"])
def test_same_tokens_on_mlx(layout: str) -> None:
    assert mlx_ranks(2).run(tokens_on_mlx, layout) == mlx_ranks(1).run(tokens_on_mlx, None) * 2
