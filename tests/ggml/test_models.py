"""Every architecture of GGUF files, split over ranks, against transformers' model with the same values, and its own loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from partita.torch.load import load
from partita.torch.model.float64 import Float64Everywhere
from partita.torch.model.parts import local_tensors, plan_of
from partita.torch.quantized.tensor import QuantizedTensor
from partita.torch.weights.save import save
from tests.support.compare import EXACT
from tests.support.gguf_files import CONFIGS, build, random_model, write_model
from tests.support.ranks import RankError, on

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "F16", "BF16")
SPLITS = ({"tp": 1}, {"tp": 2}, {"tp": 3}, {"pp": 2})
IDS = torch.arange(3, 15).view(2, 6)

REFUSED = {
    **{(kind, "tp"): "cannot be split over tp" for kind in ("mamba", "falcon_mamba")},
    **{(kind, "pp"): "cannot be split into stages" for kind in ("t5", "umt5")},
}
"""What of which model type is refused, and why."""

WIDE = {
    **CONFIGS["llama"], "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 4
}  # fmt: skip
"""Rows of whole blocks of 256, of which three ranks have parts."""


def _logits(file: str, split: dict[str, int]) -> torch.Tensor:
    model = load(file, dtype="float64", **split)
    with torch.no_grad(), Float64Everywhere():
        found: torch.Tensor = model(**_inputs(model)).logits
    return found


def _inputs(model: Any) -> dict[str, torch.Tensor]:
    return {"input_ids": IDS} | ({"decoder_input_ids": IDS[:, :4] + 9} if model.config.is_encoder_decoder else {})


def _expected(data: dict[str, Any], model: Any) -> torch.Tensor:
    wide = build(data, torch.float64)  # not float32 widened, whose buffers are rounded
    wide.load_state_dict(model.state_dict())
    with torch.no_grad(), Float64Everywhere():
        found: torch.Tensor = wide(**_inputs(wide)).logits
    return found


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_values_in_the_file(name: str, split: dict[str, int], tmp_path: Path) -> None:
    model = random_model(CONFIGS[name])
    write_model(tmp_path / "model.gguf", model, KINDS)
    [(axis, size)] = split.items()
    refused = REFUSED.get((model.config.model_type, axis)) if size > 1 else None
    if refused is not None:
        with pytest.raises(RankError, match=refused):
            on(size, _logits, str(tmp_path / "model.gguf"), split)
        return
    expected = _expected(CONFIGS[name], model)
    for found in on(max(split.values()), _logits, str(tmp_path / "model.gguf"), split):
        assert (found - expected).abs().max() <= EXACT * expected.abs().max()


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_types_with_blocks_of_256_elements(split: dict[str, int], tmp_path: Path) -> None:
    model = random_model(WIDE)
    write_model(tmp_path / "model.gguf", model, ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"))
    expected = _expected(WIDE, model)
    for found in on(max(split.values()), _logits, str(tmp_path / "model.gguf"), split):
        assert (found - expected).abs().max() <= EXACT * expected.abs().max()


MISREAD = ("gpt-oss", "falcon-40b", "falcon-11b", "mamba-falcon", "lfm2", "t5", "t5-gated", "t5-umt5")
THEIRS = sorted(name for name in CONFIGS if name not in MISREAD)
"""Architectures of which transformers' own loader reads these files rightly."""


@pytest.mark.parametrize("name", THEIRS)
def test_weights_are_those_that_transformers_reads(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    model = random_model(CONFIGS[name])
    # transformers decodes with the gguf package here, which has all types.
    write_model(tmp_path / "model.gguf", model, KINDS[:-2])
    config = AutoConfig.for_model(**CONFIGS[name])
    other: Any = (
        type(model)
        .from_pretrained(
            tmp_path, gguf_file="model.gguf", config=config, dtype=torch.float32, experts_implementation="eager"
        )
        .eval()
    )
    mine = load(tmp_path / "model.gguf", dtype="float32")
    found = local_tensors(mine, plan_of(mine)[0])
    for key, value in other.state_dict().items():
        if key in found:
            held = found[key].values() if isinstance(found[key], QuantizedTensor) else found[key]
            # A logarithm is rounded to float32 in one step here, as the exponential of transformers' is not.
            assert torch.equal(held, value) or (key.endswith("A_log") and torch.allclose(held, value, rtol=1e-6)), key
    with torch.no_grad():
        expected, logits = other(**_inputs(other)).logits, mine(**_inputs(mine)).logits
    assert (logits - expected).abs().max() <= 2e-5 * expected.abs().max()


def _kinds(file: str, tp: int) -> dict[str, str]:
    model = load(file, tp=tp)
    return {name: repr(tensor) if isinstance(tensor, QuantizedTensor) else str(tensor.dtype)
            for name, tensor in local_tensors(model, plan_of(model)[0]).items()}  # fmt: skip


def test_weights_stay_quantized_in_memory(tmp_path: Path) -> None:
    write_model(tmp_path / "model.gguf", random_model(CONFIGS["llama-tied"]), ("Q4_1",))
    for kinds in on(2, _kinds, str(tmp_path / "model.gguf"), 2):
        plain = {name for name, kind in kinds.items() if "Q4_1" not in kind}
        assert plain
        assert all("norm" in name or name.endswith("bias") for name in plain)
        assert "Q4_1" in kinds["model.embed_tokens.weight"]


def _ties(file: str) -> tuple[bool, bool]:
    model: Any = load(file)
    return model.lm_head.weight is model.model.embed_tokens.weight, bool(model.config.tie_word_embeddings)


def test_a_file_without_a_head_has_a_tied_one(tmp_path: Path) -> None:
    for name, tied in (("llama-tied", True), ("llama", False)):
        write_model(tmp_path / f"{name}.gguf", random_model(CONFIGS[name]), ("Q8_0",))
        assert _ties(str(tmp_path / f"{name}.gguf")) == (tied, tied)


def _saved(file: str, folder: str, tp: int) -> None:
    save(load(file, dtype="float32", tp=tp), folder)


@pytest.mark.parametrize("name", ["llama-tied", "qwen3moe", "gpt2", "gpt-oss", "falcon-40b"])
def test_a_save_writes_values(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = random_model(CONFIGS[name])
    write_model(tmp_path / "model.gguf", model, ("Q4_0", "Q5_1", "F16"))
    on(2, _saved, str(tmp_path / "model.gguf"), str(tmp_path / "out"), 2)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert getattr(again.config, "quantization_config", None) is None
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
