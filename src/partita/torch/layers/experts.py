"""Complete experts on each rank: a rank computes those of its own for all tokens, and the results of the ranks are summed."""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from partita.core.sharding.split import Split
from partita.errors import ModelError
from partita.torch.collectives.comm import Communicator

_STATE = "_partita_experts"


class OwnExperts:
    """The experts of one rank, of those of a module of transformers.

    Letters: N tokens, H features, k experts of each token, E experts, of which rank r holds E_r; M_r pairs of a token and one
    of its experts that rank r holds.

        forward     y_r [N, H] = sum over k of weights [N, k] * expert_index(x [N, H]), for the E_r experts of the rank only
        backward    gradients of x and of weights that are partial, and complete ones of the rank's experts

    The module's own forward computes M_r tokens with one expert each, so that any family and any of transformers' kernels
    will do.
    Source: GShard, Lepikhin et al. 2020, 2006.16668.

    Attributes:
        start: The first expert of the rank.
        stop: The expert after its last one.
        names: The names of the module's arguments: tokens, indexes, weights.
    """

    def __init__(self, module: nn.Module, comm: Communicator, split: Split) -> None:
        """Describe the experts of this rank, of those in `module`.

        Raises:
            ModelError: The module is not called with tokens, the indexes of their experts and weights.
        """
        ((self.start, self.stop),) = split.ranges(comm.rank)
        self.names = tuple(inspect.signature(type(module).forward).parameters)[1:]
        if len(self.names) != 3:
            raise ModelError(
                f"{type(module).__name__} takes ({', '.join(self.names)}), but experts can be distributed only if they take "
                "tokens, the indexes of their experts and weights. Use tp without ep."
            )

    def __call__(self, module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The sum of the outputs of this rank's experts for each token."""
        shape, width = x.shape, x.shape[-1]
        if index.is_floating_point() or index.shape != weights.shape or index.numel() % (x.numel() // width):
            raise ModelError(
                f"{type(module).__name__} got indexes {tuple(index.shape)} ({index.dtype}) and weights {tuple(weights.shape)} "
                f"for tokens {tuple(shape)}, but ep needs one index and weight for each token and expert. Use tp without ep."
            )
        x = x.reshape(-1, width)
        tokens, chosen = x.shape[0], index.numel() // x.shape[0]
        index, weights = index.reshape(-1), weights.reshape(-1)
        (pairs,) = ((index >= self.start) & (index < self.stop)).nonzero(as_tuple=True)
        outputs = _computed(module, x[pairs // chosen], index[pairs] - self.start, weights[pairs])
        # Not added to the tokens, which is in no fixed order on GPUs.
        placed = x.new_zeros(tokens * chosen, width).index_copy(0, pairs, outputs.to(x.dtype))
        return placed.view(tokens, chosen, width).sum(1).view(shape)


def _computed(module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The module's own forward `[M, H]` for M tokens, each with the expert `index` [M].

    Without tokens, it computes one of zeros: a rank that gets no tokens takes part in backward all the same.
    """
    count = x.shape[0]
    if count == 0:
        x, index, weights = (torch.cat([t, t.new_zeros(1, *t.shape[1:])]) for t in (x, index, weights))
    output: Tensor = type(module).forward(module, x, index[:, None], weights[:, None])
    return output.reshape(-1, x.shape[-1])[:count]


def distribute_experts(module: nn.Module, comm: Communicator, split: Split) -> None:
    """Make a module of fused experts compute only this rank's, whose tensors it is about to hold."""
    vars(module)[_STATE] = OwnExperts(module, comm, split)
    for name, value in vars(module).items():
        if "expert" in name and type(value) is int and value == split.size:
            vars(module)[name] = split.local_size(comm.rank)
    module.forward = MethodType(_forward, module)


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    own: OwnExperts = vars(module)[_STATE]
    given = dict(zip(own.names, args, strict=False)) | kwargs
    return own(module, *(given[name] for name in own.names))
