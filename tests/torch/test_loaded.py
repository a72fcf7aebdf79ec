"""After loading, every tensor is what transformers' `from_pretrained` gives, bit for bit, for all families at once."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import transformers
from transformers.models.auto import modeling_auto

from partita.errors import PartitaError
from partita.torch.model.transformers_models import quiet
from tests.support.loaded import differences, small_model
from tests.support.ranks import RankError, on

MAPPINGS = ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM")
CLASSES = {
    (family, name if isinstance(name, str) else name[0])
    for mapping in MAPPINGS
    for family, name in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items()
}

HUNGRY = {"falcon_h1"}
"""Families whose proof needs several gigabytes on every rank: they are loaded by one rank only."""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("family", "name"), sorted(CLASSES))
def test_family(family: str, name: str, tmp_path: Path) -> None:
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        try:
            small_model(getattr(transformers, name), family).save_pretrained(tmp_path)
        except Exception as error:
            pytest.skip(f"no small model: {type(error).__name__}: {str(error)[:200]}")
        for tp, pp in ((1, 1), (2, 1), (1, 2))[: 1 if family in HUNGRY else 3]:
            try:
                found = on(tp * pp, differences, tmp_path, tp, pp)
            except (PartitaError, RankError) as error:
                line = str(error).strip().splitlines()[-1]
                if tp * pp == 1 or "partita.errors" not in line:
                    raise
                print(f"{family:28s} tp {tp} pp {pp} refused: {line}")
                continue
            assert not any(found), f"tp {tp} pp {pp}: {found}"


def test_enough_families_are_compared() -> None:
    assert len(CLASSES) > 200
