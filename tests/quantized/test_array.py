"""Any rows and columns of a quantized weight have the values that the whole weight has there, in numpy and in torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.quantized.array import Encoding, QuantizedArray, Raw, numbers
from partita.quantized.bits import pack_bits, packed_bytes, unpack_bits
from partita.torch.quantized.part import Part

TABLE = tuple(float(x) for x in np.linspace(-1, 1, 16))
ENCODINGS = [
    *(Encoding("ints", bits=bits) for bits in (2, 3, 4, 5, 6, 8)),
    Encoding("table", bits=4, table=TABLE),
    Encoding("bytes", dtype="F8_E4M3"),
    Encoding("bytes", dtype="F8_E5M2"),
    Encoding("bytes", dtype="I8"),
]


def made(encoding: Encoding, shape: tuple[int, int], grid: tuple[int, int], seed: int) -> QuantizedArray:
    """A random weight with a scale, a zero point and a bias for each `grid` rows and columns; 0 is one for all."""
    random = np.random.default_rng(seed)
    rows, columns = shape
    if encoding.kind == "bytes":
        codes = random.integers(0, 120, shape).astype(np.uint8)  # neither infinite nor NaN
    else:
        codes = pack_bits(random.integers(0, 1 << encoding.bits, shape).astype(np.uint8), encoding.bits)
    row_of = np.arange(rows, dtype=np.int32) // grid[0] if grid[0] else None
    column_of = random.permutation(np.arange(columns, dtype=np.int32) // grid[1]) if grid[1] else None
    size = (1 if row_of is None else int(row_of.max()) + 1, 1 if column_of is None else int(column_of.max()) + 1)
    scales, zeros, biases = (Raw(random.standard_normal(size).astype(np.float32), "F32") for _ in range(3))
    return QuantizedArray(encoding, shape, codes, scales, zeros, biases, row_of, column_of, factor=1.5)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("columns", [1, 7, 8, 29])
def test_integers_come_back_from_their_bits(bits: int, columns: int) -> None:
    codes = np.random.default_rng(0).integers(0, 1 << bits, (3, columns)).astype(np.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (3, packed_bytes(columns, bits))
    assert (unpack_bits(packed, bits, columns) == codes).all()


@st.composite
def ranges(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    edges = sorted(draw(st.sets(st.integers(0, size), min_size=2, max_size=6)))
    return list(zip(edges[::2], edges[1::2], strict=False))


@given(data=st.data(), seed=st.integers(0, 1000))
@settings(max_examples=120)
def test_a_part_has_the_values_of_the_whole(data: st.DataObject, seed: int) -> None:
    encoding = data.draw(st.sampled_from(ENCODINGS))
    shape = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 70))
    grid = data.draw(st.sampled_from([0, 1, 5, 16])), data.draw(st.sampled_from([0, 4, 32]))
    whole = made(encoding, shape, grid, seed)
    rows, columns = data.draw(ranges(shape[0])), data.draw(ranges(shape[1]))
    part = whole.take(rows, columns)
    expected = np.concatenate([whole.dense()[a:b] for a, b in rows])
    expected = np.concatenate([expected[:, a:b] for a, b in columns], 1)
    assert (part.dense() == expected).all()
    on_torch = Part.of(part)
    # The order of the operations is the same; a product may be fused with a sum.
    assert np.allclose(on_torch.rows(slice(None), torch.float32).numpy(), expected, rtol=1e-6, atol=1e-6)
    again = on_torch.array().take([(0, part.shape[0])], [(0, part.shape[1])])
    assert np.allclose(again.dense(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2), ("F8_E8M0", torch.float8_e8m0fnu)],
)
def test_eight_bit_floats_are_those_of_torch(name: str, dtype: torch.dtype) -> None:
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes.copy()).view(dtype).to(torch.float32).numpy()
    assert np.array_equal(numbers(codes, name), expected, equal_nan=True)


def test_bfloat16_is_exact() -> None:
    values = torch.randn(1000).bfloat16()
    assert np.array_equal(numbers(values.view(torch.uint16).numpy(), "BF16"), values.float().numpy())
