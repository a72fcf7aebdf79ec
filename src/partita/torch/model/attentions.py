"""Attention weights that a model returns and masks with a row per head, which concern the heads of all tensor ranks.

A model of transformers returns the attention weights `[batch, heads, queries, keys]` of each layer on request. Each rank
computes those of its own heads. They are gathered where they leave the innermost model around the attention modules. A mask
with a row for each head is narrowed to the rank's own heads where it enters an attention module.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from partita.core.plan import Plan
from partita.core.sharding.split import Split
from partita.errors import ModelError
from partita.torch.collectives.comm import Communicator
from partita.torch.collectives.mappings import copy_to, gather_from


def gather_attentions(model: nn.Module, plan: Plan, comm: Communicator) -> None:
    """Let every model in `model` return the attention weights of all heads, and take masks of all heads."""
    if comm.size == 1:
        return
    by_model: dict[str, dict[str, Split]] = {}
    for path, attention in plan.attention.items():
        by_model.setdefault(innermost_model(model, path), {})[path] = attention.heads
    for path, heads in by_model.items():
        module = model.get_submodule(path)
        hooks = _Hooks(heads, comm, path)
        module.register_forward_pre_hook(hooks.enter, prepend=True, with_kwargs=True)
        module.register_forward_hook(hooks.leave, with_kwargs=True)


def innermost_model(model: nn.Module, path: str) -> str:
    """The path of the innermost transformers model around a module; empty if there is none."""
    from transformers import PreTrainedModel

    found, module, parts = "", model, path.split(".")
    for count, part in enumerate(parts, 1):
        child = module._modules.get(part)
        if child is None:
            break
        module = child
        if isinstance(module, PreTrainedModel):
            found = ".".join(parts[:count])
    return found


class _AsTuple:
    """The `return_dict` of a call that expects a tuple: the output is converted after attention weights are gathered."""


class _Hooks:
    """Hooks around the forward of one model; `heads` maps the paths of its attention modules to the split of their heads."""

    def __init__(self, heads: Mapping[str, Split], comm: Communicator, path: str) -> None:
        self.heads, self.comm, self.path = heads, comm, path
        self.splits = tuple(sorted(set(heads.values()), key=lambda split: split.size))
        self.narrows = False

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Make attention modules narrow masks once a mask has rows for heads, and make the output a `ModelOutput`."""
        given = by_name(module, args, kwargs)
        if not self.narrows and any(_has_heads(value) for name, value in given.items() if "mask" in name):
            self._narrow_masks(module)
        if asks_for(module, given, "output_attentions") and not asks_for(module, given, "return_dict"):
            return (), {**given, "return_dict": _AsTuple()}
        return None

    def _narrow_masks(self, module: nn.Module) -> None:
        self.narrows = True
        for path, split in self.heads.items():
            inner = path.removeprefix(f"{self.path}.") if self.path else path
            try:
                attention = module.get_submodule(inner)
            except AttributeError:
                # The layer belongs to another stage.
                continue
            narrow = _Narrow(split, self.comm)
            attention.register_forward_pre_hook(narrow.enter, prepend=True, with_kwargs=True)

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Gather the attention weights in an output."""
        from transformers.utils import ModelOutput

        if not isinstance(output, ModelOutput):
            return output
        for name in [name for name in output if name.endswith("attentions")]:
            output[name] = self._gather(output[name], name, type(module).__name__)
        return output.to_tuple() if isinstance(kwargs.get("return_dict"), _AsTuple) else output

    def _gather(self, value: Any, name: str, family: str) -> Any:
        parts = list(_tensors(value))
        if not parts:
            return value
        # All ranks must decide alike, so they decide from the shapes of all ranks.
        shapes: list[Any] = self.comm.all_gather_object([tuple(t.shape) for t in parts])
        gathered = []
        for place, tensor in enumerate(parts):
            counts = tuple(rank[place][1] if len(rank[place]) > 2 else 0 for rank in shapes)
            split = next((s for s in self.splits if s.local_sizes == counts), None)
            if split is not None:
                tensor = gather_from(tensor, self.comm, 1, counts)
            elif any(count != s.size for s in self.splits for count in counts):
                raise ModelError(
                    f"{name} of {family} has the shape {tuple(tensor.shape)}. Its second dimension is not "
                    "the number of heads, so the ranks' parts cannot be gathered. Leave it out, or use tp=1."
                )
            gathered.append(tensor)
        return _with_tensors(value, iter(gathered))


class _Narrow:
    """Narrows every mask of one attention module to the rows of this rank's heads."""

    def __init__(self, split: Split, comm: Communicator) -> None:
        self.split, self.comm = split, comm

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = by_name(module, args, kwargs)
        return (), {name: self._own(value) if "mask" in name else value for name, value in given.items()}

    def _own(self, mask: Any) -> Any:
        if not _has_heads(mask):
            return mask
        if mask.requires_grad:
            # Each rank computes only what its own heads contribute to the gradient.
            mask = copy_to(mask, self.comm)
        if mask.shape[1] != self.split.size:
            return mask
        ((start, stop),) = self.split.ranges(self.comm.rank)
        return mask[:, start:stop]


def _has_heads(mask: Any) -> bool:
    """Whether a mask concerns heads: it has a row for each, or a gradient that each contributes to."""
    if isinstance(mask, Mapping):
        return any(_has_heads(part) for part in mask.values())
    return isinstance(mask, Tensor) and mask.dim() == 4 and (mask.shape[1] > 1 or mask.requires_grad)


@functools.cache
def _signature(cls: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(cls.forward)


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `module` by their names."""
    given: dict[str, Any] = {}
    signature = _signature(type(module))  # type: ignore[arg-type]
    for name, value in list(signature.bind(module, *args, **kwargs).arguments.items())[1:]:
        given.update(value if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    return given


def asks_for(model: nn.Module, given: Mapping[str, Any], name: str) -> bool:
    """Whether a call of a transformers model with the arguments `given`, or else its config, asks for `name`."""
    value = given.get(name)
    return bool(getattr(getattr(model, "config", None), name, False) if value is None else value)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, (tuple, list)):
        return type(value)(_with_tensors(part, tensors) for part in value)
    return value
