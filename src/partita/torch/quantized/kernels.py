"""Products with quantized weights on CPUs, without dequantizing them first, and the rows that they stand for.

Few rows of x are multiplied by our own C++ (`kernels.cpp`), which decodes each weight in registers: to exactly the float32
value that the form defines, accumulated in float32. Many rows are multiplied by torch with one tile of dequantized rows of
the weight after the other, since a tile costs little beside its product.

The forms, for a weight `[out, in]`, and the tensors that make them up:

    Q4_0 Q4_1 Q8_0 Q4_K Q6_K   blocks  uint8 [out, bytes of a row]    as ggml defines them, little-endian
    int4                       codes   uint8 [out, in], 0 to 15       (code - zero) * scale; or as `Part` has them
                               scales  [out, in / group]
                               zeros   uint8 [out, in / group]        optional; 8 if left out
    nf4                        codes   uint8 of out * in / 2          table[code] * scale, high bits first (bitsandbytes)
                               scales  float32 of out * in / block
                               table   float32 [16]
    fp8                        codes   float8_e4m3fn [out, in]        code * scale
                               scales  [ceil(out / 128), ceil(in / 128)], [out, 1] or [1, 1]

Scales are float32, bfloat16 or float16.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from partita.torch.quantized.native import library
from partita.torch.quantized.part import HALVES

FEW = {torch.float32: 64, torch.bfloat16: 16, torch.float16: 64}
"""Up to this many rows of x, decoding the weight again for every 8 of them takes less time than a product of torch."""

TILE_BYTES = 1 << 20
"""Size of the dequantized rows that are multiplied at a time."""


def kernel_for(
    form: str,
    parts: Mapping[str, Tensor],
    shape: tuple[int, int],
    dtype: torch.dtype,
    block: tuple[int, int] | None = None,
) -> Kernel | None:
    """A kernel for a packed weight, or None where the weight must be dequantized for each product.

    It is None if the form, a part's dtype or shape, or the device has no kernel, or if no compiler is installed (the first
    rank then prints a note). A kernel shares memory with `parts`; only codes of `int4` and `nf4` in another order are copied.

    Args:
        form: A form of this module's table.
        parts: Its tensors.
        shape: (out, in) of the weight.
        dtype: The dtype of x: float32, bfloat16 or float16.
        block: Rows and columns of a scale of `fp8` (default: what its number of scales says, if that is certain).
    """
    if form == "fp8" and block is not None:
        scales = parts["scales"]
        if scales.shape != (-(-shape[0] // block[0]), -(-shape[1] // block[1])) or block[1] % HALVES:
            return None
        packed = _blocks(parts, shape, block) if dtype in DTYPES and _on_cpu(parts) else None
        return None if packed is None or library() is None else Kernel(packed)
    packed = _FORMS[form](parts, shape) if form in _FORMS and dtype in DTYPES and _on_cpu(parts) else None
    return None if packed is None or library() is None else Kernel(packed)


DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _on_cpu(parts: Mapping[str, Tensor]) -> bool:
    return all(part.device.type == "cpu" for part in parts.values())


@dataclass(frozen=True)
class _Packed:
    """A weight in the memory layout of `kernels.cpp`; `number` is the form's number there."""

    number: int
    shape: tuple[int, int]
    codes: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    table: Tensor | None = None
    group: int = 32
    """The columns that share a scale."""
    group_rows: int = 1
    """The rows that share a scale."""


