"""Any rows and columns of a quantized weight have the values that the whole weight has there, in numpy and in torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.quantized.array import Encoding, QuantizedArray, Raw, numbers
from partita.quantized.bits import pack_bits, packed_bytes, unpack_bits
from partita.torch.quantized.part import Part
from partita.torch.quantized.products import PartProduct

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


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("grid", [(0, 0), (1, 0), (1, 32), (16, 32), (24, 64)])
@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda e: f"{e.kind}{e.bits}{e.dtype}")
def test_products_are_those_of_the_values(encoding: Encoding, grid: tuple[int, int], rows: int) -> None:
    random = np.random.default_rng(1)
    whole = made(encoding, (72, 192), grid, 3)
    row_of = None if not grid[0] else np.arange(72, dtype=np.int32) // grid[0]
    column_of = None if not grid[1] else np.arange(192, dtype=np.int32) // grid[1]
    whole = replace(whole, row_of=row_of, column_of=column_of, biases=None, factor=1.0)
    assert whole.scales is not None
    zeros = Raw(random.integers(0, 16, whole.scales.data.shape).astype(np.uint8), "U8")
    for array in (replace(whole, zeros=None), replace(whole, zeros=zeros)):
        # A part that begins inside a block of scales.
        for part in (array, array.take([(8, 65)], [(32, 160)]), array.take([(3, 9), (20, 61)], [(5, 100)])):
            product = PartProduct(Part.of(part))
            x = torch.randn(rows, part.shape[1], generator=torch.Generator().manual_seed(0))
            values = torch.from_numpy(part.dense()).double()
            exact = x.double() @ values.T
            # The largest error of a sum in float32, relative to its terms without their signs.
            allowed = 1e-6 * (x.double().abs() @ values.abs().T)
            assert bool(((product(x).double() - exact).abs() <= allowed).all())
            narrow = product(x.bfloat16()).double()
            exact = x.bfloat16().double() @ values.T
            assert bool(((narrow - exact).abs() <= 2**-7 * (x.double().abs() @ values.abs().T)).all())
            grad = torch.randn(rows, part.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            assert torch.allclose(product.input_gradient(grad), grad @ values, rtol=1e-12, atol=1e-10)


def test_there_are_kernels_for_the_common_forms() -> None:
    whole = made(Encoding("bytes", dtype="F8_E4M3"), (64, 128), (16, 32), 0)
    blocks = replace(whole, zeros=None, biases=None, factor=1.0, column_of=np.arange(128, dtype=np.int32) // 32)
    fours = made(Encoding("ints", bits=4), (64, 128), (1, 32), 0)
    zeros = Raw(np.full((64, 4), 7, np.uint8), "U8")
    groups = replace(fours, zeros=zeros, biases=None, factor=1.0, column_of=np.arange(128, dtype=np.int32) // 32)
    for array in (blocks, blocks.take([(8, 40)], [(0, 128)]), groups, groups.take([(3, 50)], [(32, 96)])):
        assert PartProduct(Part.of(array)).kernel() is not None
