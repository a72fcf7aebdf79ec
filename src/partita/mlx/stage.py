"""A stage of any model: the model's own forward, run with some of its layers.

A pipeline rank keeps the modules whose arrays its plan gives it. The list of layers keeps its length and its numbers: in
place of a layer of another rank stands one that passes on what it is given. While stage i of the pipeline runs:

    [1] the embedding runs where the layout has it; elsewhere zeros of its shape stand for it, which nobody computes
    [2] what the stage before sent is what every layer before the stage's first returns
    [3] what leaves the last layer of the stage ends the forward, unless the loss is with it

So all else that a family makes of ids, positions and masks is made by the family's own code on every stage. MLX is lazy: what
that code computes in vain is not computed.
"""

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
from partita.mlx.cache import count_tokens
from partita.mlx.inner import copy_module, dense_width
from partita.mlx.tree import children, get_module, named_modules, set_module


@dataclass(frozen=True)
class Message:
    """What a stage hands to the next.

    Attributes:
        arrays: The hidden state `[batch, sequence, hidden]`, and what else a layer of the model returns.
        places: Of each value that a layer returns in a tuple, whether it is an array (else it is None); None where a layer
            returns the hidden state bare.
    """

    arrays: tuple[mx.array, ...]
    places: tuple[bool, ...] | None = None

    @property
    def value(self) -> Any:
        """What a layer would have returned."""
        if self.places is None:
            return self.arrays[0]
        left = iter(self.arrays)
        return tuple(next(left) if is_array else None for is_array in self.places)


class _Left(BaseException):
    """Ends a forward with what left the last layer of a stage; no error, so that nobody's `except Exception` sees it."""

    def __init__(self, message: Message) -> None:
        super().__init__()
        self.message = message


@dataclass
class _Run:
    """The stage that is running.

    Attributes:
        received: What came from the stage before.
        cache: The cache of the model, one entry a layer or as its family has it.
        filled: The entries that layers of this stage were given.
        called: The layers that were called, by their numbers.
    """

    received: Message | None = None
    cache: Any = None
    filled: list[Any] = field(default_factory=list)
    called: set[int] = field(default_factory=set)

    def call(self, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> mx.array:
        """Note a call of a layer; the hidden state that it was given."""
        if index in self.called:
            raise ModelError("it runs its layers more than once a forward.")
        self.called.add(index)
        hidden = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(hidden, mx.array):
            raise ModelError("its layers are not called with the hidden state first.")
        return hidden


class _Elsewhere(nn.Module):
    """Stands for a module of another rank, and says of itself what the module says, without its arrays."""

    def __init__(self, module: nn.Module, run: _Run) -> None:
        super().__init__()
        # Not as an item: it is none of the model's modules.
        self.__dict__["_facts"] = _without_arrays(module)
        self.run = run

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """For a family that asks `isinstance` of its layers."""
        return type(self.__dict__["_facts"])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.__dict__["_facts"], name)

    def __bool__(self) -> bool:
        return True


class AbsentLayer(_Elsewhere):
    """A layer of another rank: what was received, or given, leaves as if it had come from the layer."""

    def __init__(self, layer: nn.Module, run: _Run, index: int) -> None:
        super().__init__(layer, run)
        self.index = index

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Pass on."""
        hidden = self.run.call(self.index, args, kwargs)
        return hidden if self.run.received is None else self.run.received.value


class AbsentModule(_Elsewhere):
    """A module outside of the layers that another rank has: zeros in place of an embedding, else what it is given."""

    def __init__(self, module: nn.Module, run: _Run) -> None:
        super().__init__(module, run)
        self.stand_in = _stand_in(module, run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the module."""
        return self.stand_in(*args, **kwargs)


def _without_arrays(node: Any) -> Any:
    """A copy of a tree of modules whose arrays have shapes and dtypes, and no memory."""
    if isinstance(node, mx.array):
        return mx.broadcast_to(mx.zeros((), node.dtype), node.shape)
    if isinstance(node, nn.Module):
        twin = copy_module(node)
        for key, child in children(node):
            twin[key] = _without_arrays(child)
        return twin
    if isinstance(node, dict):
        return {key: _without_arrays(child) for key, child in node.items()}
    return [_without_arrays(child) for child in node] if isinstance(node, (list, tuple)) else node


def _stand_in(module: nn.Module, run: _Run) -> Callable[..., Any]:
    """What takes the place of a module before the layers in the forward of a stage that is not with the embedding."""
    inner = module.get("embedding", module.get("linear", module))
    if isinstance(inner, (nn.Embedding, nn.QuantizedEmbedding)):
        width = dense_width(inner)
        return lambda ids, *args, **kwargs: mx.zeros((*ids.shape, width), _dtype(run))
    if isinstance(inner, (nn.Linear, nn.QuantizedLinear)):
        outputs = int(inner["weight"].shape[0])
        return lambda x, *args, **kwargs: mx.zeros((*x.shape[:-1], outputs), x.dtype)
    return lambda *args, **kwargs: args[0] if args else next(iter(kwargs.values()), None)


