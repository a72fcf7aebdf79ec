"""The layers of one stage: a model's own layers, and stand-ins for the layers of other stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from partita.errors import ModelError
from partita.mlx.layers.inner import copy_module, dense_width
from partita.mlx.model.tree import children


@dataclass(frozen=True)
class Message:
    """Message from a stage to the next.

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


class Left(BaseException):
    """Ends a forward with the output of the stage's last layer. Not an `Exception`, so `except Exception` misses it."""

    def __init__(self, message: Message) -> None:
        super().__init__()
        self.message = message


@dataclass
class StageRun:
    """The stage that is running.

    Attributes:
        received: The message of the previous stage.
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

    def __init__(self, module: nn.Module, run: StageRun) -> None:
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

    def __init__(self, layer: nn.Module, run: StageRun, index: int) -> None:
        super().__init__(layer, run)
        self.index = index

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Pass on."""
        hidden = self.run.call(self.index, args, kwargs)
        return hidden if self.run.received is None else self.run.received.value


class AbsentModule(_Elsewhere):
    """A module outside of the layers that another rank has: zeros in place of an embedding, else what it is given."""

    def __init__(self, module: nn.Module, run: StageRun) -> None:
        super().__init__(module, run)
        self.stand_in = _stand_in(module, run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Create the stand-in for `module`."""
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


def _stand_in(module: nn.Module, run: StageRun) -> Callable[..., Any]:
    """Replaces a module before the layers in the forward of a stage without the embedding."""
    inner = module.get("embedding", module.get("linear", module))
    if isinstance(inner, (nn.Embedding, nn.QuantizedEmbedding)):
        width = dense_width(inner)
        return lambda ids, *args, **kwargs: mx.zeros((*ids.shape, width), _dtype(run))
    if isinstance(inner, (nn.Linear, nn.QuantizedLinear)):
        outputs = int(inner["weight"].shape[0])
        return lambda x, *args, **kwargs: mx.zeros((*x.shape[:-1], outputs), x.dtype)
    return lambda *args, **kwargs: args[0] if args else next(iter(kwargs.values()), None)


def _dtype(run: StageRun) -> mx.Dtype:
    return run.received.arrays[0].dtype if run.received is not None else mx.float32


class Stand:
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


class Gate(Stand):
    """A layer of the stage: lets in what was received before the first, and out what the last returns."""

    def __init__(self, layer: Any, run: StageRun, index: int, *, enters: bool, leaves: bool) -> None:
        super().__init__(layer)
        self.run, self.index, self.enters, self.leaves = run, index, enters, leaves

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer, on what was received where it is the first, and end the forward where it is the last."""
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
            raise Left(_opened(output))
        return output


class End(Stand):
    """The first layer, where a stage has the embedding alone: what would enter it leaves."""

    def __init__(self, layer: Any, run: StageRun) -> None:
        super().__init__(layer)
        self.run = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """End the forward with what would enter the next layer."""
        raise Left(Message((self.run.call(0, args, kwargs),)))


class Silent(Stand):
    """A module before the layers, while a stage runs that is not with the embedding; as a tied head it is itself."""

    def __init__(self, module: Any, run: StageRun) -> None:
        super().__init__(module)
        self.stand_in = _stand_in(module, run)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Create the stand-in for `module`."""
        return self.stand_in(*args, **kwargs)


def _opened(output: Any) -> Message:
    if isinstance(output, mx.array):
        return Message((output,))
    values = output if isinstance(output, (tuple, list)) and output and output[0] is not None else (output,)
    if all(value is None or isinstance(value, mx.array) for value in values):
        arrays = tuple(value for value in values if value is not None)
        return Message(arrays, tuple(value is not None for value in values))
    raise ModelError("its layers hand on more than arrays.")
