"""The wrapper around masks, installed by `--cp`, did not pass on arguments by name, so that Gemma 3 then refused images."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, masking_utils

from partita.core.mesh import Mesh
from partita.torch import fresh
from partita.torch.collectives.groups import make_groups
from partita.torch.model.context import split_context
from tests.support.models import CONFIGS
from tests.support.ranks import ranks


def _mask_arguments() -> list[Any]:
    split_context(fresh(CONFIGS["llama-7-heads-1-kv"], seed=0, cp=2), make_groups(Mesh(cp=2)).cp)
    config = LlamaConfig(attn_implementation="sdpa")
    given = (config, torch.zeros(1, 5, 8), torch.ones(1, 5), None, torch.arange(5)[None])
    by_name = masking_utils._preprocess_mask_arguments(*given, layer_idx=0)
    return [masking_utils._preprocess_mask_arguments(*given, 0)[3:], by_name[3:]]


def test_masks_take_arguments_by_name() -> None:
    for positional, by_name in ranks(2).run(_mask_arguments):
        assert by_name == positional
