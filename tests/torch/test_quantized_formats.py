"""Models of every quantized form, split over ranks and stages, against the unsplit model with the values that it defines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from partita.errors import ModelError
from partita.torch.load import load
from partita.torch.model.float64 import Float64Everywhere
from partita.torch.quantized.tensor import QuantizedTensor
from partita.torch.train import TrainSettings, train
from partita.torch.weights.adapters import add_lora
from partita.torch.weights.peft_format import load_adapters, save_adapters
from tests.support.compare import EXACT
from tests.support.quantized_forms import (
    DEEPSEEK,
    FORMS,
    GPT2,
    GPT_OSS,
    LLAMA,
    MIXTRAL,
    QWEN3_MOE,
    unsplit,
    write,
    write_conv1d,
    write_experts,
    write_gpt_oss,
)  # fmt: skip
from tests.support.ranks import on

SPLITS = ((2, 1), (3, 1), (1, 2))
"""tp and pp."""


def measure(folder: Path, config: Mapping[str, Any], tp: int, pp: int) -> tuple[float, int, int, int]:
    """The relative error of the logits in float64, the bytes of quantized weights here, all their elements, and plain ones."""
    ids = torch.arange(7)[None] + 1
    split = load(folder, tp=tp, pp=pp, dtype="float64")
    whole = unsplit(folder, config)
    with Float64Everywhere(), torch.no_grad():
        expected = whole(input_ids=ids).logits
        found = split(input_ids=ids).logits
    held = {id(t): t for t in split.parameters()}.values()
    quantized = [t for t in held if isinstance(t, QuantizedTensor)]
    matrices = [t for t in held if not isinstance(t, QuantizedTensor) and t.dim() > 1]
    error = float((found - expected).abs().max() / expected.abs().max())
    return error, sum(t.stored_bytes for t in quantized), sum(t.numel() for t in quantized), len(matrices)


@pytest.mark.parametrize("name", FORMS)
def test_split_equals_unsplit(name: str, tmp_path: Path) -> None:
    form = FORMS[name]
    write(tmp_path, form)
    _compare(tmp_path, LLAMA)


def _compare(folder: Path, config: Mapping[str, Any]) -> None:
    for tp, pp in SPLITS:
        found = on(tp * pp, measure, folder, config, tp, pp)
        assert max(error for error, *_ in found) <= EXACT, (tp, pp, found)
        assert all(elements for _, _, elements, _ in found), (tp, pp)


@pytest.mark.parametrize("name", ["gptq-4", "gptq-3-order", "bnb-int8", "nf4"])
def test_conv1d(name: str, tmp_path: Path) -> None:
    write_conv1d(tmp_path, FORMS[name])
    _compare(tmp_path, GPT2)


EXPERTS: dict[str, tuple[str, Mapping[str, Any]]] = {
    f"{family}-{name}": (name, config)
    for family, config in (("qwen3-moe", QWEN3_MOE), ("mixtral", MIXTRAL), ("deepseek", DEEPSEEK))
    for name in ("fp8", "gptq-4", "gptq-4-order", "awq", "packed-4-zeros", "mlx-4")
}


@pytest.mark.parametrize("case", EXPERTS)
def test_experts(case: str, tmp_path: Path) -> None:
    """Experts that are separate on disk and one tensor in the model stay quantized."""
    name, config = EXPERTS[case]
    write_experts(tmp_path, FORMS[name], config)
    for tp, pp in SPLITS:
        found = on(tp * pp, measure, tmp_path, config, tp, pp)
        assert max(error for error, *_ in found) <= EXACT, (tp, pp, found)
        assert sum(elements for _, _, elements, _ in found)


def test_experts_of_which_one_is_plain(tmp_path: Path) -> None:
    """A fused tensor of which one expert was left out of the quantization is held plain."""
    write_experts(tmp_path, FORMS["awq"], QWEN3_MOE)
    path = "model.layers.0.mlp.experts"
    values = torch.load(tmp_path / "plain.pt")[f"{path}.down_proj"][1]
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if not n.startswith(f"{path}.1.down_proj.")}
    save_file({**kept, f"{path}.1.down_proj.weight": values.contiguous()}, tmp_path / "model.safetensors")
    _compare(tmp_path, QWEN3_MOE)


def test_gpt_oss(tmp_path: Path) -> None:
    write_gpt_oss(tmp_path)
    _compare(tmp_path, GPT_OSS)


def test_tied_embeddings_of_mlx(tmp_path: Path) -> None:
    """The head of a tied model is the quantized embedding."""
    tied = {**LLAMA, "tie_word_embeddings": True}
    write(tmp_path, FORMS["mlx-4"], tied)
    _compare(tmp_path, tied)


def test_zeros_where_a_layer_has_no_bias(tmp_path: Path) -> None:
    """auto-gptq writes a bias of zeros for every layer; one that is not zero belongs to another model."""
    write(tmp_path, FORMS["gptq-4"])
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.bias"
    save_file({**tensors, name: torch.zeros(928)}, tmp_path / "model.safetensors")
    load(tmp_path)
    save_file({**tensors, name: torch.ones(928)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"up_proj.bias belongs to .*, but the model has no bias there"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["nf4", "int-channel", "gptq-4"])
def test_the_dtype_is_that_of_the_plain_weights(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Scales have dtypes of their own, often wider, and do not count."""
    write(tmp_path, FORMS[name])
    plain = ("norm.weight", "embed_tokens.weight", "lm_head.weight")
    tensors = load_file(tmp_path / "model.safetensors").items()
    save_file({n: t.bfloat16() if n.endswith(plain) else t for n, t in tensors}, tmp_path / "model.safetensors")
    model = load(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    noted = any("input_activations" in record.getMessage() for record in caplog.records)
    assert noted == (name == "int-channel")


def _adapted(folder: Path, out: Path, tp: int) -> tuple[list[float], float]:
    """The losses of training adapters, and the error of the logits after they were saved and loaded again."""
    model = load(folder, tp=tp, dtype="float64")
    add_lora(model, rank=4, seed=0)
    settings = TrainSettings(steps=3, batch_size=2, sequence_length=8, learning_rate=0.01, warmup_steps=0)
    losses = [report.loss for report in train(model, torch.arange(96) % 64, settings)]
    save_adapters(model, out)
    again, base = (load(folder, tp=tp, dtype="float64") for _ in range(2))
    load_adapters(again, out)
    ids = torch.arange(7)[None] + 1
    with torch.no_grad():
        expected, found, without = (one(input_ids=ids).logits for one in (model, again, base))
    assert not torch.equal(expected, without)
    return losses, float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptq-4-order", "nf4-nested", "mlx-4", "nvfp4"])
def test_adapters_are_trained_saved_and_loaded(name: str, tmp_path: Path) -> None:
    write(tmp_path / "model", FORMS[name])
    [(expected, _)] = on(1, _adapted, tmp_path / "model", tmp_path / "alone", 1)
    for losses, error in on(2, _adapted, tmp_path / "model", tmp_path / "adapters", 2):
        assert losses == pytest.approx(expected, rel=1e-12)
        assert error == 0
