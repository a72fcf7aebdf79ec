"""Integers of 2 to 8 bits in bytes: element i of a row begins at bit `i * bits`, lowest bit first."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def packed_bytes(columns: int, bits: int) -> int:
    """Bytes of a row of `columns` integers."""
    return math.ceil(columns * bits / 8)


def unpack_bits(packed: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """The integers of packed rows: uint8 `[..., packed_bytes(columns, bits)]` to uint8 `[..., columns]`."""
    import numpy as np

    if bits == 8:
        return packed[..., :columns]
    if bits in (2, 4):
        each = 8 // bits
        shifts = np.arange(each, dtype=np.uint8) * bits
        codes = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
        return codes.reshape(*packed.shape[:-1], packed.shape[-1] * each)[..., :columns]
    wide = np.unpackbits(packed, axis=-1, bitorder="little")[..., : columns * bits]
    weights = (1 << np.arange(bits)).astype(np.uint8)
    codes = wide.reshape(*packed.shape[:-1], columns, bits) @ weights
    return codes.astype(np.uint8)


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `unpack_bits`; the last byte of a row is filled with zeros."""
    import numpy as np

    if bits == 8:
        return np.ascontiguousarray(codes)
    columns = codes.shape[-1]
    if bits in (2, 4):
        each = 8 // bits
        rest = -columns % each
        if rest:
            codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], rest), np.uint8)], -1)
        grouped = codes.reshape(*codes.shape[:-1], -1, each)
        packed = grouped[..., 0].copy()
        for place in range(1, each):
            packed |= grouped[..., place] << np.uint8(place * bits)
        return packed
    wide = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & np.uint8(1)
    return np.packbits(wide.reshape(*codes.shape[:-1], columns * bits), axis=-1, bitorder="little")
