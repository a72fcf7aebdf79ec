"""Every causal language model of the installed transformers, at tp 2: split and measured equal, or refused with a reason."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from partita.core.mesh import Mesh
from partita.errors import PartitaError
from partita.torch.hub import quiet
from partita.torch.probe import plan_of_model


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_family(family: str) -> None:
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        try:
            config = AutoConfig.for_model(family)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        except Exception as error:
            pytest.skip(f"transformers itself does not build it from its defaults: {type(error).__name__}")
        try:
            plan = plan_of_model(model, Mesh(tp=2))
        except PartitaError as refusal:
            print(f"{family:28s} refused: {refusal}")
            return
    inside = [m for m in plan.modules.values() if plan.spec.layer_of(m.path) is not None]
    whole = plan.rank_parameters(0) / max(1, plan.spec.parameters)
    how = "proven" if plan.rules.proven else "measured"
    print(f"{family:28s} equal ({how}): {len(inside)} modules in layers split, rank 0 holds {whole:.0%}")
    assert whole < 1.0 or not plan.modules
