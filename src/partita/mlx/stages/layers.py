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
        arrays: The hidden state `[batch, sequence, hidden]`, and the other arrays that a layer of the model returns.
        places: For each value of a layer's output tuple, whether it is an array (else it is None); None if a layer
            returns a bare hidden state.
    """

    arrays: tuple[mx.array, ...]
    places: tuple[bool, ...] | None = None

    @property
    def value(self) -> Any:
        """The message in the form of a layer's output."""
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
        cache: The model's cache, one entry per layer or in its family's form.
        filled: The entries that layers of this stage received.
        called: Indices of the layers that were called.
    """

    received: Message | None = None
    cache: Any = None
    filled: list[Any] = field(default_factory=list)
    called: set[int] = field(default_factory=set)

    def call(self, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> mx.array:
        """Record a call of a layer, and return its hidden state argument."""
        if index in self.called:
            raise ModelError("it runs its layers more than once per forward.")
        self.called.add(index)
        hidden = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(hidden, mx.array):
            raise ModelError("its layers do not take the hidden state as first argument.")
        return hidden


class _Elsewhere(nn.Module):
    """Stands in for a module of another rank, with the module's attributes but without its arrays."""

    def __init__(self, module: nn.Module, run: StageRun) -> None:
        super().__init__()
        # Not as an item: it must not become one of the model's modules.
        self.__dict__["_facts"] = _without_arrays(module)
        self.run = run

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """Support families that call `isinstance` on their layers."""
        return type(self.__dict__["_facts"])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.__dict__["_facts"], name)

    def __bool__(self) -> bool:
        return True


class AbsentLayer(_Elsewhere):
    """A layer of another rank: returns the received message, or its input, in the form of the layer's output."""

    def __init__(self, layer: nn.Module, run: StageRun, index: int) -> None:
        super().__init__(layer, run)
        self.index = index

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Pass the input on."""
        hidden = self.run.call(self.index, args, kwargs)
        return hidden if self.run.received is None else self.run.received.value


class AbsentModule(_Elsewhere):
    """Stand-in for another rank's module outside of the layers: returns zeros for an embedding, else its input."""

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
    """Wraps a module of this rank while a stage runs, with the module's attributes."""

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
    """A layer of the stage: the first takes the received message in, the last sends its output out."""

    def __init__(self, layer: Any, run: StageRun, index: int, *, enters: bool, leaves: bool) -> None:
        super().__init__(layer)
        self.run, self.index, self.enters, self.leaves = run, index, enters, leaves

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer, the first on the received message; the last ends the forward."""
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
    """The first layer if a stage has only the embedding: its input leaves the stage."""

    def __init__(self, layer: Any, run: StageRun) -> None:
        super().__init__(layer)
        self.run = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """End the forward with the input of the next layer."""
        raise Left(Message((self.run.call(0, args, kwargs),)))


class Silent(Stand):
    """A module before the layers while a stage without the embedding runs; as a tied head it acts normally."""

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
    raise ModelError("its layers pass on values other than arrays.")
