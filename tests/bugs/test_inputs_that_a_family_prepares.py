"""Families that change what comes next in `prepare_inputs_for_generation` were given the last token alone.

Phi-3 and PhiMoE drop their cache where a text crosses LongRoPE's limit, GPT has no cache and reads the whole text again, XLNet
adds a token to be filled in and keeps a state instead of a cache.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from partita.core.mesh import Mesh
from partita.torch import Sampling, generate
from partita.torch.collectives.groups import make_groups
from partita.torch.proof.family import plan_of_model
from partita.torch.split.apply import apply_plan
from partita.torch.split.finish import finish
from tests.bugs.test_longrope_crosses_its_limit import FAMILIES, SIZES
from tests.support.ranks import ranks

NEW = 14
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5, 9, 0, 4, 5], [6, 6, 2, 6, 0, 7, 0]]
"""For LongRoPE two that cross the limit while they are continued, and one that is beyond it."""

_ROTARY: dict[str, dict[str, Any]] = {
    name: {"model_type": name, **SIZES, "num_hidden_layers": 3, **FAMILIES[name]}
    for name in ("phi3", "phimoe", "llama")
}
CONFIGS: dict[str, dict[str, Any]] = {
    **_ROTARY,
    "openai-gpt": {"model_type": "openai-gpt", "vocab_size": 67, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "xlnet": {"model_type": "xlnet", "vocab_size": 67, "d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 48},
    "ctrl": {"model_type": "ctrl", "vocab_size": 67, "n_embd": 32, "dff": 48, "n_layer": 3, "n_head": 4, "n_positions": 64},
}  # fmt: skip


def _unsplit(data: dict[str, Any]) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    torch.manual_seed(0)
    config = AutoConfig.for_model(**data)
    model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3 if "emb" in name else 0.2)
    model.generation_config = GenerationConfig()  # type: ignore[assignment]
    return model


def _theirs(model: nn.Module) -> list[list[int]]:
    """What transformers' own `generate` continues each prompt with."""
    given = {"do_sample": False, "max_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": None}
    return [
        model.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p)).long(), **given)[0, len(p) :].tolist()  # type: ignore[operator]
        for p in PROMPTS
    ]


def _tokens(
    data: dict[str, Any], where: dict[str, int], layout: str | None = None
) -> tuple[list[list[int]], list[list[int]]]:
    unsplit = _unsplit(data)
    plan = plan_of_model(unsplit, Mesh(**where), layout)
    groups = make_groups(plan.mesh)
    split = finish(apply_plan(copy.deepcopy(unsplit), plan, groups), plan, groups)
    # Twice, the second time after the text has been beyond the limit.
    sampling = Sampling(max_new_tokens=NEW, ignore_eos=True)
    found = [[list(g.tokens) for g in generate(split, PROMPTS, sampling)] for _ in range(2)]
    assert found[0] == found[1]
    return _theirs(unsplit), found[0]


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("phi3", {"tp": 2}),
        ("phi3", {"pp": 2}),
        ("phimoe", {"tp": 2}),
        ("phimoe", {"pp": 2}),
        ("phi3", {"pp": 3}),
        ("llama", {"pp": 2}),
        ("openai-gpt", {"pp": 2}),
        ("xlnet", {"tp": 2}),
        ("ctrl", {"pp": 2}),
    ],
)
def test_tokens_are_those_of_transformers(name: str, where: dict[str, int]) -> None:
    size = Mesh(**where).size
    for expected, found in ranks(size).run(_tokens, CONFIGS[name], where):
        assert len({token for row in expected for token in row}) > 1
        assert found == expected


def test_a_rank_without_a_tensor_drops_its_cache_too() -> None:
    for expected, found in ranks(3).run(_tokens, CONFIGS["phi3"], {"pp": 3}, "Et||ttL"):
        assert found == expected
