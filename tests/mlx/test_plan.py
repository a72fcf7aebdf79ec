"""The plan of a config is the one that loading makes of its checkpoint, quantized or not; what cannot be split is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from partita.core.mesh import Mesh
from partita.errors import ModelError
from partita.mlx.collectives.groups import single_groups
from partita.mlx.load import load, shard
from partita.mlx.model.mlx_lm_models import quantize
from partita.mlx.plan import plan_of_config
from partita.mlx.weights.save import save
from tests.mlx.test_stage import whole
from tests.support.mlx_models import tiny_config
from tests.support.mlx_ranks import mlx_ranks

MIXED: dict[str, Any] = {
    "group_size": 32, "bits": 4, "model.layers.1.mlp.up_proj": {"group_size": 64, "bits": 8}, "lm_head": False,
}  # fmt: skip


def plans(folder: str, tp: int, pp: int) -> list[dict[str, Any]]:
    """Of the loaded checkpoint, and of its config alone: all but what is told of the model."""
    loaded: Any = load(folder, tp=tp, pp=pp)
    found = [json.loads(plan.to_json()) for plan in (loaded.partita_plan, plan_of_config(folder, Mesh(tp=tp, pp=pp)))]
    return [{key: value for key, value in data.items() if key != "model"} for data in found]


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
@pytest.mark.parametrize(
    ("family", "quantization"),
    [
        ("llama", {}),
        ("llama", {"group_size": 64, "bits": 4}),
        ("llama", MIXED),
        ("llama", {"group_size": 32, "bits": 8, "mode": "mxfp8"}),
        ("qwen3_moe", {"group_size": 32, "bits": 4}),
    ],
    ids=["plain", "affine", "mixed", "mxfp8", "experts"],
)
def test_the_plan_of_a_config_is_that_of_its_checkpoint(
    family: str, quantization: dict[str, Any], tp: int, pp: int, tmp_path: Path
) -> None:
    model = whole(family, mx.float32, hidden_size=128, head_dim=32, intermediate_size=192, moe_intermediate_size=64)
    if quantization:
        quantize(model, {"quantization": quantization})
    save(shard(model, groups=single_groups()), tmp_path / "model")
    for loaded, planned in mlx_ranks(2).run(plans, str(tmp_path / "model"), tp, pp):
        assert loaded == planned


@pytest.mark.parametrize(
    ("family", "mesh", "message"),
    [
        ("gemma3n", Mesh(pp=2), "gemma3n cannot be split into stages: the output differs from the unsplit model's"),
        (
            "phi3small",
            Mesh(tp=2),
            "phi3small cannot be split over tp=2: .*mlx-lm's phi3small writes out of bounds",
        ),
    ],
)
def test_what_cannot_be_split_is_told_by_name(family: str, mesh: Mesh, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        plan_of_config(tiny_config(family), mesh)


def test_virtual_stages_in_turn_and_in_a_v() -> None:
    config = tiny_config("llama")
    loop, v = (plan_of_config(config, Mesh(pp=2), vpp=2, placement=p) for p in ("loop", "v"))
    assert str(loop.layout) == str(v.layout) == "Et|t|t|tL"
    assert [loop.rank_layers(rank) for rank in range(2)] == [(0, 2), (1, 3)]
    assert [v.rank_layers(rank) for rank in range(2)] == [(0, 3), (1, 2)]
