"""Quantized weights on torch: loaded as they are, split anywhere, equal to the unsplit model of the same values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import partita.torch as pt
from partita.errors import CheckpointError, ModelError
from partita.torch.collectives.groups import single_groups
from partita.torch.model.parts import local_tensors, plan_of
from partita.torch.quantized.tensor import QuantizedTensor, has_quantized
from tests.support.quantized import (
    FP8,
    FP8_PLAIN,
    LLAMA,
    QWEN_MOE,
    dequantized,
    fp8,
    fp8_channels,
    fp8_tensor,
    write_quantized,
)
from tests.support.ranks import on

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
FORMS = {
    "fp8": (LLAMA, FP8, fp8),
    "fp8-channels": (LLAMA, FP8_PLAIN, fp8_channels),
    "fp8-tensor": (LLAMA, FP8_PLAIN, fp8_tensor),
    "fp8-experts": (QWEN_MOE, FP8, fp8),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    places = {name: tmp_path_factory.mktemp(name) for name in FORMS}
    for name, (data, quantization, write) in FORMS.items():
        write_quantized(places[name], data, quantization, write)
    return places


def outputs(folder: Path, tp: int, pp: int) -> tuple[float, dict[str, float], int]:
    """The error of the logits, each gradient's largest difference from the unsplit model's, and quantized bytes of a rank."""
    model = pt.load(folder, tp=tp, pp=pp, dtype="float64")
    whole = dequantized(folder)
    with pt.Float64Everywhere():  # some routers compute in float32
        logits = model(input_ids=IDS).logits
        expected = whole(input_ids=IDS).logits
        for value in (logits, expected):
            value.pow(2).mean().backward()
    plan, groups = plan_of(model)
    gradients = dict(whole.named_parameters())
    worst = {}
    for name, tensor in local_tensors(model, plan).items():
        if isinstance(tensor, QuantizedTensor) or tensor.grad is None:
            continue
        part = gradients[name].grad
        assert part is not None
        for dim, held in enumerate(plan.tensor(name).ranges(groups.tp.rank)):
            part = torch.cat([part.narrow(dim, a, b - a) for a, b in held], dim)
        worst[name] = float((tensor.grad - part).abs().max() / part.abs().max())
    stored = sum(t.stored_bytes for t in local_tensors(model, plan).values() if isinstance(t, QuantizedTensor))
    return float((logits - expected).detach().abs().max() / expected.detach().abs().max()), worst, stored


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (3, 1), (1, 2)])
@pytest.mark.parametrize("form", FORMS)
def test_logits_and_gradients_equal_those_of_the_same_values(
    folders: dict[str, Path], form: str, tp: int, pp: int
) -> None:
    found = on(tp * pp, outputs, folders[form], tp, pp)
    assert all(error < 1e-12 for error, _, _ in found)
    assert {name: error for _, worst, _ in found for name, error in worst.items() if error > 1e-12} == {}
    assert any(worst for _, worst, _ in found)
    infos = load_file(folders[form] / "model.safetensors")
    on_disk = sum(t.numel() * t.itemsize for name, t in infos.items() if "proj" in name)
    # Copies of KV heads and scales that two ranks need come on top, and a group index of four bytes an input or output.
    assert sum(stored for _, _, stored in found) < 1.5 * on_disk


def adapted(folder: Path, tp: int, pp: int, dora: bool) -> list[float]:
    """Losses of three steps that train adapters on a quantized model in float64."""
    model = pt.load(folder, tp=tp, pp=pp, dtype="float64")
    pt.add_lora(model, rank=4, seed=0, dora=dora)
    settings = pt.TrainSettings(steps=3, batch_size=2, sequence_length=8, learning_rate=0.01, warmup_steps=0)
    return [report.loss for report in pt.train(model, torch.arange(64) % 131, settings)]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_adapters_train_as_on_the_unsplit_model(folders: dict[str, Path], tp: int, pp: int, *, dora: bool) -> None:
    [expected] = on(1, adapted, folders["fp8"], 1, 1, dora)
    assert expected[0] > expected[-1]
    for losses in on(tp * pp, adapted, folders["fp8"], tp, pp, dora):
        assert losses == pytest.approx(expected, rel=1e-12)


def saved(folder: Path, out: Path, tp: int, pp: int) -> bool:
    pt.save(pt.load(folder, tp=tp, pp=pp), out)
    return True


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_quantized_weights_are_saved_unchanged(folders: dict[str, Path], tmp_path: Path, tp: int, pp: int) -> None:
    on(tp * pp, saved, folders["fp8-experts"], tmp_path / "out", tp, pp)
    before, after = (load_file(place / "model.safetensors") for place in (folders["fp8-experts"], tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in before)


@pytest.fixture
def model(folders: dict[str, Path]) -> Any:
    return pt.load(folders["fp8"], groups=single_groups())


def test_a_dequantized_model_has_the_same_values_and_can_be_trained(model: Any, folders: dict[str, Path]) -> None:
    model.double()
    before = model(input_ids=IDS).logits
    assert has_quantized(model)
    pt.dequantize(model)
    assert not has_quantized(model)
    assert torch.equal(model(input_ids=IDS).logits, before)
    reports = pt.train(model, torch.arange(64) % 131, pt.TrainSettings(steps=1, batch_size=2, sequence_length=8))
    assert len(reports) == 1


def test_what_would_change_a_quantized_weight_is_refused(model: Any) -> None:
    weight = model.model.layers[0].mlp.up_proj.weight
    for change in (
        lambda: weight.requires_grad_(True),
        lambda: weight.add_(1),
        lambda: weight.data.mul_(2),
        lambda: setattr(weight, "data", weight.values()),
        lambda: torch.nn.init.zeros_(weight),
        lambda: pt.train(model, torch.arange(64) % 131, pt.TrainSettings(steps=1, batch_size=2, sequence_length=8)),
        lambda: model.requires_grad_(True),
    ):
        with pytest.raises(ModelError, match="the weight is quantized"):
            change()
    for dora in (False, True):
        pt.add_lora(model, rank=2, seed=0, dora=dora)
        with pytest.raises(ModelError, match="the weight is quantized"):
            pt.merge_lora(model)
        pt.unload_lora(model)


def test_compiling_is_refused(model: Any) -> None:
    with pytest.raises(ModelError, match="quantized model cannot be compiled"):
        pt.compile_layers(model)


def test_other_operations_compute_with_the_values(model: Any) -> None:
    weight = model.model.layers[0].mlp.up_proj.weight
    values = weight.values()
    assert torch.equal(weight * 2, values * 2)
    assert torch.equal(weight.T[3], values.T[3])
    assert torch.equal(weight.float().values(), weight.part([[(0, 200)], [(0, 96)]]).float().values())
    x = torch.randn(4, 96, dtype=torch.float64)
    wide = weight.double()
    assert torch.equal(torch.nn.functional.linear(x, wide), torch.nn.functional.linear(x, wide.values()))
    assert torch.equal(x @ wide.T, x @ wide.values().T)
    rows, columns = [(3, 50), (130, 131)], [(7, 96)]
    part = weight.part([rows, columns]).values()
    assert torch.equal(part, torch.cat([values[3:50, 7:96], values[130:131, 7:96]]))


def test_a_weight_without_its_scale_is_an_error(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(folders["fp8"] / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale_inv"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folders["fp8"] / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"up_proj\.weight.*F8_E4M3.*no scale beside it"):
        pt.load(tmp_path, groups=single_groups())
