"""Products with a part of a quantized weight: our kernels where one fits, else tiles of its values."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from partita.torch.quantized.kernels import DTYPES, Kernel, kernel_for
from partita.torch.quantized.part import Part

TILE_ELEMENTS = 1 << 21
"""Elements of a weight whose values exist at once in a product."""


class PartProduct:
    """`x [..., inputs] @ part.T` and its gradient, for one part."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self._kernel: Kernel | None = None
        self._is_prepared = False

    def __call__(self, x: Tensor) -> Tensor:
        """`[..., inputs]` to `[..., outputs]`, without gradients."""
        # A tensor of no rows has no product to speed up.
        kernel = self.kernel() if x.dtype in DTYPES and x.device.type == "cpu" and x.numel() else None
        if kernel is not None:
            return kernel(self._spread(x))
        tiles = [F.linear(x, self.part.rows(rows, x.dtype)) for rows in self._tiles()]
        return tiles[0] if len(tiles) == 1 else torch.cat(tiles, -1)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """`grad [..., outputs] @ part`, `[..., inputs]`; tiles are added in float32 or wider."""
        tiles = [grad[..., rows] @ self.part.rows(rows, grad.dtype) for rows in self._tiles()]
        if len(tiles) == 1:
            return tiles[0]
        total = tiles[0].to(torch.promote_types(grad.dtype, torch.float32))
        for tile in tiles[1:]:
            total += tile
        return total.to(grad.dtype)

    def kernel(self) -> Kernel | None:
        """The kernel of its products, or None if none fits."""
        if not self._is_prepared:
            self._kernel, self._is_prepared = _kernel_of(self.part), True
        return self._kernel

    def _spread(self, x: Tensor) -> Tensor:
        """`x` for whole blocks of ggml, zero for inputs that are not this part's."""
        part = self.part
        if part.encoding.kind != "ggml":
            return x
        elements, size = part.encoding.block
        width = part.codes.shape[1] // size * elements
        if width == x.shape[-1]:
            return x
        wide = x.new_zeros(*x.shape[:-1], width)
        if part.picks is None:
            wide[..., part.offset : part.offset + x.shape[-1]] = x
        else:
            wide[..., part.picks.long()] = x
        return wide

    def _tiles(self) -> Iterator[slice]:
        outputs, inputs = self.part.shape
        step = max(1, TILE_ELEMENTS // max(1, inputs))
        step = outputs if step >= outputs else math.ceil(outputs / math.ceil(outputs / step))
        for start in range(0, max(outputs, 1), max(step, 1)):
            yield slice(start, min(start + step, outputs))


def _kernel_of(part: Part) -> Kernel | None:
    """A kernel for the products with a part, or None if none fits."""
    encoding = part.encoding
    if encoding.kind == "ggml":
        elements, size = encoding.block
        shape = part.shape[0], part.codes.shape[1] // size * elements
        return kernel_for(encoding.dtype, {"blocks": part.codes}, shape, torch.float32)
    if part.scales is None or part.biases is not None or part.factor != 1.0 or part.scales.dtype == torch.float64:
        return None
    # The exponents of MX scales are those of bfloat16.
    narrow = {torch.float8_e8m0fnu: torch.bfloat16, torch.float8_e4m3fn: torch.float16}
    scales = part.scales.to(narrow.get(part.scales.dtype, part.scales.dtype))
    if encoding.kind == "bytes" and encoding.dtype == "F8_E4M3" and part.zeros is None:
        return _kernel_of_blocks(part, scales)
    if not part.is_halved or part.row_of is not None or part.column_of is not None or len(scales) != part.shape[0]:
        return None
    parts = {"codes": part.codes, "scales": scales}
    if encoding.kind == "table":
        assert part.table is not None
        return (
            None
            if part.zeros is not None
            else kernel_for("nf4", parts | {"table": part.table}, part.shape, torch.float32)
        )
    zeros = torch.zeros_like(scales, dtype=torch.uint8) if part.zeros is None else part.zeros.to(torch.uint8)
    if part.zeros is not None and not torch.equal(zeros.to(torch.float32), part.zeros.to(torch.float32)):
        return None
    return kernel_for("int4", parts | {"zeros": zeros.expand_as(scales)}, part.shape, torch.float32)


def _kernel_of_blocks(part: Part, scales: Tensor) -> Kernel | None:
    """A kernel for eight-bit floats, whose scales may begin inside a block: the blocks are divided where necessary."""
    rows = part.row_of if part.row_of is not None or len(scales) == 1 else torch.arange(part.shape[0])
    columns = part.column_of if not part.group else torch.arange(part.shape[1]) // part.group
    (step, first), (width, second) = _regular(rows, part.shape[0]), _regular(columns, part.shape[1])
    codes = part.codes.view(torch.float8_e4m3fn)
    grid = scales[first.long()][:, second.long()]
    return kernel_for("fp8", {"codes": codes, "scales": grid}, part.shape, torch.float32, (step, width))


def _regular(index: Tensor | None, size: int) -> tuple[int, Tensor]:
    """The largest block size with one scale a block, and the scale of each block."""
    if index is None:
        return size, torch.zeros(1, dtype=torch.int64)
    changes = (index.diff().nonzero().flatten() + 1).tolist()
    step = math.gcd(*changes) if changes else size
    return step, index[::step]