class _Weight(ctypes.Structure):
    """`Weight` of `kernels.cpp`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "table")),
        *(
            (name, ctypes.c_int64)
            for name in ("out", "in_", "row_bytes", "group_inverse", "group_rows_inverse", "groups_per_row")
        ),
        *((name, ctypes.c_int32) for name in ("form", "scales_dtype")),
    )


class NativeWeight:
    """A weight that `kernels.cpp` multiplies.

    Attributes:
        shape: (out, in) of the weight.
        nbytes: Bytes of its parts.
        tensors: Its parts by their names in `kernels.cpp`.
    """

    def __init__(self, packed: _Packed):
        self.shape = packed.shape
        parts = {name: getattr(packed, name) for name in ("codes", "scales", "zeros", "table")}
        self.tensors = {name: tensor for name, tensor in parts.items() if tensor is not None}
        self.nbytes = sum(tensor.nbytes for tensor in self.tensors.values())
        out, in_ = packed.shape
        scales = packed.scales
        self._weight = _Weight(
            out=out,
            in_=in_,
            row_bytes=packed.codes.nbytes // out,
            group_inverse=2**32 // (packed.group // HALVES) + 1,
            group_rows_inverse=2**32 // packed.group_rows + 1,
            groups_per_row=-(-in_ // packed.group),
            form=packed.number,
            scales_dtype=0 if scales is None else DTYPES[scales.dtype],
        )

    def address(self) -> _Weight:
        """The weight for C++, with the present addresses of its tensors."""
        # Again for every call: `share_memory_` and others move a tensor's memory.
        for name, tensor in self.tensors.items():
            setattr(self._weight, name, tensor.data_ptr())
        return self._weight


PLAIN_FORMS = {torch.float32: 8, torch.bfloat16: 9}
"""Numbers of the forms of `kernels.cpp` for weights that are not quantized."""


def plain_weight(weight: Tensor) -> NativeWeight | None:
    """A weight `[out, in]` for products in its own dtype, whose memory it shares; None if `kernels.cpp` is not faster.

    It is None for other dtypes than float32 and bfloat16, for another memory layout than row after row, outside of the CPU,
    without a compiler, and where our C++ has one thread and torch has several.
    """
    if weight.dtype not in PLAIN_FORMS or weight.device.type != "cpu" or not weight.is_contiguous():
        return None
    functions = library() if weight.dim() == 2 and weight.numel() else None
    if functions is None or (torch.get_num_threads() > 1 and not functions.partita_has_threads()):
        return None
    return NativeWeight(_Packed(PLAIN_FORMS[weight.dtype], (len(weight), weight.shape[1]), weight.detach()))


class Kernel(NativeWeight):
    """One packed weight, ready for products by `kernels.cpp`."""

    def __init__(self, packed: _Packed):
        super().__init__(packed)
        self.packed = packed
        self._products: dict[torch.dtype, Products] = {}
        functions = library()
        assert functions is not None
        self._dequantize = functions.partita_dequantize
        self._dequantize.argtypes = (_POINTER, ctypes.c_int64, ctypes.c_int64, _POINTER, ctypes.c_int, ctypes.c_int)

    def __reduce__(self) -> tuple[type[Kernel], tuple[_Packed]]:
        return Kernel, (self.packed,)  # without the addresses, which are this process's

    def __call__(self, x: Tensor) -> Tensor:
        """The product of `x` `[..., in]` with the transposed weight, `[..., out]` in the same dtype; no gradient is recorded.

        Raises:
            ValueError: The last size, the dtype or the device of `x` does not fit.
        """
        out, in_ = self.packed.shape
        if x.shape[-1] != in_ or x.dtype not in DTYPES or x.device.type != "cpu":
            raise ValueError(
                f"x must be [..., {in_}] in float32, bfloat16 or float16 on the CPU; got {list(x.shape)} in {x.dtype} on "
                f"{x.device}"
            )
        x = x.detach().contiguous()
        rows = x.numel() // in_
        if 0 < rows <= FEW[x.dtype]:
            return self._alone(x)
        y = x.new_empty((*x.shape[:-1], out))
        if rows:
            self._by_tiles(x.view(rows, in_), y.view(rows, out))
        return y

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the weight in float32, `[stop - start, in]`, exactly as the form defines them.

        Raises:
            IndexError: The weight does not have these rows.
        """
        if not 0 <= start <= stop <= self.packed.shape[0]:
            raise IndexError(f"rows must be a range within 0 to {self.packed.shape[0]}; got {start} to {stop}")
        rows = torch.empty(stop - start, self.packed.shape[1], dtype=torch.float32)
        self._write_rows(start, stop, rows)
        return rows

    def _alone(self, x: Tensor) -> Tensor:
        if x.dtype not in self._products:
            self._products[x.dtype] = Products([self], x.dtype, [None])
        self.address()
        return self._products[x.dtype](x)[0]

    def _by_tiles(self, x: Tensor, y: Tensor) -> None:
        out, in_ = self.packed.shape
        dtype = x.dtype if x.dtype in _fast_dtypes() else torch.float32
        count = min(out, max(16, TILE_BYTES // (in_ * dtype.itemsize)))
        x, tile = x.to(dtype), x.new_empty((count, in_), dtype=dtype)
        for start in range(0, out, count):
            stop = min(out, start + count)
            self._write_rows(start, stop, tile)
            if dtype == y.dtype:
                torch.mm(x, tile[: stop - start].T, out=y[:, start:stop])
            else:
                y[:, start:stop] = x @ tile[: stop - start].T

    def _write_rows(self, start: int, stop: int, to: Tensor) -> None:
        self._dequantize(ctypes.byref(self.address()), start, stop, to.data_ptr(), DTYPES[to.dtype], threads())


_POINTER = ctypes.c_void_p


class _Linear(ctypes.Structure):
    """`Linear` of `kernels.cpp`."""

    _fields_ = (("weight", _POINTER), ("bias", _POINTER))


class Products:
    """The outputs of layers with the same input of few rows, computed in one call.

    The memory of weights and biases must not move while it is used.
    """

    def __init__(self, kernels: Sequence[NativeWeight], dtype: torch.dtype, biases: Sequence[Tensor | None]) -> None:
        """Products with `kernels`, which have as many inputs, for x and `biases` of `dtype`."""
        # Not the kernels, which may hold this object: a cycle would keep their memory until the next garbage collection.
        self._kept = [(kernel.address(), kernel.tensors) for kernel in kernels], biases
        shapes = [kernel.shape for kernel in kernels]
        self.outputs, self.inputs, self.dtype = [out for out, _ in shapes], shapes[0][1], dtype
        self.layers = (_Linear * len(kernels))(
            *(
                _Linear(ctypes.addressof(weight), None if bias is None else bias.data_ptr())
                for (weight, _), bias in zip(*self._kept, strict=True)
            )
        )
        functions = library()
        assert functions is not None
        self._call = functions.partita_products
        self._call.argtypes = (_POINTER, ctypes.c_int, _POINTER, ctypes.c_int64, _POINTER, ctypes.c_int, ctypes.c_int)
        self._ys = _POINTER * len(kernels)

    def __call__(self, x: Tensor) -> list[Tensor]:
        """The outputs `[..., out]` for x `[..., in]`, contiguous and with at least one row and at most `FEW[dtype]`."""
        head = x.shape[:-1]
        ys = [x.new_empty((*head, out)) for out in self.outputs]
        places = self._ys(*(y.data_ptr() for y in ys))
        rows = x.numel() // self.inputs
        if self._call(self.layers, len(ys), x.data_ptr(), rows, places, DTYPES[self.dtype], threads()):
            raise MemoryError(f"{rows * self.inputs * 4} bytes for the input of a product could not be allocated")
        return ys


@functools.cache
def _fast_dtypes() -> frozenset[torch.dtype]:
    """The dtypes of many rows that this CPU does not multiply faster in float32."""
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return frozenset({torch.float32, torch.bfloat16} if has_bfloat16 else {torch.float32})


def threads() -> int:
    """Threads for a call of C++."""
    return 1 if _forked else torch.get_num_threads()


_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True  # an OpenMP runtime whose threads the parent has used waits for ever for them in the child


os.register_at_fork(after_in_child=_after_fork)


def _gguf(number: int, weights_of_block: int, bytes_of_block: int) -> _Pack:
    def pack(parts: Mapping[str, Tensor], shape: tuple[int, int]) -> _Packed | None:
        blocks = parts["blocks"]
        row_bytes = shape[1] // weights_of_block * bytes_of_block
        if shape[1] % weights_of_block or blocks.dtype != torch.uint8 or blocks.shape != (shape[0], row_bytes):
            return None
        return _Packed(number, shape, blocks.contiguous())

    return pack


def _int4(parts: Mapping[str, Tensor], shape: tuple[int, int]) -> _Packed | None:
    codes, scales, zeros = parts["codes"], parts["scales"], parts.get("zeros")
    group = shape[1] // scales.shape[1]
    codes = codes if codes.shape[1] * 2 == shape[1] else _nibbles(codes)
    fits = codes.dtype == torch.uint8 and codes.shape == (shape[0], shape[1] // 2) and len(scales) == shape[0]
    if not fits or shape[1] % group or group % HALVES or scales.dtype not in DTYPES:
        return None
    if zeros is not None and (zeros.dtype != torch.uint8 or zeros.shape != scales.shape):
        return None
    return _Packed(5, shape, codes, scales.contiguous(), None if zeros is None else zeros.contiguous(), group=group)


def _nf4(parts: Mapping[str, Tensor], shape: tuple[int, int]) -> _Packed | None:
    codes, scales, table = parts["codes"], parts["scales"], parts["table"]
    group = shape[0] * shape[1] // scales.numel()
    fits = codes.dtype == torch.uint8 and codes.numel() * 2 == shape[0] * shape[1] and table.numel() == 16
    if not fits or shape[1] % group or group % HALVES or scales.dtype not in DTYPES:
        return None
    if codes.shape != (shape[0], shape[1] // 2):
        pairs = codes.reshape(shape[0], -1)
        codes = _nibbles(torch.stack((pairs >> 4, pairs & 15), -1).view(shape))
    return _Packed(
        6,
        shape,
        codes,
        scales.reshape(shape[0], -1).contiguous(),
        table=table.float().contiguous(),
        group=group,
    )


def _fp8(parts: Mapping[str, Tensor], shape: tuple[int, int]) -> _Packed | None:
    out, in_ = shape
    blocks = {(-(-out // 128), -(-in_ // 128)): (128, 128), (out, 1): (1, in_), (1, 1): (out, in_)}
    block = next((block for size, block in blocks.items() if size == parts["scales"].shape), None)
    return None if block is None else _blocks(parts, shape, block)


def _blocks(parts: Mapping[str, Tensor], shape: tuple[int, int], block: tuple[int, int]) -> _Packed | None:
    codes, scales = parts["codes"], parts["scales"]
    if (
        codes.dtype != torch.float8_e4m3fn
        or codes.shape != torch.Size(shape)
        or shape[1] % HALVES
        or scales.dtype not in DTYPES
    ):
        return None
    if bool(codes.isnan().any()):
        return None
    group_rows, group = block
    return _Packed(7, shape, codes.contiguous(), scales.contiguous(), group=group, group_rows=group_rows)


def _nibbles(codes: Tensor) -> Tensor:
    """Codes `[out, in]` of 4 bits as `[out, in / 2]` bytes, in the order of `kernels.cpp`."""
    low, high = codes.view(codes.shape[0], -1, 2, HALVES // 2).unbind(2)
    return (low | high << 4).view(codes.shape[0], -1)


_Pack = Callable[[Mapping[str, Tensor], tuple[int, int]], _Packed | None]

_FORMS: dict[str, _Pack] = {
    "Q4_0": _gguf(0, 32, 18),
    "Q4_1": _gguf(1, 32, 20),
    "Q8_0": _gguf(2, 32, 34),
    "Q4_K": _gguf(3, 256, 144),
    "Q6_K": _gguf(4, 256, 210),
    "int4": _int4,
    "nf4": _nf4,
    "fp8": _fp8,
}
