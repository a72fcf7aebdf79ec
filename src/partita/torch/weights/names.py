"""Where each tensor of a model is stored in its checkpoint: for some families, names on disk differ from the model's.

transformers keeps the experts of a layer in one tensor that is many on disk, renames modules between versions, and so on.
Its conversion tables define this mapping; here they become pieces, so that a rank can read or write its part of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from partita.core.model.mtp import SHARED
from partita.core.plan import Plan
from partita.core.sharding.split import Range
from partita.errors import CheckpointError, DependencyError
from partita.quantized.weight import QuantizedWeight
from partita.torch.transformers_internals import Conversion, convert, names_for_writing, stacks_experts


@dataclass(frozen=True)
class Piece:
    """A tensor on disk as a box within a tensor of the model.

    Attributes:
        name: Its name on disk.
        shape: Its shape on disk.
        start: Start of the box in the model's tensor, one number per dim.
        stacked: Whether the model's tensor has an extra first dim (one entry per expert).
    """

    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    stacked: bool = False

    def overlap(self, ranges: tuple[tuple[Range, ...], ...]) -> tuple[list[list[Range]], list[Range]] | None:
        """The part of this piece within `ranges` of the model's tensor, or None if there is none.

        Returns:
            The ranges to read, one per dim on disk, and their destination, one per dim of the local tensor.
        """
        size = (1, *self.shape) if self.stacked else self.shape
        take: list[list[Range]] = []
        put: list[Range] = []
        for dim_ranges, start, length in zip(ranges, self.start, size, strict=True):
            ranges_held, offset, first = [], 0, -1
            for a, b in dim_ranges:
                low, high = max(a, start), min(b, start + length)
                if low < high:
                    first = offset + low - a if first < 0 else first
                    ranges_held.append((low - start, high - start))
                offset += b - a
            if not ranges_held:
                return None
            take.append(ranges_held)
            put.append((first, first + sum(b - a for a, b in ranges_held)))
        return (take[1:] if self.stacked else take), put


@dataclass(frozen=True)
class Source:
    """The source of a model's tensor: pieces, or one of transformers' own conversions of unsplit tensors.

    Attributes:
        pieces: The boxes that make it up; empty if `converter` computes it.
        converter: A copy of transformers' converter.
        inputs: The tensors on disk that it takes: name and the pattern that it matched.
        first: The first of the model's tensors that `converter` computes; transformers identifies the conversion by it.
    """

    pieces: tuple[Piece, ...] = ()
    converter: Any = None
    inputs: tuple[tuple[str, str], ...] = ()
    first: str = ""


def sources_for_reading(
    model: nn.Module, on_disk: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Source], list[str]]:
    """Find the source of each tensor of the unsplit meta `model` among the tensors `on_disk` (shapes by name).

    Returns:
        The sources by the model's names, and the names on disk that the model does not use.
    """
    targets = {name: tuple(t.shape) for name, t in model.state_dict(keep_vars=True).items()}
    conversion = Conversion.of(model)
    by_pattern = {pattern: converter for converter in conversion.converters for pattern in converter.source_patterns}
    groups: dict[str, list[tuple[str, str | None]]] = {}
    for name in sorted(on_disk, key=_natural):
        target, pattern = conversion.rename(name, targets)
        groups.setdefault(target, []).append((name, pattern))
    sources: dict[str, Source] = {}
    unused: list[str] = []
    for target, members in groups.items():
        pattern = members[0][1]
        if pattern is None:
            if target in targets:
                sources[target] = _whole(target, targets[target], members[0][0], on_disk)
            else:
                unused.extend(name for name, _ in members)
            continue
        converter = by_pattern[pattern]
        inputs = tuple((name, p) for name, p in members if p is not None)
        pieces = _stacked_pieces(converter, inputs, on_disk) if target in targets else None
        if pieces is not None and _covers(pieces, targets[target]):
            sources[target] = Source(pieces)
        else:
            made = _converted_names(converter, target, targets)
            for name in made:
                sources[name] = Source(converter=converter, inputs=inputs, first=target)
            if not made:
                unused.extend(name for name, _ in members)
    return sources, unused


def in_model_order(model: nn.Module, quantized: Mapping[str, QuantizedWeight]) -> Mapping[str, QuantizedWeight]:
    """The quantized weights of a checkpoint as `model` stores them.

    Every form but GGUF's is found as [outputs, inputs], but transformers' Conv1D has its weight as [inputs, outputs].
    """
    turned = {f"{path}.weight" for path, module in model.named_modules() if type(module).__name__ == "Conv1D"}
    if not turned or not quantized:
        return quantized
    conversion = Conversion.of(model)
    targets = {name: tuple(t.shape) for name, t in model.state_dict(keep_vars=True).items()}
    made: dict[str, Any] = dict(quantized)
    for name in made:
        if conversion.rename(name, targets)[0] in turned and not made[name].transposed:
            made[name] = replace(made[name], transposed=True)
    return made


def pieces_for_writing(model: nn.Module) -> dict[str, tuple[Piece, ...]]:
    """For each tensor of the unsplit meta `model`, the tensors on disk that hold it, with the names that other tools expect.

    If transformers' conversion is not a plain stacking, the model's own name is used, which transformers also reads.
    """
    shapes = {name: tuple(t.shape) for name, t in model.state_dict(keep_vars=True).items()}
    try:
        sources, unused = sources_for_reading(model, names_for_writing(model, shapes))
    except DependencyError:
        raise
    except Exception:
        return {name: (Piece(name, shape, (0,) * len(shape)),) for name, shape in shapes.items()}
    pieces = {}
    for name, shape in shapes.items():
        source = sources.get(name)
        plain = source is not None and source.pieces and not unused
        pieces[name] = source.pieces if plain and source else (Piece(name, shape, (0,) * len(shape)),)
    return pieces


def _whole(target: str, shape: tuple[int, ...], name: str, on_disk: Mapping[str, tuple[int, ...]]) -> Source:
    if on_disk[name] != shape:
        raise CheckpointError(
            f"tensor {name} has the shape {on_disk[name]} in the checkpoint, but the model's {target} has {shape}. "
            "The config does not belong to this checkpoint."
        )
    return Source((Piece(name, shape, (0,) * len(shape)),))


def _stacked_pieces(
    converter: Any, inputs: tuple[tuple[str, str], ...], on_disk: Mapping[str, tuple[int, ...]]
) -> tuple[Piece, ...] | None:
    """The pieces of a converter that stacks experts and concatenates the stacks, None for any other converter."""
    if not stacks_experts(converter):
        return None
    pieces: list[Piece] = []
    offset = 0
    for pattern in converter.source_patterns:
        names = [name for name, p in inputs if p == pattern]
        shapes = {on_disk[name] for name in names}
        if len(shapes) != 1:
            return None
        shape = shapes.pop()
        inner = (0,) * (len(shape) - 1)
        pieces.extend(Piece(name, shape, (i, offset, *inner), stacked=True) for i, name in enumerate(names))
        offset += shape[0]
    return tuple(pieces)


def _covers(pieces: Iterable[Piece], shape: tuple[int, ...]) -> bool:
    """Whether the pieces, which do not overlap, fill a tensor of `shape`: they have the same number of elements."""
    size = 1
    for length in shape:
        size *= length
    held = 0
    for piece in pieces:
        box = (1, *piece.shape) if piece.stacked else piece.shape
        if len(box) != len(shape) or any(s + n > whole for s, n, whole in zip(piece.start, box, shape, strict=True)):
            return False
        count = 1
        for length in box:
            count *= length
        held += count
    return held == size


def _converted_names(converter: Any, target: str, targets: Mapping[str, object]) -> list[str]:
    """The model's tensors that a converter computes if its first is `target`."""
    first = converter.target_patterns[0]
    head, found, tail = target.partition(first)
    names = [head + pattern + tail for pattern in converter.target_patterns] if found else [target]
    return [name for name in names if name in targets]


