"""What concerns the heads of all tensor ranks: attention weights that a model returns, and masks with a row for each head.

A model of transformers returns the attention weights `[batch, heads, queries, keys]` of each layer on request. Each rank
computes those of its own heads. They are gathered where they leave the innermost model around the attention modules. A mask
with a row for each head is narrowed to the rank's own heads where it enters that model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from partita.core.plan import Plan
from partita.core.split import Split
from partita.errors import ModelError
from partita.torch.comm import Communicator
from partita.torch.mappings import copy_to, gather_from


def gather_attentions(model: nn.Module, plan: Plan, comm: Communicator) -> None:
    """Let every model in `model` return the attention weights of all heads, and take masks of all heads."""
    if comm.size == 1:
        return
    heads: dict[str, set[Split]] = {}
    for path, attention in plan.attention.items():
        heads.setdefault(innermost_model(model, path), set()).add(attention.heads)
    for path, splits in heads.items():
        module = model.get_submodule(path)
        hooks = _Hooks(tuple(sorted(splits, key=lambda split: split.size)), comm)
        module.register_forward_pre_hook(hooks.enter, prepend=True, with_kwargs=True)
        module.register_forward_hook(hooks.leave, with_kwargs=True)


def innermost_model(model: nn.Module, path: str) -> str:
    """The path of the innermost model of transformers around a module; the whole model's where there is none."""
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
    """The `return_dict` of a call that is answered with a tuple, once attention weights are found by their names."""


class _Hooks:
    """Around the forward of one model, whose attention modules count heads by one of `splits`."""

    def __init__(self, splits: tuple[Split, ...], comm: Communicator) -> None:
        self.splits, self.comm = splits, comm

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give masks of each head this rank's heads, and let what is returned have names."""
        parameters = inspect.signature(type(module).forward).parameters.values()
        names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        changed = {name: self._own_heads(value) for name, value in given.items() if "mask" in name}
        if asks_for(module, given, "output_attentions") and not asks_for(module, given, "return_dict"):
            changed["return_dict"] = _AsTuple()
        changed = {name: value for name, value in changed.items() if value is not given.get(name)}
        place = next((place for place, name in enumerate(names[: len(args)]) if name in changed), len(args))
        return args[:place], {**dict(zip(names[place:], args[place:], strict=False)), **kwargs, **changed}

    def _own_heads(self, mask: Any) -> Any:
        if isinstance(mask, Mapping):
            return {name: self._own_heads(part) for name, part in mask.items()}
        if not isinstance(mask, Tensor) or mask.dim() != 4:
            return mask
        if mask.requires_grad:
            # Each rank sees what its own heads contribute to the gradient.
            mask = copy_to(mask, self.comm)
        split = next((s for s in self.splits if s.size == mask.shape[1] > 1), None)
        if split is None:
            return mask
        ((start, stop),) = split.ranges(self.comm.rank)
        return mask[:, start:stop]

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Gather the attention weights of an output, whatever else is in it."""
        from transformers.utils import ModelOutput

        if not isinstance(output, ModelOutput):
            return output
        for name in [name for name in output if name.endswith("attentions")]:
            output[name] = self._whole(output[name], name, type(module).__name__)
        return output.to_tuple() if isinstance(kwargs.get("return_dict"), _AsTuple) else output

    def _whole(self, value: Any, name: str, family: str) -> Any:
        parts = list(_tensors(value))
        if not parts:
            return value
        # Every rank must see the same: what is gathered is decided by the shapes of all.
        shapes: list[Any] = self.comm.all_gather_object([tuple(t.shape) for t in parts])
        whole = []
        for place, tensor in enumerate(parts):
            counts = tuple(rank[place][1] if len(rank[place]) > 2 else 0 for rank in shapes)
            split = next((s for s in self.splits if s.local_sizes == counts), None)
            if split is not None:
                tensor = gather_from(tensor, self.comm, 1, counts)
            elif any(count != s.size for s in self.splits for count in counts):
                raise ModelError(
                    f"{name} of {family} has the shape {tuple(tensor.shape)}. Its second dimension is "
                    "not the number of heads, so the ranks' parts cannot be gathered. Leave it out, or use tp=1."
                )
            whole.append(tensor)
        return _with_tensors(value, iter(whole))


def asks_for(model: nn.Module, given: Mapping[str, Any], name: str) -> bool:
    """Whether a call of a model of transformers with the arguments `given` asks for `name`, or its config does."""
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
