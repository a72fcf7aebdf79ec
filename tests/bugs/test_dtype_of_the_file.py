"""A bfloat16 file whose config names no dtype was loaded as float32, at twice the memory. The file tells its dtype."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from partita.cli.arguments.model import make_plan
from partita.core.mesh import Mesh
from partita.core.request import PlanRequest
from partita.torch import load
from partita.torch.train import TrainSettings, train
from tests.support.loaded import differences, random_model
from tests.support.ranks import on

CONFIG: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def in_bfloat16(folder: Path, named: str | None) -> None:
    """A model in bfloat16 on disk whose config names the dtype `named`."""
    random_model(transformers.LlamaForCausalLM, transformers.LlamaConfig(**CONFIG)).bfloat16().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps({**config, **({"dtype": named} if named else {})}))


@pytest.mark.parametrize("named", [None, "bfloat16", "float32"])
def test_it_is_the_file_s(tmp_path: Path, named: str | None, caplog: pytest.LogCaptureFixture) -> None:
    in_bfloat16(tmp_path, named)
    with caplog.at_level(logging.WARNING, "partita"):
        model = load(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: the weights are bfloat16, but config.json says float32: bfloat16 is used."
    ] * (named == "float32")
    assert {p.dtype for p in load(tmp_path, dtype="float32").parameters()} == {torch.float32}


def deepseek(folder: Path) -> None:
    config = transformers.DeepseekV3Config(
        **{**CONFIG, "num_hidden_layers": 2, "num_key_value_heads": 4}, n_routed_experts=4, n_group=2, topk_group=1,
        num_experts_per_tok=2, moe_intermediate_size=8, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8,
        qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=6,
    )  # fmt: skip
    random_model(transformers.DeepseekV3ForCausalLM, config).bfloat16().save_pretrained(folder)


def test_what_transformers_keeps_wide_is_wide(tmp_path: Path) -> None:
    """A router's weights stay float32 in a bfloat16 DeepSeek-V3, as `from_pretrained` has them."""
    deepseek(tmp_path)
    assert differences(tmp_path, 1, 1) == []
    wide = {name for name, tensor in load(tmp_path).state_dict().items() if tensor.dtype == torch.float32}
    assert wide == {f"model.layers.1.mlp.gate.{name}" for name in ("weight", "e_score_correction_bias")}


@pytest.mark.parametrize("named", [None, "float32"])
def test_on_mlx(tmp_path: Path, named: str | None, caplog: pytest.LogCaptureFixture) -> None:
    mx = pytest.importorskip("mlx.core")
    from partita.mlx.load import load as mlx_load
    from partita.mlx.model.parts import plan_of

    in_bfloat16(tmp_path, named)
    with caplog.at_level(logging.WARNING, "partita"):
        model = mlx_load(tmp_path)
    assert model.lm_head.weight.dtype == mx.bfloat16
    assert plan_of(model)[0].spec.dtype == "bfloat16"
    assert len(caplog.records) == (named == "float32")


@pytest.mark.parametrize("engine", ["torch", "mlx"])
def test_a_plan_shows_its_bytes(tmp_path: Path, engine: Any) -> None:
    pytest.importorskip("mlx.core" if engine == "mlx" else "torch")
    in_bfloat16(tmp_path, None)
    made = make_plan(PlanRequest(str(tmp_path), Mesh(tp=2), engine=engine))
    assert (made.spec.dtype, made.spec.parameter_bytes) == ("bfloat16", 2 * made.spec.parameters)


def losses(folder: Path, layout: dict[str, int]) -> list[float]:
    settings = TrainSettings(
        steps=3, batch_size=4, sequence_length=8, warmup_steps=1, learning_rate=0.01, zero=layout.get("dp", 1) > 1
    )
    return [report.loss for report in train(load(folder, **layout), torch.arange(600) ** 2 % 53, settings)]


@pytest.mark.parametrize("layout", [{"dp": 2}, {"pp": 2}])
def test_parameters_of_two_dtypes_are_trained(tmp_path: Path, layout: dict[str, int]) -> None:
    """Replicas that share the optimizer's state (--zero), and stages."""
    deepseek(tmp_path)
    expected = losses(tmp_path, {})
    assert expected[-1] < expected[0]
    for found in on(2, losses, tmp_path, layout):
        assert found == pytest.approx(expected, rel=2e-3)
