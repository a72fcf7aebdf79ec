"""What the metadata of a GGUF file says about its model, each value checked when it is read."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from partita.checkpoint.header import TensorInfo, brief
from partita.errors import CheckpointError

_LAYER = re.compile(r"(?:enc\.)?blk\.(\d+)\.")


@dataclass(frozen=True)
class Facts:
    """The metadata and tensors of a model in one or several GGUF files.

    Attributes:
        file: The first file, for messages.
        metadata: Its metadata.
        tensors: The tensors of all files by their names there.
        data: The bytes of a tensor.
    """

    file: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    data: Callable[[TensorInfo], bytes]

    @cached_property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str):
            raise self.error("general.architecture", "must be a text", name)
        return name

    def error(self, key: str, rule: str, value: object) -> CheckpointError:
        """The error for a value of the metadata."""
        return CheckpointError(
            f"{self.file}: {key} {rule}, but is {brief(value)}: the file is damaged or of another kind. Download it again, or "
            "convert the model again with llama.cpp."
        )

    def get(self, key: str) -> Any:
        """The value of `key` of the architecture, or None."""
        return self.metadata.get(f"{self.architecture}.{key}")

    def size(self, key: str, default: int | None = None, least: int = 1) -> int:
        """An integer of at least `least`; where the file has one a layer, all must be equal."""
        value = self.get(key)
        if isinstance(value, list) and value and all(one == value[0] for one in value):
            value = value[0]
        if value is None and default is not None:
            return default
        if type(value) is not int or value < least:
            raise self.error(
                f"{self.architecture}.{key}",
                f"must be a whole number of at least {least}, the same for all layers",
                value,
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(f"{self.architecture}.{key}", "must be a number", value)
        # The shortest decimal of a float32 is what people wrote (1e-05, not 9.999999747378752e-06).
        return float(value) if isinstance(value, int) else shortest(value)

    def token(self, name: str) -> int | None:
        """The id of a special token such as `bos`, or None."""
        value = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if type(value) is int and 0 <= value < 2**31 else None

    @property
    def layers(self) -> int:
        """Layers that the file has tensors of."""
        return 1 + max((int(match[1]) for name in self.tensors if (match := _LAYER.match(name))), default=-1)

    def has(self, leaf: str) -> bool:
        """Whether the first layer has the tensor `leaf`."""
        return f"blk.0.{leaf}" in self.tensors

    def values(self, name: str) -> list[float] | None:
        """The values of a small tensor, or None if there is none of this name."""
        info = self.tensors.get(name)
        return None if info is None else floats(self.data(info), info.dtype)


def shortest(value: float) -> float:
    """The number with the fewest digits that has the same float32 value."""
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value


def floats(data: bytes, dtype: str) -> list[float]:
    """The values of F32, F16 or BF16 data."""
    if dtype == "F32":
        return list(struct.unpack(f"<{len(data) // 4}f", data))
    if dtype == "F16":
        return list(struct.unpack(f"<{len(data) // 2}e", data))
    halves = struct.unpack(f"<{len(data) // 2}H", data)
    return list(struct.unpack(f"<{len(halves)}f", struct.pack(f"<{len(halves)}I", *(half << 16 for half in halves))))
