"""Names on disk for a new model: transformers' names, if mlx-lm's `sanitize` accepts exactly these.

`core.families` lists the tensors of transformers' model of a config. Its experts are fused in memory but separate on disk,
named by one of two conventions. The correct candidate is the one from which `sanitize` creates the unsplit model by only moving
values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn

from partita.checkpoint.header import TensorInfo
from partita.core.model.families import spec_from_config
from partita.errors import CheckpointError, ModelError, PartitaError, UnknownFamilyError
from partita.mlx.model.parts import parameter_homes
from partita.mlx.weights.names import Source, sources_of

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Named:
    """A new unsplit model, and its future form on disk.

    Attributes:
        model: The model, not evaluated, without tied arrays.
        sources: Maps the names of its arrays to the tensors that make them up.
        tensors: These tensors, with files that do not exist yet.
    """

    model: nn.Module
    sources: Mapping[str, Source]
    tensors: Mapping[str, TensorInfo]


def named(again: Callable[[], nn.Module], config: Mapping[str, Any]) -> Named:
    """A new model with transformers' names.

    Args:
        again: Builds the unsplit model each time it is called.
        config: The config in transformers' form.

    Raises:
        ModelError: Its names cannot be converted to transformers' names.
    """
    family = config["model_type"]
    try:
        spec = spec_from_config(config)
    except UnknownFamilyError as error:
        raise ModelError(_refusal(family, "Partita has no table of this family's tensors.")) from error
    except PartitaError as error:
        raise ModelError(_refusal(family, str(error))) from error
    saved = {name: tensor.shape for name, tensor in spec.tensors.items() if tensor.tied_to is None}
    reasons = []
    for shapes in _guesses(saved):
        tensors = {name: TensorInfo(Path(), name, "F32", shape, 0, 0) for name, shape in shapes.items()}
        model = again()
        try:
            sources = sources_of(model, again, tensors)
        except CheckpointError as error:
            reasons.append(str(error))
            continue
        wrong = _what_is_wrong(model, sources, shapes)
        if wrong is None:
            return Named(model, sources, tensors)
        reasons.append(wrong)
    raise ModelError(_refusal(family, reasons[-1]))


def _refusal(family: str, reason: str) -> str:
    return (
        f"a new {family} cannot be created on MLX, because mlx-lm's names cannot be converted to transformers' names: "
        f"{reason.rstrip('.')}. Create it on torch (--engine torch, or partita.torch.fresh), save it, and train that on MLX."
    )


def _guesses(saved: Shapes) -> Iterator[Shapes]:
    """Candidates for the tensors on disk of a model with the tensors `saved`."""
    fused = any(name.endswith(".experts.gate_up_proj") for name in saved)
    if fused:
        yield _apart(saved, ("gate_proj", "up_proj", "down_proj"))
        mixtral = _apart(saved, ("w1", "w3", "w2"))
        yield {_in_block(name): shape for name, shape in mixtral.items()}
    yield saved


def _apart(saved: Shapes, names: tuple[str, str, str]) -> Shapes:
    """Fused experts `gate_up_proj [E, 2 I, H]` and `down_proj [E, H, I]` as separate matrices of each expert."""
    gate, up, down = names
    shapes: Shapes = {}
    for name, shape in saved.items():
        path, _, last = name.rpartition(".")
        if path.endswith(".experts") and last == "gate_up_proj" and len(shape) == 3:
            half = (shape[1] // 2, shape[2])
            shapes |= {f"{path}.{i}.{one}.weight": half for i in range(shape[0]) for one in (gate, up)}
        elif path.endswith(".experts") and last == "down_proj" and len(shape) == 3:
            shapes |= {f"{path}.{i}.{down}.weight": shape[1:] for i in range(shape[0])}
        else:
            shapes[name] = shape
    return shapes


def _in_block(name: str) -> str:
    """A name in Mixtral's convention, with the experts and their router in `block_sparse_moe`."""
    for inside, outside in ((".mlp.experts.", ".experts."), (".mlp.gate.", ".gate."), (".mlp.router.", ".gate.")):
        if inside in name:
            return name.replace(inside, f".block_sparse_moe{outside}", 1)
    return name


def _what_is_wrong(model: nn.Module, sources: Mapping[str, Source], shapes: Shapes) -> str | None:
    """Why `sources` do not make up the model from exactly the tensors of these shapes; None if they do."""
    homes = parameter_homes(model)
    for name, (home, key) in homes.items():
        if name not in sources:
            return f"no tensor on disk provides {name}"
        if sources[name].shape != tuple(home[key].shape):
            return f"{name} would have the shape {sources[name].shape} instead of {tuple(home[key].shape)}"
        if sources[name].boxes is None:
            return f"{name} is computed from tensors on disk"
    unknown = next((name for name in sources if name not in homes), None)
    if unknown is not None:
        return f"{unknown} is not part of the model"
    covered = dict.fromkeys(shapes, 0)
    for source in sources.values():
        for box in source.boxes or ():
            covered[box.name] += math.prod(box.shape)
    left = next((name for name, shape in shapes.items() if covered[name] != math.prod(shape)), None)
    return f"nothing in the model is {left}" if left is not None else None
