"""A head on disk that the config ties to the embedding: it stays tied only if the two are equal, as in transformers.

mlx-lm drops such a head without comparing it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import mlx.nn as nn

from partita.checkpoint.header import TensorInfo
from partita.checkpoint.index import Checkpoint
from partita.checkpoint.read import Reader
from partita.core.model.spec import text_config
from partita.errors import ModelError
from partita.mlx.collectives.collective_errors import collective_errors
from partita.mlx.collectives.groups import ParallelGroups
from partita.mlx.model.config import HEAD
from partita.mlx.model.parts import parameter_homes

_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|embeddings?)\.weight$")

_CHUNK_BYTES = 8 << 20


def stored_twice(config: Mapping[str, Any], checkpoint: Checkpoint) -> tuple[str, str] | None:
    """The head and the embedding that a config ties although a checkpoint holds both, by their names on disk; else None."""
    part = text_config(config)
    if not part.get("tie_word_embeddings", config.get("tie_word_embeddings", False)):
        return None
    heads = [name for name in checkpoint.tensors if HEAD.search(name)]
    embeddings = [name for name in checkpoint.tensors if _EMBEDDING.search(name)]
    for head in heads:
        for embedding in embeddings:
            if checkpoint.tensors[head].shape[:1] == checkpoint.tensors[embedding].shape[:1]:
                return head, embedding
    return None


def differ(names: tuple[str, str], reader: Reader, groups: ParallelGroups) -> bool:
    """Whether two layers on disk differ, including scales and biases. Every rank must call it; each compares its share of the
    rows. Closes `reader`.

    Raises:
        CheckpointError: A tensor cannot be read; on every rank.
    """
    checkpoint = reader.checkpoint
    with collective_errors(groups), reader:
        mine = False
        for kind in ("weight", "scales", "biases"):
            one, other = (checkpoint.tensors.get(name.removesuffix("weight") + kind) for name in names)
            mine = mine or not _equal(one, other, reader, groups.rank, groups.mesh.size)
    for comm in (groups.tp, groups.pp, groups.dp):
        mine = any(comm.all_gather_object(mine)) if comm.size > 1 else mine
    return mine


def untie(config: dict[str, Any]) -> None:
    """Untie the head from the embedding in a config."""
    part: Any = text_config(config)
    for one in (config, part):
        if one is part or "tie_word_embeddings" in one:
            one["tie_word_embeddings"] = False


def check_head(model: nn.Module, names: tuple[str, str]) -> None:
    """Raise `ModelError` unless an untied model has a head."""
    if not any(HEAD.search(name) for name in parameter_homes(model)):
        family = type(model).__module__.rpartition(".")[2]
        raise ModelError(
            f"the checkpoint's {names[0]} differs from its {names[1]}, but mlx-lm's {family} "
            "always uses the embedding as its head. Use the torch engine."
        )


def _equal(one: TensorInfo | None, other: TensorInfo | None, reader: Reader, rank: int, size: int) -> bool:
    """Whether a rank's share of the rows of two tensors is equal, bit for bit."""
    if one is None or other is None:
        return one is other
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    rows, rest = one.shape[0], [[(0, length)] for length in one.shape[1:]]
    row_bytes = max(1, one.nbytes // max(1, rows))
    step = max(1, _CHUNK_BYTES // row_bytes)
    stop = rows * (rank + 1) // size
    for start in range(rows * rank // size, stop, step):
        end = min(stop, start + step)
        buffers = [bytearray((end - start) * math.prod(one.shape[1:]) * one.itemsize_bits // 8) for _ in range(2)]
        for info, buffer in zip((one, other), buffers, strict=True):
            reader.read(info.name, [[(start, end)], *rest], memoryview(buffer))
        if buffers[0] != buffers[1]:
            return False
    return True
