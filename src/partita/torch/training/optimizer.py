"""Optimizers that update parameters narrower than float32 through float32 copies, the master weights.

    gradient, in the parameter's dtype -> float32 -> moments -> master weight -> rounded into the parameter

The neighbours of 1 in bfloat16 are 0.0039 and 0.0078 away, so updates of a usual learning rate would be rounded away.
Source: Micikevicius et al. 2018, 1710.03740, section 3.1; AdamW: Loshchilov and Hutter 2019, 1711.05101.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from partita.core.optimizers import ADAM_MOMENTS
from partita.training.saving import MASTER


def state_dtype(dtype: torch.dtype, master_dtype: str) -> torch.dtype:
    """The dtype of the optimizer's state of a parameter of `dtype`; if it differs, a master weight is part of the state.

    Args:
        dtype: dtype of the parameter.
        master_dtype: `TrainSettings.master_dtype`.
    """
    return torch.float32 if master_dtype == "float32" and dtype.itemsize < 4 else dtype


def state_kinds(
    dtype: torch.dtype, master_dtype: str = "float32", moments: tuple[str, ...] = ADAM_MOMENTS
) -> tuple[str, ...]:
    """Names on disk of the tensors that the optimizer keeps for a parameter of `dtype`, which has `moments`."""
    return moments if state_dtype(dtype, master_dtype) == dtype else (*moments, MASTER)


def initial_state(kind: str, parameter: Tensor, master_dtype: str = "float32") -> Tensor:
    """Initial value of one of `state_kinds`."""
    dtype = state_dtype(parameter.dtype, master_dtype)
    return parameter.detach().to(dtype) if kind == MASTER else torch.zeros_like(parameter, dtype=dtype).detach()


class Mastered(torch.optim.Optimizer):
    """An optimizer with a float32 `master`, and moments of its dtype, in the state of each narrower parameter.

    A parameter group has `master_dtype` (see `TrainSettings`).
    """

    def moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The moments of the parameters of a group."""
        raise NotImplementedError

    def update(
        self, stepped: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any], place: Tensor
    ) -> None:
        """Step a parameter's master, or the parameter `place` itself, by its gradient in the same dtype."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step one parameter at a time, so that only one gradient is held in float32."""
        for group in self.param_groups:
            master_dtype = group.get("master_dtype", "float32")
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    kinds = state_kinds(parameter.dtype, master_dtype, self.moments(group))
                    state.update((kind, initial_state(kind, parameter, master_dtype)) for kind in kinds)
                stepped = state.get(MASTER, parameter)
                self.update(stepped, parameter.grad.to(stepped.dtype), state, group, parameter)
                if stepped is not parameter:
                    parameter.copy_(stepped)


class MasterAdamW(Mastered, torch.optim.AdamW):
    """`torch.optim.AdamW` with masters."""

    def moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The running means of gradients and of their squares."""
        return ADAM_MOMENTS

    def update(
        self, stepped: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any], place: Tensor
    ) -> None:
        """AdamW's step."""
        beta1, beta2 = group["betas"]
        adamw(
            params=[stepped], grads=[grad], exp_avgs=[state["exp_avg"]], exp_avg_sqs=[state["exp_avg_sq"]],
            max_exp_avg_sqs=[], state_steps=[state["step"]], amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip
