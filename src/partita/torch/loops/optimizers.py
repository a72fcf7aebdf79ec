"""Optimizers over parts of tensors: those that step each element by itself are exact, all others are refused."""

from __future__ import annotations

import weakref
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from partita.errors import ModelError
from partita.torch.layers.inner import REPLACED
from partita.torch.loops.members import model_of, split_names
from partita.torch.model.parts import plan_of
from partita.torch.training.momentum import MasterSGD, SplitMuon
from partita.torch.training.optimizer import MasterAdamW

T = TypeVar("T", bound=type[Optimizer])

_ELEMENTWISE: set[type[Optimizer]] = {
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax, torch.optim.NAdam, torch.optim.RAdam,
    torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.RMSprop, torch.optim.Rprop, torch.optim.ASGD,
    torch.optim.SparseAdam, MasterAdamW, MasterSGD, SplitMuon,
}  # fmt: skip
"""Optimizers whose step of an element depends on that element, its gradient and its state alone, or that gather the rest."""

_BY_TENSOR: set[type[Optimizer]] = {
    getattr(torch.optim, name) for name in ("Adafactor", "Muon") if hasattr(torch.optim, name)
}
"""Optimizers whose step depends on one complete tensor: right for tensors that are not split."""

_checked: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def elementwise_optimizer(cls: T) -> T:
    """Declare that an optimizer's step of each element depends on that element's gradient and state alone.

    Such an optimizer steps the parts of a split model exactly like the unsplit model. Partita knows those of torch and
    refuses all others, because a norm or a factorization of a part is not that of the tensor.

    Args:
        cls: A subclass of `torch.optim.Optimizer`.

    Returns:
        `cls`, so that it can decorate a class.

    Examples:
        >>> @pt.elementwise_optimizer
        ... class SignSGD(torch.optim.Optimizer):
        ...     pass
    """
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise ModelError(f"cls must be a subclass of torch.optim.Optimizer; got {cls!r:.100}.")
    _ELEMENTWISE.add(cls)
    return cls


def install() -> None:
    """Check every optimizer when it gets parameters of a split model, and before its first step."""
    original = Optimizer.add_param_group

    def add_param_group(self: Optimizer, param_group: dict[str, Any]) -> None:
        parameters = param_group["params"]
        if not isinstance(parameters, (Tensor, set)):
            param_group["params"] = parameters = list(parameters)
        named = [one[1] if isinstance(one, tuple) else one for one in parameters]
        check(type(self), [one for one in named if isinstance(one, Tensor)])
        original(self, param_group)
        _checked.discard(self)

    Optimizer.add_param_group = add_param_group  # type: ignore[method-assign]
    register_optimizer_step_pre_hook(_before_step)


def forget_checks() -> None:
    """Check every optimizer again, since another model was split."""
    _checked.clear()


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if optimizer not in _checked:
        check(type(optimizer), [p for group in optimizer.param_groups for p in group["params"]])
        _checked.add(optimizer)


def check(cls: type[Optimizer], parameters: list[Tensor]) -> None:
    """Raise if an optimizer of class `cls` would step `parameters` otherwise than the unsplit model's.

    Raises:
        ModelError: It needs complete tensors or all of them, or it was created before the model was split.
    """
    if any(getattr(parameter, REPLACED, False) for parameter in parameters):
        raise ModelError(
            f"{cls.__name__} was given parameters of a model that was split afterwards, which are no longer its parameters. "
            "Create the optimizer after load() or shard()."
        )
    if _steps_like(cls, _ELEMENTWISE) or is_wrapper(cls):
        return
    model = model_of(parameters)
    if model is None:
        return
    names = split_names(model, parameters)
    if _steps_like(cls, _BY_TENSOR) and not names:
        return
    plan, _ = plan_of(model)
    why = f"{names[0]} is split over tp={plan.mesh.tp}" if names else f"the model is split over pp={plan.mesh.pp}"
    raise ModelError(
        f"{cls.__name__} is not known to step each element by itself, and {why}: a norm, a factorization or a line search over "
        "one rank's part is not the unsplit model's. Use torch.optim.AdamW, SGD or another elementwise optimizer, or declare "
        f"your own with partita.torch.elementwise_optimizer({cls.__name__})."
    )


def _steps_like(cls: type[Optimizer], known: set[type[Optimizer]]) -> bool:
    """Whether `cls` is one of `known`, or inherits the `step` of one."""
    base = next((one for one in cls.__mro__ if one in known), None)
    return base is not None and (base is cls or "step" not in _overridden(cls, base))


def is_wrapper(cls: type[Optimizer]) -> bool:
    """Whether `cls` is ZeRO's optimizer, which steps by another one that is checked itself; its import emits warnings."""
    return any(base.__name__ == "ZeroRedundancyOptimizer" for base in cls.__mro__)


def _overridden(cls: type, base: type) -> set[str]:
    return {name for one in cls.__mro__[: cls.__mro__.index(base)] for name in vars(one)}
