"""AdamW that updates parameters narrower than float32 through float32 copies, the master weights.

    gradient, in the parameter's dtype -> float32 -> moments -> master weight -> rounded into the parameter

The neighbours of 1 in bfloat16 are 0.0039 and 0.0078 away, so updates of a usual learning rate would be rounded away.
Source: Micikevicius et al. 2018, 1710.03740, section 3.1; AdamW: Loshchilov and Hutter 2019, 1711.05101.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from partita.training.saving import MASTER, MOMENTS


def state_dtype(dtype: torch.dtype, master_dtype: str) -> torch.dtype:
    """The dtype of the optimizer's state of a parameter of `dtype`; if it differs, a master weight is part of the state.

    Args:
        dtype: dtype of the parameter.
        master_dtype: `TrainSettings.master_dtype`.
    """
    return torch.float32 if master_dtype == "float32" and dtype.itemsize < 4 else dtype


def state_kinds(dtype: torch.dtype, master_dtype: str = "float32") -> tuple[str, ...]:
    """Names on disk of the tensors that the optimizer keeps for a parameter of `dtype`."""
    return MOMENTS if state_dtype(dtype, master_dtype) == dtype else (*MOMENTS, MASTER)


def initial_state(kind: str, parameter: Tensor, master_dtype: str = "float32") -> Tensor:
    """Initial value of one of `state_kinds`."""
    dtype = state_dtype(parameter.dtype, master_dtype)
    return parameter.detach().to(dtype) if kind == MASTER else torch.zeros_like(parameter, dtype=dtype).detach()


class MasterAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` with float32 moments and a float32 `master` in the state of each narrower parameter.

    The state belongs to the model's parameters. So ZeRO's optimizer around it shards masters and moments alike, and sends the
    rounded parameters only.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step one parameter at a time, so that only one gradient is held in float32."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state.update((kind, initial_state(kind, parameter)) for kind in state_kinds(parameter.dtype))
                stepped = state.get(MASTER, parameter)
                adamw(
                    params=[stepped], grads=[parameter.grad.to(stepped.dtype)], exp_avgs=[state["exp_avg"]],
                    exp_avg_sqs=[state["exp_avg_sq"]], max_exp_avg_sqs=[], state_steps=[state["step"]], amsgrad=False,
                    beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
                    maximize=False,
                )  # fmt: skip
                if stepped is not parameter:
                    parameter.copy_(stepped)
