"""An optimizer that the caller of `train` created: what it must be, and its steps at the settings' schedule."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from partita.errors import ModelError, PlanError
from partita.torch.collectives.collective_errors import collective_errors, gather_from_all
from partita.torch.loops.optimizers import check, is_wrapper
from partita.torch.model.parts import plan_of
from partita.training.settings import TrainSettings
from partita.training.state import OWN_OPTIMIZER

_OF_TRAIN = (
    "optimizer", "learning_rate", "weight_decay", "epsilon", "beta1", "beta2", "momentum", "master_dtype", "zero",
)  # fmt: skip
"""The settings of the optimizer that `train` creates."""


def check_own(model: nn.Module, optimizer: Any, settings: TrainSettings) -> None:
    """Check the optimizer that the caller gave to `train`, or None. Every rank must call it.

    Raises:
        ModelError: It cannot step this rank's part of the model, or differs between ranks; on every rank.
        PlanError: The settings have values for the optimizer that `train` creates; on every rank.
    """
    _, groups = plan_of(model)
    with collective_errors(groups):
        if optimizer is not None:
            if not isinstance(optimizer, Optimizer):
                raise ModelError(
                    "optimizer must be a torch.optim.Optimizer over the split model's parameters, such as "
                    f"torch.optim.AdamW(model.parameters()); got {optimizer!r:.100}."
                )
            _check_settings(settings)
            _check_step(optimizer)
            _check_parameters(model, optimizer)
    every = gather_from_all(groups, _said(optimizer))
    for rank, one in enumerate(every):
        if one != every[0]:
            raise ModelError(
                "optimizer must be of one class, with equally many parameter groups, on every rank; got "
                f"{every[0]} on rank 0, and {one} on rank {rank}. A group of a rank may be empty: {{'params': []}}."
            )


def _said(optimizer: Optimizer | None) -> str:
    return "none" if optimizer is None else f"{type(optimizer).__name__} with {len(optimizer.param_groups)} groups"


def _check_settings(settings: TrainSettings) -> None:
    usual = TrainSettings()
    given = [name for name in _OF_TRAIN if getattr(settings, name) != getattr(usual, name)]
    if given == ["zero"]:
        raise PlanError(
            "zero shards the state of the optimizer that train creates, and cannot shard one that exists. Leave out zero, or "
            "leave out optimizer= and set TrainSettings(optimizer=...)."
        )
    if given:
        raise PlanError(
            f"{', '.join(given)} of the settings are for the optimizer that train creates, but optimizer= gives another one. "
            "Set them in its parameter groups."
        )


def _check_step(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    if is_wrapper(type(optimizer)):
        raise ModelError(
            f"{name} keeps parts of its state on several replicas, which a checkpoint does not collect. Give the optimizer "
            "without it, or leave out optimizer= and set TrainSettings(zero=True)."
        )
    closure = next(iter(inspect.signature(optimizer.step).parameters.values()), None)
    if closure is not None and closure.default is closure.empty and closure.kind is closure.POSITIONAL_OR_KEYWORD:
        raise ModelError(
            f"{name}.step needs a closure that computes the loss again, but train computes it once a step. Use an optimizer "
            "whose step takes no argument."
        )


def _check_parameters(model: nn.Module, optimizer: Optimizer) -> None:
    given = [p for group in optimizer.param_groups for p in group["params"]]
    check(type(optimizer), given)
    own, held = {id(p) for p in model.parameters()}, {id(p) for p in given}
    if held - own:
        shapes = [list(p.shape) for p in given if id(p) not in own]
        raise ModelError(
            f"{len(shapes)} parameters of optimizer, one of shape {shapes[0]}, are not the model's. Create it over the "
            "parameters of the model that train gets, after load() or shard()."
        )
    left = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if left:
        raise ModelError(
            f"optimizer leaves out {left[0]}{f' and {len(left) - 1} more' if len(left) > 1 else ''}, whose gradient the "
            "clipping would count. Give it to the optimizer, or freeze it with requires_grad_(False)."
        )


def own_names(optimizer: Optimizer | None, loss: Any) -> tuple[str, ...]:
    """What the caller gave to `train`, for `TrainingState.own`."""
    names = () if optimizer is None else (f"{OWN_OPTIMIZER}{type(optimizer).__name__}",)
    return names if loss is None else (*names, "loss")


def scaled_step(optimizer: Optimizer, factor: float) -> float:
    """Step with each group's learning rate multiplied by `factor`, and leave the groups as they were.

    Returns:
        The learning rate of the first group; 0 if it has none.
    """
    rates = [group.get("lr") for group in optimizer.param_groups]
    scaled = [rate * factor if isinstance(rate, (int, float, Tensor)) else rate for rate in rates]
    _set_rates(optimizer, scaled)
    try:
        optimizer.step()
    finally:
        _set_rates(optimizer, rates)
    return float(scaled[0]) if isinstance(scaled[0], (int, float, Tensor)) else 0.0


def _set_rates(optimizer: Optimizer, rates: list[Any]) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if rate is not None:
            group["lr"] = rate
