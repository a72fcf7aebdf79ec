"""Beside a longer prompt some families wrote something else than for the prompt alone.

BART counts positions from the first column, padding included; dynamic NTK and LongRoPE turn all rows by the frequencies of the
longest. Such rows are grouped by length.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from partita.core.mesh import Mesh
from partita.errors import PartitaError
from partita.torch import Sampling, generate
from partita.torch.model.transformers_models import quiet
from tests.support.ranks import ranks
from tests.support.serving import split_model, unsplit_model

PROMPTS = [[3, 1, 4], [2, 7, 1, 8, 2, 8, 1], [5, 9, 6, 5, 3]]
SAMPLING = Sampling(8, ignore_eos=True, use_generation_config=False)
_DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
FORMS: dict[str, dict[str, Any]] = {
    "bart": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "vocab_size": 67},
    "qwen2": {"rope_parameters": _DYNAMIC, "max_position_embeddings": 8},
    "gpt2": {},
    "bloom": {},
    "opt": {},
    "mistral": {"sliding_window": 4},
    "mamba": {},
}
"""By family, what differs from the defaults of its config."""


def _tokens(family: str, changes: dict[str, Any], where: dict[str, int], dtype: torch.dtype) -> tuple[Any, Any]:
    """What each prompt is continued with alone, by a model of its own, and all of them in one call, by one model."""
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        unsplit = unsplit_model(family, changes, dtype)
        expected = [generate(split_model(unsplit, {}), [prompt], SAMPLING)[0].tokens for prompt in PROMPTS]
        split = split_model(unsplit, where)
        found = [[g.tokens for g in generate(split, PROMPTS, SAMPLING)] for _ in range(2)]
    assert found[0] == found[1]
    return expected, found[0]


@pytest.mark.parametrize(
    ("family", "where"),
    [("bart", {"tp": 2}), ("qwen2", {"tp": 2}), ("qwen2", {"pp": 2}), ("gpt2", {"pp": 2}), ("qwen2", {"tp": 3})],
)
def test_rows_are_those_of_each_prompt_alone(family: str, where: dict[str, int]) -> None:
    for expected, found in ranks(Mesh(**where).size).run(_tokens, family, FORMS[family], where, torch.float32):
        assert found == expected


@pytest.mark.parametrize("family", FORMS)
def test_rows_of_one_rank(family: str) -> None:
    expected, found = _tokens(family, FORMS[family], {}, torch.float32)
    assert found == expected


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_every_family(family: str, dtype: torch.dtype) -> None:
    with torch.device("meta"), quiet():
        try:
            AutoModelForCausalLM.from_config(AutoConfig.for_model(family))
        except Exception as error:
            pytest.skip(f"transformers itself does not build it from its defaults: {type(error).__name__}")
    try:
        expected, found = _tokens(family, {}, {}, dtype)
    except PartitaError as refusal:
        pytest.skip(f"refused: {refusal}")
    except RuntimeError as error:
        if "same dtype" not in str(error):
            raise
        pytest.skip(f"transformers itself does not run it in {dtype}: {error}")
    assert found == expected
