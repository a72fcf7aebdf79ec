"""Any part of a weight of every form has the values that the form defines, and only its bytes are read and kept."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from partita.checkpoint.index import open_checkpoint
from partita.checkpoint.read import Range, Reader
from partita.quantized.find import quantized_weights
from tests.support.quantized_forms import FORMS

OUTPUTS, INPUTS = 96, 928
"""29 groups of 32 inputs."""

ROWS: list[list[Range]] = [[(0, 96)], [(0, 48)], [(32, 64)], [(7, 60)], [(3, 9), (50, 53), (80, 96)]]
COLUMNS: list[list[Range]] = [[(0, 928)], [(0, 464)], [(464, 928)], [(310, 619)], [(5, 8), (100, 301), (927, 928)]]


@pytest.mark.parametrize("name", FORMS)
def test_parts(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    form = FORMS[name]
    tensors, values = form.make(OUTPUTS, INPUTS)
    save_file(
        {f"model.layers.0.mlp.up_proj.{suffix}": part for suffix, part in tensors.items()},
        tmp_path / "model.safetensors",
    )
    checkpoint = open_checkpoint(tmp_path)
    [weight] = quantized_weights(checkpoint, {form.key: form.config}).values()
    assert weight.name == "model.layers.0.mlp.up_proj.weight"
    assert weight.shape == (OUTPUTS, INPUTS)
    assert set(weight.tensors) == set(checkpoint.tensors)
    on_disk = sum(checkpoint.tensors[n].nbytes for n in weight.tensors)
    index = 4 * INPUTS  # the group of each input is needed on every rank
    for rows in ROWS:
        for columns in COLUMNS:
            with Reader(checkpoint) as reader:
                part = weight.read(reader, rows, columns)
                chosen = np.ix_(_all(rows), _all(columns))
                assert np.array_equal(part.dense(), values.numpy()[chosen]), (rows, columns)
            share = _rounded(rows, form.group[1], OUTPUTS) * _rounded(columns, form.group[0], INPUTS)
            if not form.whole:
                assert reader.bytes_read <= on_disk * share / (OUTPUTS * INPUTS) * 1.1 + index + 600, (rows, columns)
                assert part.nbytes <= form.memory * on_disk * share / (OUTPUTS * INPUTS) + 4 * (OUTPUTS + INPUTS) + 600
    with Reader(checkpoint) as reader:
        whole = weight.read(reader, [(0, OUTPUTS)], [(0, INPUTS)])
    for rows, columns in zip(ROWS, COLUMNS, strict=True):
        assert np.array_equal(whole.take(rows, columns).dense(), values.numpy()[np.ix_(_all(rows), _all(columns))])


def _all(ranges: list[Range]) -> list[int]:
    return [number for start, stop in ranges for number in range(start, stop)]


def _rounded(ranges: list[Range], unit: int, size: int) -> int:
    """Elements of the units that `ranges` touch."""
    return min(size, unit * len({number // unit for number in _all(ranges)}))


def _large(name: str, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
    """A large weight: a small one repeated, as its values do not matter."""
    small, _ = FORMS[name].make(64, 128)
    rows, columns = outputs // 64, inputs // 128
    if name == "nf4-nested":
        state = json.loads(bytes(small["weight.quant_state.bitsandbytes__nf4"].tolist()))
        state["shape"] = [outputs, inputs]
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        flat = {"weight", "weight.absmax"}
        made = {n: t.repeat(rows * columns, *[1] * (t.dim() - 1)) if n in flat else t for n, t in small.items()}
        nested = small["weight.nested_absmax"][:1].repeat(outputs * inputs // 64 // 256)
        return made | {"weight.nested_absmax": nested, "weight.quant_state.bitsandbytes__nf4": text}
    turned = name.startswith(("gptq", "awq"))
    made = {n: t.repeat((columns, rows) if turned else (rows, columns)) for n, t in small.items() if t.dim() == 2}
    if "weight_shape" in small:
        made["weight_shape"] = torch.tensor([outputs, inputs])
    if "g_idx" in small:
        made["g_idx"] = torch.arange(inputs, dtype=torch.int32) // 32
    return made


@pytest.mark.parametrize("name", ["gptq-3", "gptq-4", "awq", "packed-3", "packed-4", "nf4-nested", "mlx-4"])
def test_memory_while_reading(name: str, tmp_path: Path) -> None:
    outputs, inputs = 4096, 16384
    tensors = _large(name, outputs, inputs)
    save_file(
        {f"layer.{suffix}": part.contiguous() for suffix, part in tensors.items()}, tmp_path / "model.safetensors"
    )
    checkpoint = open_checkpoint(tmp_path)
    [weight] = quantized_weights(checkpoint, {FORMS[name].key: FORMS[name].config}).values()
    on_disk = sum(checkpoint.tensors[n].nbytes for n in weight.tensors)
    for rows, columns in (([(0, 2050)], [(0, inputs)]), ([(0, outputs)], [(5, 8190)])):
        with Reader(checkpoint) as reader:
            tracemalloc.start()
            part = weight.read(reader, rows, columns)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert part.nbytes <= 1.15 * on_disk / 2
        assert peak <= 1.15 * on_disk / 2 + (64 << 20)


@pytest.mark.parametrize("inputs", [104, 90, 33])
@pytest.mark.parametrize("name", ["nf4", "nf4-nested", "fp4"])
def test_blocks_that_cross_rows(name: str, inputs: int, tmp_path: Path) -> None:
    torch.manual_seed(2)
    outputs = 40
    tensors, values = FORMS[name].make(outputs, inputs)
    save_file({f"layer.{suffix}": part for suffix, part in tensors.items()}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    [weight] = quantized_weights(checkpoint, {"quantization_config": FORMS[name].config}).values()
    with Reader(checkpoint) as reader:
        for rows in ([(0, outputs)], [(1, 2), (13, 39)]):
            for columns in ([(0, inputs)], [(3, 20)], [(1, 2), (16, 32)]):
                found = weight.read(reader, rows, columns).dense()
                assert np.array_equal(found, values.numpy()[np.ix_(_all(rows), _all(columns))])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_of_zero_borrow_from_the_next(bits: int, tmp_path: Path) -> None:
    """gptqmodel subtracts one from words of zero points that hold 0 too, and adds it again when it loads them."""
    tensors, _ = FORMS["gptq-v2-2"].make(32, 32) if bits == 2 else _made(bits)
    zeros = tensors["qzeros"].clone()
    ones = sum(1 << place for place in range(0, 32, bits))
    one = torch.tensor(ones - (1 << 32) if ones >= 1 << 31 else ones, dtype=torch.int32)
    found = []
    for stored, version in ((zeros, "gptq_v2"), (zeros - one, "gptq")):
        folder = tmp_path / version
        folder.mkdir()
        parts = {f"layer.{suffix}": part for suffix, part in (tensors | {"qzeros": stored}).items()}
        save_file(parts, folder / "model.safetensors")
        checkpoint = open_checkpoint(folder)
        config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "checkpoint_format": version}
        [weight] = quantized_weights(checkpoint, {"quantization_config": config}).values()
        with Reader(checkpoint) as reader:
            found.append(weight.read(reader, [(0, 32)], [(0, 32)]).dense())
    if bits == 3:
        return  # its zero points are shifted one by one
    assert np.array_equal(found[0], found[1])


def _made(bits: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    from tests.support.quantized_forms import gptq

    return gptq(bits, 32, version="gptq_v2").make(32, 32)
