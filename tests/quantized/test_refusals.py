"""What cannot be read is refused with what it is and what to do; nothing is read as something else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from partita.checkpoint.index import open_checkpoint
from partita.checkpoint.read import Reader
from partita.errors import CheckpointError, ModelError, PartitaError
from partita.quantized.find import quantization_note, quantized_weights
from tests.support.quantized_forms import FORMS, Form


def _find(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> list[str]:
    save_file({f"layer.{n}": t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    return list(quantized_weights(open_checkpoint(folder), config))


def _refused(
    folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], error: type[PartitaError], says: str
) -> None:
    with pytest.raises(error, match=says):
        _find(folder, tensors, {"quantization_config": config})


@pytest.mark.parametrize(
    "method",
    [
        "aqlm",
        "quip",
        "hqq",
        "spqr",
        "vptq",
        "higgs",
        "torchao",
        "quanto",
        "eetq",
        "bitnet",
        "fp_quant",
        "auto-round",
        "quark",
    ],
)
def test_other_methods(method: str, tmp_path: Path) -> None:
    says = rf"is quantized \({method}\), which cannot be read: .*gptq.* can\. Dequantize it"
    _refused(tmp_path, {"weight": torch.zeros(2, 2)}, {"quant_method": method}, ModelError, says)


def _form(name: str) -> tuple[Form, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return FORMS[name], FORMS[name].make(64, 64)[0]


CHANGED: list[tuple[str, dict[str, Any], type[PartitaError], str]] = [
    (
        "gptq-4",
        {"checkpoint_format": "marlin"},
        ModelError,
        "checkpoint_format must be gptq or gptq_v2 to be read, but is 'marlin'",
    ),
    ("awq", {"version": "gemv_fast"}, ModelError, "version gemm or gemv to be read, but has 4 bits and 'gemv_fast'"),
    ("awq", {"bits": 3}, ModelError, "must have 4 bits"),
    ("packed-4", {"format": "marlin-24"}, ModelError, "format 'marlin-24' of compressed-tensors cannot be read"),
    ("packed-4", {"sparsity_config": {"format": "sparse-24-bitmask"}}, ModelError, "format 'sparse-24-bitmask'"),
    ("packed-4", {"config_groups": []}, ModelError, "config_groups must be groups by name"),
    (
        "packed-4",
        {"config_groups": {"a": {"targets": ["re:("], "weights": {"num_bits": 4}}}},
        ModelError,
        r"target re:\( must be a regular expression",
    ),
    (
        "packed-4",
        {"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 8, "group_size": 32}}}},
        CheckpointError,
        r"weight_packed' of I32 \(64, 8\) cannot be \(64, 64\) elements of 8 bits",
    ),
    (
        "packed-4",
        {"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 16}}}},
        CheckpointError,
        r"weight_scale' must be \(64, 4\) for groups of 16 for a weight of \(64, 64\), but is \(64, 2\)",
    ),
]


@pytest.mark.parametrize(("name", "changes", "error", "says"), CHANGED)
def test_configs(name: str, changes: dict[str, Any], error: type[PartitaError], says: str, tmp_path: Path) -> None:
    form, tensors = _form(name)
    _refused(tmp_path, tensors, {**form.config, **changes}, error, says)


@pytest.mark.parametrize(
    ("name", "missing", "says"),
    [
        ("gptq-4", "scales", "needs 'layer.scales' of two dims, which is missing"),
        ("gptq-4", "qzeros", "needs 'layer.qzeros' of two dims, which is missing"),
        ("packed-4", "weight_scale", "is I32, but has no weight_scale beside it"),
        ("packed-4", "weight_shape", "is I32, but has no weight_shape beside it"),
        ("int-channel", "weight_scale", "is I8, but has no weight_scale beside it"),
        ("nvfp4", "weight_global_scale", "nvfp4 and need a weight_global_scale"),
        ("nf4", "weight.absmax", r"weight.absmax' must have 64 elements .* but is missing"),
        ("nf4", "weight.quant_state.bitsandbytes__nf4", "is U8, but has no .*without which its values are unknown"),
        ("bnb-int8", "SCB", r"needs a scale for each output \('layer.SCB'\), which is missing"),
        ("mlx-4", "biases", r"is not a weight of 4 bits in groups of 32 in the mode affine"),
    ],
)
def test_missing_tensors(name: str, missing: str, says: str, tmp_path: Path) -> None:
    form, tensors = _form(name)
    del tensors[missing]
    with pytest.raises(CheckpointError, match=says):
        _find(tmp_path, tensors, {form.key: dict(form.config)})


@pytest.mark.parametrize("name", ["gptq-4", "awq"])
def test_shapes_that_disagree(name: str, tmp_path: Path) -> None:
    form, tensors = _form(name)
    tensors["qweight"] = tensors["qweight"][:, :-1]
    with pytest.raises(CheckpointError, match=r"the shape of 'layer.qweight' must be .*, as the tensors beside it say"):
        _find(tmp_path, tensors, {"quantization_config": dict(form.config)})


def test_mlx_heads_of_several_matrices(tmp_path: Path) -> None:
    form, tensors = _form("mlx-4")
    stacked = {name: tensor[None].repeat(2, 1, 1) for name, tensor in tensors.items()}
    with pytest.raises(
        ModelError, match=re.escape("as mlx-lm arranges them, which torch cannot read. Load the folder on MLX")
    ):
        _find(tmp_path, stacked, {"quantization": dict(form.config)})


def test_the_groups_of_compressed_tensors(tmp_path: Path) -> None:
    """A module's own name goes before a pattern, and that before its class; each layer has the form of its group."""
    made = {"exact": FORMS["packed-8-channel"], "pattern_1": FORMS["float-channel"], "other": FORMS["packed-4"]}
    groups = {
        "class": {**FORMS["packed-4"].config["config_groups"]["group_0"], "targets": ["Linear"]},
        "re": {**FORMS["float-channel"].config["config_groups"]["group_0"], "targets": ["re:.*pattern.*"]},
        "exact": {**FORMS["packed-8-channel"].config["config_groups"]["group_0"], "targets": ["exact"]},
    }
    tensors = {f"{path}.{n}": t.contiguous() for path, form in made.items() for n, t in form.make(64, 64)[0].items()}
    tensors["head.weight"] = torch.zeros(3, 64)
    save_file(tensors, tmp_path / "model.safetensors")
    config = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": groups,
        "ignore": ["head"],
    }
    found = quantized_weights(open_checkpoint(tmp_path), {"quantization_config": config})
    assert {name: weight.form for name, weight in found.items()} == {
        "exact.weight": "compressed-tensors, 8 bits",
        "pattern_1.weight": "compressed-tensors, fp8",
        "other.weight": "compressed-tensors, 4 bits, groups of 32",
    }
    assert "input_activations" in quantization_note({"quantization_config": config})
    assert not quantization_note({"quantization_config": FORMS["packed-4"].config})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}, "activation_scheme dynamic"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "activation_scheme static"),
        ({"quant_method": "fp8"}, "activation_scheme dynamic"),
        ({"quant_method": "fbgemm_fp8"}, "those of FBGEMM"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "those of bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, None),
        ({"quant_method": "gptq", "bits": 4}, None),
        ({"quant_method": "mxfp4"}, None),
    ],
)  # fmt: skip
def test_a_note_says_that_inputs_are_not_quantized(config: dict[str, object], said: str | None) -> None:
    note = quantization_note({"quantization_config": config})
    assert not note if said is None else said in note


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_bytes_under_fp8_that_are_no_floats(dtype: torch.dtype, tmp_path: Path) -> None:
    form, tensors = _form("fp8")
    tensors["weight"] = tensors["weight"].view(dtype)
    _refused(
        tmp_path, tensors, dict(form.config), CheckpointError, "must be F8_E4M3 or F8_E5M2 where quant_method is fp8"
    )


def test_ordered_inputs_without_their_groups(tmp_path: Path) -> None:
    form, tensors = _form("gptq-4-order")
    del tensors["g_idx"]
    _refused(tmp_path, tensors, dict(form.config), CheckpointError, "has no g_idx, which says the group of each input")


@pytest.mark.parametrize("add", [-1, 1])
@pytest.mark.parametrize(("name", "index"), [("gptq-4-order", "g_idx"), ("packed-4-order", "weight_g_idx")])
def test_groups_of_inputs_that_have_no_scales(name: str, index: str, add: int, tmp_path: Path) -> None:
    form, tensors = _form(name)
    tensors[index] = tensors[index] + add
    if index == "weight_g_idx" and add < 0:
        tensors[index][tensors[index] < 0] = 7  # -1 is allowed there: it says that inputs are in order
    save_file({f"layer.{n}": t.contiguous() for n, t in tensors.items()}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    [weight] = quantized_weights(checkpoint, {"quantization_config": dict(form.config)}).values()
    with Reader(checkpoint) as reader, pytest.raises(CheckpointError, match=r"must be within 0 to 1, as .* has 2"):
        weight.read(reader, [(0, 64)], [(0, 64)])
