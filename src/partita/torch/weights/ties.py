"""Tied tensors that a checkpoint holds more than once: they stay one tensor only if their values are equal.

A config may tie the head to the embedding although the file has a separate head, for example after adapters were merged into
it. transformers compares the two and ties them only if they are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from partita.core.sharding.split import Range
from partita.torch.collectives.collective_errors import collective_errors, gather_from_all
from partita.torch.collectives.groups import ParallelGroups
from partita.torch.transformers_internals import forget_tie, text_config_of
from partita.torch.weights.names import Source

Read = Callable[[str, tuple[tuple[Range, ...], ...], Tensor], None]
"""Takes a tensor's name, ranges of each of its dims and a local tensor of that size, and reads the ranges into it."""

_CHUNK_ELEMENTS = 4 << 20


def tied_names(model: nn.Module) -> dict[str, str]:
    """Maps the names of an unsplit model's tied tensors to the name of the earlier tensor that they are tied to."""
    first: dict[int, str] = {}
    names = ((name, first.setdefault(id(t), name)) for name, t in model.state_dict(keep_vars=True).items())
    return {name: twin for name, twin in names if name != twin}


def add_twins(model: nn.Module, sources: dict[str, Source]) -> None:
    """Give all tied tensors the source of the one that the checkpoint has; modifies `sources`."""
    for name, twin in tied_names(model).items():
        if name in sources:
            sources.setdefault(twin, sources[name])


def differing(model: nn.Module, sources: Mapping[str, Source], read: Read, groups: ParallelGroups) -> set[str]:
    """Tied tensors whose values in the checkpoint differ from those of the tensor that they are tied to.

    Every rank must call it; each compares its share of the rows, in the model's dtype.

    Raises:
        CheckpointError: A tensor cannot be read; on every rank.
    """
    tensors = model.state_dict(keep_vars=True)
    pairs = {n: t for n, t in tied_names(model).items() if n in sources and t in sources and sources[n] != sources[t]}
    if not pairs:
        return set()
    rank = groups.rank
    with collective_errors(groups):
        mine = {n for n, t in pairs.items() if not _equal(n, t, tensors[n], read, rank, groups.mesh.size)}
    return {name for found in gather_from_all(groups, mine) for name in found}


def _equal(name: str, twin: str, like: Tensor, read: Read, rank: int, size: int) -> bool:
    """Whether this rank's share of the rows of two tensors on disk is equal."""
    rows, rest = (like.shape[0], like.shape[1:]) if like.dim() else (1, torch.Size(()))
    step = max(1, _CHUNK_ELEMENTS // max(1, rest.numel()))
    others = tuple(((0, length),) for length in rest)
    stop = rows * (rank + 1) // size
    for start in range(rows * rank // size, stop, step):
        end = min(stop, start + step)
        parts = [torch.empty((end - start, *rest), dtype=like.dtype, device="cpu") for _ in range(2)]
        for one, part in zip((name, twin), parts, strict=True):
            read(one, (((start, end),), *others), part)
        if not torch.equal(*parts):
            return False
    return True


def untie(model: Any, names: Iterable[str]) -> None:
    """Untie tensors of an unsplit meta `model`, and correct its config if no tied tensor is left."""
    for name in names:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        shared = module._parameters[attribute]
        module._parameters[attribute] = nn.Parameter(torch.empty_like(shared), requires_grad=shared.requires_grad)
        forget_tie(model, name)
    if not tied_names(model):
        for config in (model.config, text_config_of(model.config)):
            config.tie_word_embeddings = False
