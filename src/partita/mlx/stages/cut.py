"""Partitioning a model into stages: which modules a pipeline rank keeps, and which stand-ins replace the others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from partita.core.plan import Plan, Stage
from partita.errors import ModelError
from partita.mlx.model.tree import children, get_module, named_modules, set_module
from partita.mlx.stages.layers import AbsentLayer, AbsentModule, Gate, StageRun, Stand


@dataclass(frozen=True)
class Stages:
    """The stages of a partitioned model.

    Attributes:
        by_index: This rank's stages, by index in the pipeline.
        layers: The path of the list of layers.
        before: Paths of this rank's modules that run before the layers.
        copies: Arrays that several pipeline ranks hold, by name, with these ranks; the first owns.
        run: The stage that is running.
    """

    by_index: Mapping[int, Stage]
    layers: str
    before: tuple[str, ...]
    copies: Mapping[str, tuple[int, ...]]
    run: StageRun = field(default_factory=StageRun, compare=False)


def cut_stages(model: nn.Module, plan: Plan, pp_rank: int) -> None:
    """Reduce an unsplit `model`, in place, to the modules that pipeline rank `pp_rank` needs. Nothing is evaluated.

    Raises:
        ModelError: The model has no list of layers that can be partitioned.
    """
    if plan.num_stages == 1:
        return
    if not isinstance(get_module(model, plan.spec.layers), list):
        raise ModelError(f"{plan.spec.layers} is not a list of layers.")
    before, behind = _uses_around_layers(model, plan)
    mine = {plan.stage_index(pp_rank, vpp): plan.stage(pp_rank, vpp) for vpp in range(plan.vpp)}
    copies = _copies(model, plan, before, behind)
    run = StageRun()
    for path in _outside(plan):
        names = [t.name for t in plan.spec.module_tensors(path)]
        if not any(plan.is_held(name, pp_rank) or pp_rank in copies.get(name, ()) for name in names):
            set_module(model, path, AbsentModule(get_module(model, path), run))
    layers = get_module(model, plan.spec.layers)
    own = {index for stage in mine.values() for index in stage.layers}
    for index, layer in enumerate(layers):
        if index not in own:
            layers[index] = AbsentLayer(layer, run, index)
    here = tuple(path for path in before if not isinstance(get_module(model, path), AbsentModule))
    model.partita_stages = Stages(mine, plan.spec.layers, here, copies, run)


def prepare_parts(model: nn.Module, plan: Plan) -> None:
    """Let a model of one stage run in parts (see `parts_of`). Every rank must call it.

    Raises:
        ModelError: The model has no list of layers that can be partitioned.
    """
    if plan.num_stages > 1 or isinstance(getattr(model, "partita_stages", None), Stages):
        return
    if not isinstance(get_module(model, plan.spec.layers), list):
        raise ModelError(f"{plan.spec.layers} is not a list of layers.")
    before, _ = _uses_around_layers(model, plan)
    model.partita_stages = Stages({0: plan.stage_at(0)}, plan.spec.layers, before, {})


def parts_of(stage: Stage, layers: int) -> list[Stage]:
    """The parts of a stage with `layers` of its layers each, which run one after the other; 0 for a single part."""
    if not layers or not stage.layers:
        return [stage]
    starts = range(0, len(stage.layers), layers)
    return [
        Stage(
            stage.layers[start : start + layers], stage.mtp_layers, stage.embedding and start == 0,
            stage.loss and start == starts[-1],
        )
        for start in starts
    ]  # fmt: skip


def used_throughout(model: nn.Module, plan: Plan) -> set[str]:
    """Names of arrays outside of the layers whose time of use is unknown: their modules have submodules."""
    paths = [path for path in _outside(plan) if _holds_others(model, path)]
    return {tensor.name for path in paths for tensor in plan.spec.module_tensors(path)}


def _outside(plan: Plan) -> list[str]:
    """Paths of modules with arrays outside of the layers."""
    return [path for path in plan.spec.modules if plan.spec.layer_of(path) is None]


def _copies(
    model: nn.Module, plan: Plan, before: Collection[str], behind: Collection[str]
) -> Mapping[str, tuple[int, ...]]:
    """Arrays that several ranks hold: the plan's copies, arrays of another rank's module (an embedding that is also the head),
    and on all ranks the arrays of modules with submodules, whose time of use is unknown."""
    first = next(plan.stage_rank(i) for i in range(plan.num_stages) if plan.stage_at(i).embedding)
    last = plan.stage_rank(plan.loss_stage)
    needed = [(path, first) for path in before] + [(path, last) for path in behind]
    needed += [(path, rank) for path in _outside(plan) if _holds_others(model, path) for rank in range(plan.mesh.pp)]
    copies = dict(plan.copies)
    for path, rank in needed:
        for tensor in plan.spec.module_tensors(path):
            held = tuple(p for p in range(plan.mesh.pp) if plan.is_held(tensor.name, p))
            holders = copies.get(tensor.name, held)
            if rank not in holders:
                copies[tensor.name] = (*holders, rank)
    return MappingProxyType(copies)


def _holds_others(model: nn.Module, path: str) -> bool:
    module = get_module(model, path)
    return not isinstance(module, nn.Module) or any(isinstance(c, (dict, list)) for _, c in children(module))


def _uses_around_layers(model: nn.Module, plan: Plan) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Paths of the modules outside of the layers that a forward calls before them, and of those that it calls after them.

    A forward without evaluation determines them.
    """
    layers = get_module(model, plan.spec.layers)
    paths = [p for p in named_modules(model) if p and plan.spec.layer_of(p) is None and plan.spec.module_tensors(p)]
    before: dict[str, None] = {}
    behind: dict[str, None] = {}
    run = StageRun(received=None)

    def note(path: str) -> None:
        if not run.called:
            before[path] = None
        if len(run.called) == len(layers):
            behind[path] = None

    own = [(layers, index, Gate(layer, run, index, enters=False, leaves=False)) for index, layer in enumerate(layers)]
    swaps = own + [(*place_of(model, path), _Noted(get_module(model, path), path, note)) for path in paths]
    with swapped(swaps):
        try:
            call_unsplit(model, mx.zeros((1, 2), mx.int32))
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"a forward of it fails ({type(error).__name__}: {error}).") from error
    return tuple(before), tuple(behind)