def _dtype(run: _Run) -> mx.Dtype:
    return run.received.arrays[0].dtype if run.received is not None else mx.float32


class _Stand:
    """Stands for a module that is here while a stage runs, and says of itself what the module says."""

    def __init__(self, module: Any) -> None:
        self.module = module

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self.module)

    def __getattr__(self, name: str) -> Any:
        if name == "module":
            raise AttributeError(name)
        return getattr(self.module, name)

    def __getitem__(self, name: Any) -> Any:
        return self.module[name]


class _Gate(_Stand):
    """A layer of the stage: lets in what was received before the first, and out what the last returns."""

    def __init__(self, layer: Any, run: _Run, index: int, *, enters: bool, leaves: bool) -> None:
        super().__init__(layer)
        self.run, self.index, self.enters, self.leaves = run, index, enters, leaves

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.run.call(self.index, args, kwargs)
        if self.enters and self.run.received is not None:
            hidden = self.run.received.arrays[0]
            if args:
                args = (hidden, *args[1:])
            else:
                kwargs = {**kwargs, next(iter(kwargs)): hidden}
        self.run.filled += [value for value in (*args, *kwargs.values()) if value is not None]
        output = self.module(*args, **kwargs)
        if self.leaves:
            raise _Left(_opened(output))
        return output


class _End(_Stand):
    """The first layer, where a stage has the embedding alone: what would enter it leaves."""

    def __init__(self, layer: Any, run: _Run) -> None:
        super().__init__(layer)
        self.run = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise _Left(Message((self.run.call(0, args, kwargs),)))


class _Silent(_Stand):
    """A module before the layers, while a stage runs that is not with the embedding; as a tied head it is itself."""

    def __init__(self, module: Any, run: _Run) -> None:
        super().__init__(module)
        self.stand_in = _stand_in(module, run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.stand_in(*args, **kwargs)


def _opened(output: Any) -> Message:
    if isinstance(output, mx.array):
        return Message((output,))
    values = output if isinstance(output, (tuple, list)) and output and output[0] is not None else (output,)
    if all(value is None or isinstance(value, mx.array) for value in values):
        arrays = tuple(value for value in values if value is not None)
        return Message(arrays, tuple(value is not None for value in values))
    raise ModelError("its layers hand on more than arrays.")


@dataclass(frozen=True)
class Stages:
    """What a cut model knows of its stages.

    Attributes:
        by_index: Those of this rank, by their place in the pipeline.
        layers: The path of the list of layers.
        before: Paths of what runs before the layers and is here.
        copies: Arrays that several pipeline ranks hold, by name, with these ranks; the first owns.
        run: The stage that is running.
    """

    by_index: Mapping[int, Stage]
    layers: str
    before: tuple[str, ...]
    copies: Mapping[str, tuple[int, ...]]
    run: _Run = field(default_factory=_Run, compare=False)


def cut_stages(model: nn.Module, plan: Plan, pp_rank: int) -> None:
    """Leave of an unsplit `model` what pipeline rank `pp_rank` needs, in place. Nothing is evaluated.

    Raises:
        ModelError: The model has no list of layers that can be cut.
    """
    if plan.num_stages == 1:
        return
    if not isinstance(get_module(model, plan.spec.layers), list):
        raise ModelError(f"{plan.spec.layers} is no list of layers.")
    before, behind = _uses_around_layers(model, plan)
    mine = {plan.stage_index(pp_rank, vpp): plan.stage(pp_rank, vpp) for vpp in range(plan.vpp)}
    copies = _copies(model, plan, before, behind)
    run = _Run()
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


def _outside(plan: Plan) -> list[str]:
    """Paths of what holds arrays and is of no layer."""
    return [path for path in plan.spec.modules if plan.spec.layer_of(path) is None]


def _copies(
    model: nn.Module, plan: Plan, before: Collection[str], behind: Collection[str]
) -> Mapping[str, tuple[int, ...]]:
    """What several ranks hold: what the plan says, what a rank needs of another (an embedding that is the head too), and on
    all ranks the arrays of modules that hold others, of which nobody knows when they are used."""
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
    """Paths of the modules outside of the layers that a forward calls before them, and of those that it calls behind them.

    Found by a forward in which nothing is evaluated.
    """
    layers = get_module(model, plan.spec.layers)
    paths = [p for p in named_modules(model) if p and plan.spec.layer_of(p) is None and plan.spec.module_tensors(p)]
    before: dict[str, None] = {}
    behind: dict[str, None] = {}
    run = _Run(received=None)

    def note(path: str) -> None:
        if not run.called:
            before[path] = None
        if len(run.called) == len(layers):
            behind[path] = None

    own = [(layers, index, _Gate(layer, run, index, enters=False, leaves=False)) for index, layer in enumerate(layers)]
    swaps = own + [(*_place(model, path), _Noted(get_module(model, path), path, note)) for path in paths]
    with _swapped(swaps):
        try:
            call_unsplit(model, mx.zeros((1, 2), mx.int32))
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"a forward of it fails ({type(error).__name__}: {error}).") from error
    return tuple(before), tuple(behind)


