"""Every family of the installed mlx-lm, tiny and random, at tp 2: split and measured equal, or refused with a reason.

Each is measured in float64 where MLX runs it, and in the dtype that the model has: float32 and bfloat16.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from partita.core.mesh import Mesh
from partita.errors import PartitaError
from partita.mlx.model.config import COMPUTED_OTHERWISE
from partita.mlx.model.mlx_lm_models import build, model_classes
from partita.mlx.proof.family import plan_of_model, prove
from tests.support.mlx_models import families, tiny_config

REFUSED = {
    "bitnet": "Metal",  # its kernels are of Apple's GPUs only
    "muse_spark": "Metal",
    "phi3small": "writes out of bounds",
}
NOT_BUILT = {
    "olmo": "needs an additional package",
    "prism_hadamard_qwen35": "Hadamard pack",  # made of a checkpoint that was packed for it
    **dict.fromkeys(COMPUTED_OTHERWISE, "would give different results on MLX"),
}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", families())
def test_family(family: str, dtype: str) -> None:
    if family in NOT_BUILT:
        with pytest.raises(PartitaError, match=NOT_BUILT[family]):
            build(tiny_config(family))
        return
    config: dict[str, Any] = tiny_config(family)
    model = build(config)
    model.set_dtype(getattr(mx, dtype))
    if family in REFUSED:
        with pytest.raises(PartitaError, match=REFUSED[family]) as refusal:
            plan_of_model(model, Mesh(tp=2), config=config)
        print(f"{family:24s} refused: {refusal.value}")
        return
    plan = plan_of_model(model, Mesh(tp=2), config=config)
    if plan.rules.proven:
        prove(model, plan)
    inside = [m for m in plan.modules.values() if plan.spec.layer_of(m.path) is not None]
    apart = sum(module.gather_output for module in inside)
    whole = plan.rank_parameters(0) / plan.spec.parameters
    how = "proven" if plan.rules.proven else "measured"
    print(
        f"{family:24s} equal ({how}): {len(inside)} modules in layers split ({apart} apart), rank 0 holds {whole:.0%}"
    )
    assert plan.modules
    assert whole < 1.0


def test_the_floor() -> None:
    """32 of mlx-lm's families have a `shard` of their own."""
    assert {*REFUSED, *NOT_BUILT} <= set(families())
    assert len(families()) - len(REFUSED) - len(NOT_BUILT) >= 119
    assert model_classes({"model_type": "llama"})[0].__name__ == "Model"
