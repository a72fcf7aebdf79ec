"""`verify` over every axis together: experts, parts of sequences, stages and sharded states are the unsplit model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from partita.core.mesh import Mesh
from partita.core.plan import Plan
from partita.core.plan_settings import PlanSettings
from partita.errors import ModelError, PlanError
from partita.proof.report import Report
from partita.torch.model.transformers_models import build_on_meta, read_hf_config, spec_of
from partita.torch.training import sharded
from partita.torch.verify import verify
from tests.support.models import CONFIGS, UNMEASURED
from tests.support.ranks import ranks

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": CONFIGS["mixtral"],
    "qwen3-moe with an auxiliary loss": {**CONFIGS["qwen3-moe"], "output_router_logits": True},
    "mistral, a window": CONFIGS["mistral"],
    "deepseek-v3, latent attention": CONFIGS["deepseek-v3"],
    "gpt-oss": UNMEASURED["gpt-oss"],
}

EXPERTS = {"dp": 2, "tp": 2, "ep": 2, "etp": 1}
CONTEXT = {"cp": 2, "pp": 2, "microbatches": 2}
SHARDS = {"dp": 2, "pp": 2, "zero": 3, "schedule": "zb-h1", "microbatches": 4}

CASES: list[Any] = [
    *((name, how) for name in FAMILIES for how in (EXPERTS, CONTEXT, SHARDS) if name != "gpt-oss"),
    *(
        pytest.param(*one, marks=pytest.mark.slow)
        for one in (
            *(("gpt-oss", how) for how in (EXPERTS, CONTEXT, SHARDS)),
            *(("mistral, a window", {"cp": 2, "dp": 2, "zero": level}) for level in (1, 2, 3)),
            *(("deepseek-v3, latent attention", {"dp": 4, "ep": 2, "zero": level}) for level in (1, 2, 3)),
            ("qwen3-moe with an auxiliary loss", {"dp": 2, "tp": 2, "ep": 4, "etp": 1, "zero": 2}),
            ("gpt-oss", {"dp": 2, "tp": 2, "ep": 2, "etp": 2, "zero": 3}),
            ("gpt-oss", {"tp": 4, "ep": 2, "etp": 2}),
            ("deepseek-v3, latent attention", {"cp": 2, "tp": 2, "ep": 2, "etp": 2, "zero": 2}),
            ("mixtral", {"dp": 2, "pp": 2, "ep": 2, "zero": 3, "microbatches": 2}),
        )
    ),
]
CASES.remove(("mistral, a window", EXPERTS))


def verified(file: str, options: dict[str, Any]) -> Report:
    return verify(file, dtype="float64", **{"steps": 1, **options})


def written(folder: Path, config: dict[str, Any]) -> str:
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    return str(file)


@pytest.mark.parametrize(("name", "how"), CASES, ids=str)
def test_equals_the_unsplit_model(name: str, how: dict[str, Any], tmp_path: Path) -> None:
    reports = ranks(4).run(verified, written(tmp_path, FAMILIES[name]), how)
    assert all(report == reports[0] for report in reports)
    assert reports[0].equal, [row for row in reports[0].rows if not row.ok]
    expected = {"module", "output", "gradient", "loss", "norm", "parameter"} | ({"shard"} if how.get("zero") else set())
    assert {row.kind for row in reports[0].rows} - {"tokens"} == expected
    assert {row.tolerance for row in reports[0].rows if row.kind != "tokens"} == {1e-12}


def wrong(file: str, level: int) -> tuple[bool, set[str]]:
    """Whether `verify` finds that one replica has slightly larger gradients, and the kinds of what differs."""
    original = sharded.scatter_gradients

    def doubled(slots: Any) -> Any:
        found = original(slots)
        for slot, _ in found:
            if slot.comm.rank == 1:
                slot.shard.grad = slot.shard.grad * (1 + 1e-9)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded, "scatter_gradients", doubled)
        report = verified(file, {"dp": 2, "zero": level})
    return report.equal, {row.kind for row in report.rows if not row.ok}


def test_a_share_that_differs_on_the_last_replica_is_found(tmp_path: Path) -> None:
    for equal, kinds in ranks(2).run(wrong, written(tmp_path, CONFIGS["gpt2"]), 2):
        assert not equal
        assert kinds >= {"shard", "norm"}


def refused(file: str) -> str:
    with pytest.raises(PlanError) as error:
        verify(file, zero=2, tp=2)
    return str(error.value)


def test_shards_without_replicas_are_refused(tmp_path: Path) -> None:
    for said in ranks(2).run(refused, written(tmp_path, CONFIGS["gpt2"])):
        assert said == (
            "zero=2 distributes states over replicas (dp and cp), but the mesh dp 1 x pp 1 x tp 2 has one. Use dp=2 or "
            "more, or leave zero out."
        )


def planned(file: str, level: int | None) -> set[str]:
    built = build_on_meta(read_hf_config(json.loads(Path(file).read_text())), torch.float64)
    plan = Plan.make(spec_of(built), Mesh(dp=2)).with_settings(PlanSettings(zero=2))
    report = verify(file, plan, dtype="float64", steps=1, zero=level)
    assert report.equal
    return {row.kind for row in report.rows}


@pytest.mark.parametrize(("level", "is_sharded"), [(None, True), (0, False)])
def test_a_plan_has_its_level(level: int | None, is_sharded: bool, tmp_path: Path) -> None:
    for kinds in ranks(2).run(planned, written(tmp_path, CONFIGS["gpt2"]), level):
        assert ("shard" in kinds) is is_sharded


INDEXED = {
    **CONFIGS["deepseek-v3"], "model_type": "deepseek_v32", "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8,
}  # fmt: skip


def refused_context(file: str) -> str:
    with pytest.raises(ModelError) as error:
        verify(file, cp=2, dtype="float64", steps=0)
    return str(error.value)


def test_a_family_that_mixes_tokens_beside_its_attention_is_refused(tmp_path: Path) -> None:
    """DeepSeek-V3.2 adds masks to the scores of its indexer. `verify` failed in its forward, with a traceback."""
    for why in ranks(2).run(refused_context, written(tmp_path, INDEXED)):
        assert "cannot be trained with cp=2: its forward fails on parts of sequences" in why
        assert why.endswith("Use cp=1.")
