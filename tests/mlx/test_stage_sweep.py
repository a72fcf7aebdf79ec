"""Every family of mlx-lm, cut between all layers of a tiny model: what can be pipelined, and why not the others."""

from __future__ import annotations

import contextlib
import io
import re

import mlx.core as mx
import pytest

from partita.core.mesh import Mesh
from partita.errors import ModelError
from partita.mlx.load import plan_of_model
from partita.mlx.model.config import COMPUTED_OTHERWISE
from partita.mlx.model.mlx_lm_models import build
from partita.mlx.proof.stages import prove_stages, refuse_undecodable
from tests.support.mlx_models import families, tiny_config

HANDS_ON_MORE = "its layers pass on values other than arrays"
EXPECTED = {
    "afm7": ("refused", "has no attribute 'shape'"),  # its last layers take the keys of another layer
    "bitnet": ("refused", "Metal"),
    "deepseek_v41": ("no generation", "token 7 differs"),
    "gemma3n": ("refused", "the output differs"),
    "gemma4": ("refused", HANDS_ON_MORE),
    "gemma4_text": ("refused", HANDS_ON_MORE),
    "hunyuan": ("refused", HANDS_ON_MORE),
    "iquestloopcoder": ("refused", "without calling each of its layers"),  # it runs its layers several times
    "kimi_k3": ("refused", HANDS_ON_MORE),
    "muse_spark": ("refused", "Metal"),
    "olmo": ("not built", "needs an additional package"),
    "phi3small": ("refused", "writes out of bounds"),
    "prism_hadamard_qwen35": ("not built", "Hadamard pack"),
    "talkie": ("refused", "the output differs"),
    **dict.fromkeys(COMPUTED_OTHERWISE, ("not built", "would give different results on MLX")),
}
"""Families that are not equal in parts, with what happens to them and a pattern of the reason; all others are equal."""


def verdict(family: str, dtype: mx.Dtype) -> tuple[str, str]:
    """Whether a family is equal in parts, equal but for its cache, refused, or not to be built here; and why."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            model = build(tiny_config(family))
        model.set_dtype(dtype)
        plan = plan_of_model(model, Mesh(pp=2))
    except ModelError as error:
        return "not built", str(error)
    try:
        prove_stages(model, plan)
    except ModelError as error:
        return "refused", str(error)
    try:
        refuse_undecodable(model, plan)
    except ModelError as error:
        return "no generation", str(error)
    return "equal", ""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", families())
def test_family(family: str, dtype: str) -> None:
    what, why = verdict(family, getattr(mx, dtype))
    print(f"{family:24s} {what:14s} {why[:120]}")
    expected, reason = EXPECTED.get(family, ("equal", "^$"))
    assert what == expected, why
    assert re.search(reason, why)


def test_the_floor() -> None:
    """mlx-lm itself pipelines 17 families."""
    assert set(EXPECTED) <= set(families())
    assert len(families()) - len(EXPECTED) >= 110
