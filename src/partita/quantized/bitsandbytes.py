"""Weights of bitsandbytes: 4 bits as indices of a table in flat blocks, and 8-bit integers with a scale for each output.

4 bits [Dettmers et al., arXiv 2305.14314]: `weight` holds two elements a byte, the first in the high bits, of the weight
[outputs, inputs] as one row; `weight.absmax` is the scale of each of its blocks, which cross outputs unless their size divides
the inputs. The scales may be 8-bit indices of a table, with scales and an offset of their own. 8 bits: `SCB / 127` scales each
output. Layouts: bitsandbytes 0.50 (`functional.QuantState`, `nn/modules.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from partita.checkpoint.header import TensorInfo, brief
from partita.checkpoint.read import Range, Reader
from partita.errors import CheckpointError, ModelError
from partita.quantized.array import Encoding, QuantizedArray, Raw, indexes
from partita.quantized.bits import pack_bits, packed_bytes
from partita.quantized.packed import read_small, runs
from partita.quantized.weight import (
    Grid,
    Infos,
    QuantizedWeight,
    ScaledBytes,
    cover,
    in_steps,
    read_raw,
    unit_of,
)

if TYPE_CHECKING:
    import numpy as np

_STATE = ".quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_CHUNK_ELEMENTS = 1 << 21
"""Elements that are converted at once."""


def bitsandbytes_weights(infos: Infos, config: Mapping[str, Any]) -> list[QuantizedWeight]:
    """The weights of a checkpoint of `quant_method: bitsandbytes`: with a `quant_state` (4 bits) or an `SCB` (8 bits).

    Raises:
        ModelError: It is stored in a way that cannot be read.
        CheckpointError: Tensors are missing, or do not agree.
    """
    found: list[QuantizedWeight] = []
    for name, info in infos.items():
        if info.dtype == "I8" and name.endswith(".weight"):
            found.append(_int8(infos, info))
        elif _STATE in name:
            found.append(_four_bits(infos, info))
        elif (
            info.dtype == "U8" and name.endswith("weight") and not {f"{name}{_STATE}{k}" for k in _KINDS} & infos.keys()
        ):
            raise CheckpointError(
                f"{info.file}: {brief(name)} is U8, but has no {brief(name + _STATE)}nf4 or fp4 beside it, without which its "
                "values are unknown. The checkpoint is incomplete: save it with a newer bitsandbytes."
            )
    return found


def _int8(infos: Infos, info: TensorInfo) -> QuantizedWeight:
    stem = info.name.removesuffix("weight")
    scales, order = infos.get(f"{stem}SCB"), infos.get(f"{stem}weight_format")
    if scales is None or scales.shape != info.shape[:1] or len(info.shape) != 2:
        raise CheckpointError(
            f"{info.file}: {brief(info.name)} {info.shape} needs a scale for each output ({brief(stem + 'SCB')}), which "
            f"{'is missing' if scales is None else f'has the shape {scales.shape}'}. Download the checkpoint again."
        )
    if order is not None and read_small(order).any():
        raise CheckpointError(
            f"{order.file}: {brief(order.name)} must be 0 (rows), but is another order of elements, of a GPU. Save the model "
            "with a newer bitsandbytes."
        )
    extra = (order.name,) if order is not None else ()
    return ScaledBytes(info.name, "bitsandbytes, int8", info, Grid(scales, 1, 0), factor=1 / 127, extra=extra)


def _four_bits(infos: Infos, state: TensorInfo) -> QuantizedWeight:
    name = state.name.partition(_STATE)[0]
    try:
        data = json.loads(read_small(state).astype("uint8").tobytes())
        (outputs, inputs), block, kind = data["shape"], data["blocksize"], data["quant_type"]
        nested_block, offset = data.get("nested_blocksize", 0), float(data.get("nested_offset", 0.0))
        valid = all(type(n) is int and n > 0 for n in (outputs, inputs, block, nested_block or 1))
    except (ValueError, KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise CheckpointError(
            f"{state.file}: {brief(state.name)} must be JSON with the shape (outputs, inputs), blocksize and quant_type of a "
            "weight, but is not. Download the checkpoint again."
        )
    if infos[name].dtype != "U8":
        raise ModelError(
            f"{infos[name].file}: {brief(name)} holds its 4-bit elements as {infos[name].dtype}, which cannot be read: U8 can. "
            "Save the model with bnb_4bit_quant_storage=torch.uint8."
        )
    blocks = math.ceil(outputs * inputs / block)
    expected = {"": math.ceil(outputs * inputs / 2), ".absmax": blocks, ".quant_map": 16}
    if nested_block:
        expected |= {".nested_absmax": math.ceil(blocks / nested_block), ".nested_quant_map": 256}
    for part, count in expected.items():
        info = infos.get(name + part)
        if info is None or math.prod(info.shape) != count:
            raise CheckpointError(
                f"{state.file}: {brief(name + part)} must have {count} elements for a weight of {(outputs, inputs)} in blocks "
                f"of {block}, but {'is missing' if info is None else f'has the shape {info.shape}'}. Download the checkpoint "
                "again."
            )
    tables = {part: read_small(infos[name + part]) for part in (".quant_map", ".nested_quant_map") if part in expected}
    return FlatBlocks(
        name, f"bitsandbytes, {kind}, blocks of {block}", (outputs, inputs), infos[name], infos[f"{name}.absmax"], block,
        tuple(tables[".quant_map"].tolist()),
        (state.name, *(name + part for part in expected)),
        infos[f"{name}.nested_absmax"] if nested_block else None, nested_block,
        tuple(tables[".nested_quant_map"].tolist()) if nested_block else (), offset,
    )  # fmt: skip


@dataclass(frozen=True)
class FlatBlocks:
    """A weight of 4-bit indices in blocks of its elements as one row. See `QuantizedWeight`.

    Attributes:
        size: Outputs and inputs.
        info: The indices on disk, two a byte.
        absmax: The scales of blocks on disk, or their indices of `nested_table`.
        block: Elements of a block.
        table: The 16 values of the indices.
        tensors: The names of the tensors on disk.
        nested: The scales of `absmax` on disk, one for `nested_block` of them, or None.
        offset: Added to the scales if they are nested.
    """

    name: str
    form: str
    size: tuple[int, int]
    info: TensorInfo
    absmax: TensorInfo
    block: int
    table: tuple[float, ...]
    tensors: tuple[str, ...]
    nested: TensorInfo | None = None
    nested_block: int = 0
    nested_table: tuple[float, ...] = ()
    offset: float = 0.0
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """(outputs, inputs), with `transposed` the other way."""
        return self.size[::-1] if self.transposed else self.size

    def read(self, reader: Reader, rows: Sequence[Range], columns: Sequence[Range], expert: int = 0) -> QuantizedArray:
        """See `QuantizedWeight.read`."""
        import numpy as np

        # Columns that share the scale in every row, also where a block crosses rows.
        unit = math.gcd(self.size[1], self.block)
        groups = cover(columns, unit, self.size[1])
        starts = indexes(groups) * unit
        counts = [sum(stop - start for start, stop in held) for held in (rows, columns)]
        codes = np.empty((counts[0], packed_bytes(counts[1], 4)), np.uint8)
        scales = np.empty((counts[0], len(starts)), np.float32)
        done = 0
        for piece in in_steps(rows, max(1, _CHUNK_ELEMENTS // max(1, counts[1]))):
            index = indexes(piece)
            here = slice(done, done + len(index))
            codes[here] = self._codes(reader, index, columns)
            scales[here] = self._scales(reader, (index[:, None] * self.size[1] + starts) // self.block)
            done += len(index)
        return QuantizedArray(
            Encoding("table", 4, table=self.table), (counts[0], counts[1]), codes,
            Raw(scales, "F32"), row_of=np.arange(counts[0], dtype=np.int32),
            column_of=unit_of(columns, unit, groups),
        )  # fmt: skip

    def _codes(self, reader: Reader, rows: np.ndarray, columns: Sequence[Range]) -> np.ndarray:
        """The packed indices of these rows and columns; rows that begin in the same half of a byte are read together."""
        import numpy as np

        first = rows * self.size[1]
        made = np.empty((len(rows), sum(stop - start for start, stop in columns)), np.uint8)
        for parity in (0, 1):
            which = np.flatnonzero(first % 2 == parity)
            done = 0
            for start, stop in columns if len(which) else ():
                bytes_of_row = [((e + start) // 2, (e + stop + 1) // 2) for e in first[which].tolist()]
                packed = self._flat(reader, self.info, bytes_of_row).reshape(len(which), -1)
                both = np.stack([packed >> 4, packed & 15], -1).reshape(len(which), -1)
                skip = (parity + start) % 2
                made[which, done : done + stop - start] = both[:, skip : skip + stop - start]
                done += stop - start
        return pack_bits(made, 4)

    def _scales(self, reader: Reader, blocks: np.ndarray) -> np.ndarray:
        """The scales of these blocks as float32, in the shape of `blocks`."""
        import numpy as np

        kept, places = np.unique(blocks, return_inverse=True)
        found = self._flat(reader, self.absmax, runs(kept))
        if self.nested is not None:
            which, of_block = np.unique(kept // self.nested_block, return_inverse=True)
            scales = self._flat(reader, self.nested, runs(which)).astype(np.float32)[of_block]
            found = np.asarray(self.nested_table, np.float32)[found] * scales + np.float32(self.offset)
        return found.astype(np.float32)[places].reshape(blocks.shape)

    @staticmethod
    def _flat(reader: Reader, info: TensorInfo, ranges: list[Range]) -> np.ndarray:
        """Ranges of the elements of a tensor on disk that has one dim but for dims of size 1."""
        return read_raw(reader, info, [ranges if size > 1 else [(0, 1)] for size in info.shape]).reshape(-1)