def convert_whole(source: Source, target: str, tensors: Mapping[str, torch.Tensor], model: nn.Module) -> torch.Tensor:
    """Compute the unsplit tensor `target` with transformers' converter from unsplit tensors on disk."""
    value = convert(source.converter, source.first, source.inputs, tensors, model).get(target)
    if isinstance(value, list):
        value = value[0]
    if not isinstance(value, torch.Tensor):
        raise CheckpointError(
            f"{target} cannot be converted from {', '.join(name for name, _ in source.inputs)[:200]}."
        )
    return value


def _natural(name: str) -> list[tuple[int, int | str]]:
    """A sort key that orders `layers.10` after `layers.9`, so that experts are in order."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def repeated_pieces(model: Any, plan: Plan, pieces: Mapping[str, tuple[Piece, ...]]) -> dict[str, tuple[Piece, ...]]:
    """`pieces` to write, with the embedding and the head repeated for each prediction layer, as other tools expect."""
    made = dict(pieces)
    if plan.num_mtp == 0:
        return made
    names = {id(tensor): name for name, tensor in reversed(list(model.state_dict(keep_vars=True).items()))}
    for module, shared in zip((model.get_input_embeddings(), model.get_output_embeddings()), SHARED, strict=True):
        name = names[id(module.weight)]
        shape = tuple(module.weight.shape)
        made[name] += tuple(
            Piece(f"{plan.spec.layers}.{plan.spec.num_layers + k}.{shared}.weight", shape, (0,) * len(shape))
            for k in range(plan.num_mtp)
        )
    return made
