"""The origin of a model, so that it is saved as it was read: the names on disk, and the part of the model in each tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from partita.checkpoint.header import TensorInfo
from partita.checkpoint.unused import Unused, announce_nothing
from partita.mlx.model.mlx_lm_models import config_of
from partita.mlx.model.parts import parameter_homes
from partita.mlx.weights.names import Box, Source
from partita.mlx.weights.ties import untie


@dataclass(frozen=True)
class Origin:
    """The arrays of an unsplit model, and the checkpoint that it was loaded from.

    Attributes:
        sources: The source of each array, by the model's names.
        tensors: The tensors on disk, by name; empty for a model that was not loaded.
        folder: Folder of the checkpoint.
        config: The config of a model that was not loaded.
        is_untied: Whether the config on disk ties the head, which has values of its own.
        unused: Tensors of the checkpoint that the model does not use.
        generation: The checkpoint's generation settings; None if only the config has some.
    """

    sources: Mapping[str, Source]
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    folder: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] | None = None
    is_untied: bool = False
    unused: Unused = field(default_factory=Unused)

    @classmethod
    def in_memory(cls, model: nn.Module) -> Origin:
        """The origin of an unsplit model in memory."""
        homes = parameter_homes(model).items()
        sources = {name: Source(tuple(home[key].shape), home[key].dtype, None) for name, (home, key) in homes}
        return cls(sources, config=config_of(model))

    def __deepcopy__(self, memo: object) -> Origin:
        return self

    def boxes(self) -> dict[str, tuple[Box, ...]]:
        """For each array of the unsplit model the boxes of tensors on disk that it is written to.

        An array that was computed, or that shares a tensor with one, or with values that the model drops, is written
        under its own name: mlx-lm also reads these.
        """
        kept = {name: source.boxes for name, source in self.sources.items() if source.boxes is not None}
        partial: set[str] = {""}
        while partial:
            covered: dict[str, int] = {}
            for box in (box for boxes in kept.values() for box in boxes):
                covered[box.name] = covered.get(box.name, 0) + math.prod(box.shape)
            partial = {name for name, count in covered.items() if count != math.prod(self.tensors[name].shape)}
            kept = {name: boxes for name, boxes in kept.items() if not any(box.name in partial for box in boxes)}
        return {name: kept.get(name) or (_whole(name, source.shape),) for name, source in self.sources.items()}

    def shape(self, box: Box) -> tuple[int, ...]:
        """The shape of the tensor on disk that contains a box."""
        return tuple(self.tensors[box.name].shape) if box.name in self.tensors else box.shape

    def plain_config(self, dtype: mx.Dtype, *, announces: bool = True) -> dict[str, Any]:
        """The config to write for weights of a dtype; without `announces` it omits layers that are not saved."""
        config = dict(self.config)
        file = self.folder / "config.json" if self.folder is not None else None
        if file is not None and file.is_file():
            config = json.loads(file.read_text(encoding="utf-8"))
        key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
        if self.is_untied:
            untie(config)
        if not announces:
            announce_nothing(config)
        config[key] = str(dtype).removeprefix("mlx.core.")
        return config


def _whole(name: str, shape: tuple[int, ...]) -> Box:
    return Box(name, (0,) * len(shape), shape, tuple(range(len(shape))), (0,) * len(shape))
