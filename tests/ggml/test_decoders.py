"""Blocks of every type against the gguf package, whole and in parts."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from partita.checkpoint.gguf.file import BLOCKS
from partita.quantized.array import Encoding, QuantizedArray
from partita.torch.quantized.ggml import decode
from partita.torch.quantized.part import Part
from tests.support.gguf_files import blocks


@pytest.mark.parametrize("kind", BLOCKS)
def test_values_are_those_of_the_gguf_package(kind: str) -> None:
    elements, size = BLOCKS[kind]
    assert GGML_QUANT_SIZES[GGMLQuantizationType[kind]] == (elements, size)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (9, 8 * size), dtype=np.uint8)  # all bytes, also scales that are not finite
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = quants.dequantize(codes, GGMLQuantizationType[kind])
    found = decode(torch.from_numpy(codes), kind).numpy()
    assert np.isfinite(expected).mean() > 0.5
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K", "F16"])
def test_any_ranges_of_rows_and_columns(kind: str) -> None:
    elements, size = BLOCKS[kind]
    columns = 1024
    codes = blocks(np.random.default_rng(1).normal(size=(12, columns)), kind, np.random.default_rng(2)).view(np.uint8)
    array = QuantizedArray(Encoding("ggml", dtype=kind, block=(elements, size)), (12, columns), codes.reshape(12, -1))
    whole = Part.of(array).rows(slice(None), torch.float32)
    rows, ranges = [(7, 9), (1, 4)], [(300, 301), (700, 1024), (3, 290)]
    index = np.concatenate([np.arange(a, b) for a, b in ranges])
    expected = whole[[7, 8, 1, 2, 3]][:, index]
    taken = array.take(rows, ranges)
    assert taken.nbytes < array.nbytes + 4 * len(index)
    assert torch.equal(Part.of(taken).rows(slice(None), torch.float32), expected)
    # A part of a part, through tensors and back.
    again = Part.of(taken).take([(0, 5)], [(1, 300), (320, 330)])
    assert torch.equal(again.rows(slice(None), torch.float32), torch.cat([expected[:, 1:300], expected[:, 320:330]], 1))
    one = Part.of(array.take([(0, 12)], [(37, 801)]).take([(0, 12)], [(5, 700)]))
    assert one.picks is None
    assert torch.equal(one.rows(slice(2, 5), torch.float32), whole[2:5, 42:737])
