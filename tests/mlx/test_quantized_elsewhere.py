"""Checkpoints that other packages quantized, on MLX: the same values as plain weights, of which each rank reads its part."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch

from partita.checkpoint.gguf.file import BLOCKS
from partita.errors import ModelError
from partita.mlx.collectives.groups import single_groups
from partita.mlx.load import load
from partita.mlx.model.parts import main_output
from partita.quantized.array import Encoding, QuantizedArray
from partita.torch.quantized.ggml import decode
from tests.support.mlx_ranks import on_mlx
from tests.support.quantized import FP8, LLAMA, QWEN_MOE, dequantized, fp8, write_quantized

IDS = [[3, 1, 4, 1, 5, 9, 2, 6]]


def logits(folder: Path, tp: int, pp: int) -> list[list[list[float]]]:
    model = load(folder, tp=tp, pp=pp, dtype="float32")
    return np.array(main_output(model(mx.array(IDS)))).tolist()


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("data", [LLAMA, QWEN_MOE], ids=["llama", "experts"])
def test_logits_are_those_of_the_same_values(tmp_path: Path, data: dict[str, object], tp: int, pp: int) -> None:
    write_quantized(tmp_path, data, FP8, fp8, dtype=torch.float32)
    with torch.no_grad():
        expected = dequantized(tmp_path)(input_ids=torch.tensor(IDS)).logits.numpy()
    for found in on_mlx(2, logits, tmp_path, tp, pp):
        assert np.abs(np.array(found) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_a_note_says_that_inputs_are_not_quantized(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_quantized(tmp_path, LLAMA, FP8, fp8, dtype=torch.float32)
    load(tmp_path, groups=single_groups())
    assert sum("inputs of layers (activation_scheme dynamic)" in one.getMessage() for one in caplog.records) == 1


def test_an_unknown_method_is_refused_by_its_name(tmp_path: Path) -> None:
    write_quantized(tmp_path, LLAMA, {"quant_method": "aqlm"}, fp8)
    with pytest.raises(ModelError, match="aqlm"):
        load(tmp_path, groups=single_groups())


@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K", "MXFP4"])
def test_blocks_of_ggml_have_the_values_of_their_definition(kind: str) -> None:
    size = 256 if kind.endswith("K") else 32
    encoding = Encoding("ggml", dtype=kind, block=BLOCKS[kind])
    codes = (
        np.random.default_rng(0).integers(0, 60, (6, 3 * size // BLOCKS[kind][0] * BLOCKS[kind][1])).astype(np.uint8)
    )
    whole = QuantizedArray(encoding, (6, 3 * size), codes)
    expected = decode(torch.from_numpy(codes), kind).numpy()
    assert np.array_equal(whole.dense(), expected)
    part = whole.take([(1, 4)], [(5, 40), (50, 2 * size)])
    assert np.array_equal(part.dense(), np.concatenate([expected[1:4, 5:40], expected[1:4, 50 : 2 * size]], 1))