class _Noted(_Stand):
    """A module whose uses are noted."""

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


def _place(model: nn.Module, path: str) -> tuple[Any, Any]:
    """What holds the module at `path`, and under which key."""
    parent, _, name = path.rpartition(".")
    node = get_module(model, parent)
    return node, int(name) if isinstance(node, list) else name


@contextmanager
def _swapped(swaps: list[tuple[Any, Any, Any]]) -> Iterator[None]:
    """While it lasts other things stand in the places of modules: (what holds one, its key, what stands there)."""
    kept = [container[key] for container, key, _ in swaps]
    for container, key, stand in swaps:
        container[key] = stand
    try:
        yield
    finally:
        for (container, key, _), module in zip(swaps, kept, strict=True):
            container[key] = module


def call_unsplit(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the model's own forward, whatever calling the model does."""
    return getattr(type(model), "partita_unsplit", type(model)).__call__(model, *args, **kwargs)


def present_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model that this rank has, by path."""
    return {path: m for path, m in named_modules(model).items() if not isinstance(m, (AbsentLayer, AbsentModule))}


def stages_of(model: nn.Module) -> Stages:
    """What a cut model knows of its stages."""
    stages = model.partita_stages
    assert isinstance(stages, Stages)
    return stages


def run_stage(
    model: nn.Module,
    plan: Plan,
    index: int,
    received: Message | None,
    inputs: mx.array,
    cache: Any = None,
    options: Mapping[str, Any] = MappingProxyType({}),
    *,
    output: bool = True,
) -> Any:
    """Run stage `index` of the pipeline, which must be one of this rank's. Nothing is evaluated.

    Args:
        model: What `cut_stages` left of the model.
        plan: How it was cut.
        index: The stage's place in the pipeline.
        received: What the stage before handed on; None for the first.
        inputs: The ids `[batch, sequence]` that the unsplit model is called with.
        cache: The whole model's cache, as mlx-lm makes it; entries of other stages' layers are kept in step.
        options: What else the unsplit model is called with.
        output: Whether the stage with the loss computes the model's output, rather than hand on what left its last layer.

    Returns:
        A `Message` for the next stage, or of the stage with the loss the model's own output.
    """
    given = dict(options) if cache is None else {**options, "cache": cache}
    if plan.num_stages == 1:
        return call_unsplit(model, inputs, **given)
    stages = stages_of(model)
    stage, run = stages.by_index[index], stages.run
    received = None if stage.embedding else received
    if not (stage.layers or stage.embedding or (stage.loss and output)):
        if isinstance(cache, list):
            count_tokens(cache, [], length_of(inputs, options))
        return received
    run.received, run.cache, run.filled, run.called = received, cache, [], set()
    try:
        with _swapped(_swaps(model, stages, stage, output)):
            made = call_unsplit(model, inputs, **given)
            if not (stage.loss and output):
                raise ModelError("its forward ends without calling each of its layers.")
    except _Left as left:
        made = left.message
    finally:
        filled, run.received, run.cache, run.filled = run.filled, None, None, []
    if isinstance(cache, list):
        count_tokens(cache, filled, length_of(inputs, options))
    return made


def length_of(inputs: mx.array | None, options: Mapping[str, Any]) -> int:
    """How many tokens a sequence of a call has, which may be of embeddings `[batch, sequence, hidden]` alone."""
    return int((options["input_embeddings"] if inputs is None else inputs).shape[1])


def _swaps(model: nn.Module, stages: Stages, stage: Stage, output: bool) -> list[tuple[Any, Any, Any]]:
    """What stands in other places while `stage` runs."""
    layers, run = get_module(model, stages.layers), stages.run
    swaps: list[tuple[Any, Any, Any]] = []
    for index, layer in enumerate(layers):
        if index in stage.layers:
            enters = index == stage.layers[0] == 0 and not stage.embedding
            leaves = index == stage.layers[-1] and not (stage.loss and output)
            swaps.append((layers, index, _Gate(layer, run, index, enters=enters, leaves=leaves)))
        elif not stage.layers and stage.embedding:
            swaps.append((layers, index, _End(layer, run)))
        elif not isinstance(layer, AbsentLayer):
            # Of another stage of this rank.
            swaps.append((layers, index, AbsentLayer(layer, run, index)))
    if not stage.embedding:
        swaps += [(*_place(model, path), _Silent(get_module(model, path), run)) for path in stages.before]
    return swaps