class _Noted(Stand):
    """A module whose calls are recorded."""

    def __init__(self, module: Any, path: str, note: Callable[[str], None]) -> None:
        super().__init__(module)
        self.path, self.note = path, note

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.note(self.path)
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in ("as_linear", "weight"):
            self.note(self.path)
        return super().__getattr__(name)


def place_of(model: nn.Module, path: str) -> tuple[Any, Any]:
    """The parent of the module at `path`, and its key."""
    parent, _, name = path.rpartition(".")
    node = get_module(model, parent)
    return node, int(name) if isinstance(node, list) else name


@contextmanager
def swapped(swaps: list[tuple[Any, Any, Any]]) -> Iterator[None]:
    """Replace modules inside the context, given as (parent, key, replacement)."""
    kept = [container[key] for container, key, _ in swaps]
    for container, key, stand in swaps:
        container[key] = stand
    try:
        yield
    finally:
        for (container, key, _), module in zip(swaps, kept, strict=True):
            container[key] = module


def call_unsplit(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the model's own forward, even if `__call__` is replaced."""
    return getattr(type(model), "partita_unsplit", type(model)).__call__(model, *args, **kwargs)


def present_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model that this rank has, by path."""
    return {path: m for path, m in named_modules(model).items() if not isinstance(m, (AbsentLayer, AbsentModule))}


def stages_of(model: nn.Module) -> Stages:
    """The stages of a partitioned model."""
    stages = model.partita_stages
    assert isinstance(stages, Stages)
    return stages
