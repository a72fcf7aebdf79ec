"""Entering a split region: sibling column layers share one entry, and its all-reduce overlaps with their weight gradients.

Backward of a region's entry, for column layers i with the same input x:

    [1] dx_i = dy_i @ W_i          each layer; dy_i is kept
    [2] start the all-reduce of dx = sum of dx_i
    [3] dW_i = dy_i.T @ x          each layer, while [2] runs
    [4] wait for [2]

Of the nodes that are ready, autograd runs the one created last. So the forward creates the nodes in the order [4], [3],
[2], [1]; another order would give the same result without the overlap.
Source: Megatron-LM's `LinearWithGradAccumulationAndAsyncCommunication`, which uses one node per layer.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from partita.torch.collectives.comm import Communicator, Work
from partita.torch.collectives.mappings import copy_to, reduce_from
from partita.torch.layers.dropout import RegionRandomness

OVERLAP_MACS = 1 << 24
"""Regions of fewer multiplications than this (tokens x inputs x outputs) finish before an overlap pays for its nodes."""


class _Later:
    """Tensors that [1] stores for [3], and [2] for [4]; empty if second-order gradients are requested."""

    def __init__(self) -> None:
        self.work: Work | None = None
        self.grad: Tensor | None = None
        self.input: Tensor | None = None
        self.backward = -1
        """The autograd run that stored `grad`: a run without weight gradients leaves it behind."""

    def take(self) -> tuple[Tensor, Tensor] | None:
        """The gradient and the input of [1] in this autograd run, if [1] has run."""
        grad, x = self.grad, self.input
        self.grad = self.input = None
        if grad is None or x is None or self.backward != torch._C._current_graph_task_id():
            return None
        return grad, x


class _Wait(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, later: _Later) -> Tensor:
        ctx.later = later
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.later.work is not None:
            ctx.later.work.wait()
            ctx.later.work = None
        return grad, None


class _Start(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, later: _Later, comm: Communicator) -> Tensor:
        ctx.later, ctx.comm = later, comm
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return reduce_from(grad, ctx.comm), None, None
        # Only this node uses the gradient that [1] computed, so it may be summed in place.
        grad = grad.contiguous()
        ctx.later.work = ctx.comm.start_all_reduce_(grad)
        return grad, None, None


class _WeightGradient(Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, later: _Later) -> Tensor:
        ctx.later = later
        ctx.set_materialize_grads(False)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, given: Tensor | None) -> tuple[Tensor | None, ...]:
        # The incoming gradient comes from second-order gradients.
        left = ctx.later.take()
        if left is None:
            return given, None
        grad = _weight_gradient(*left)
        return grad if given is None else grad + given, None


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, later: _Later) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.later = later
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        weight_grad = None
        if ctx.needs_input_grad[1]:
            if torch.is_grad_enabled():
                weight_grad = _weight_gradient(grad, x)
            else:
                later = ctx.later
                later.grad, later.input, later.backward = grad, x, torch._C._current_graph_task_id()
        bias_grad = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return grad @ weight if ctx.needs_input_grad[0] else None, weight_grad, bias_grad, None


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    return grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])


class RegionInput:
    """The shared entry of sibling column layers that take the same input into their region.

    Query, key and value projections share their input; entering once means one sum over the ranks in backward instead of
    three.
    """

    def __init__(self, comm: Communicator, users: int = 1, randomness: RegionRandomness | None = None) -> None:
        """Create the entry of `users` layers that are called in turn with the same tensor."""
        self.comm = comm
        self.randomness = randomness
        self.users = users
        self.layers: list[nn.Module] = []
        self._input: Tensor | None = None
        self._entered: Tensor | None = None
        self._weights: dict[int, tuple[Tensor, _Later]] = {}
        self._version = -1
        self._left = 0

    def __deepcopy__(self, memo: dict[int, object]) -> RegionInput:
        """An entry for the copies of its layers, without overlap: a copied layer must not keep references to its siblings."""
        twin = RegionInput(self.comm, self.users, copy.deepcopy(self.randomness, memo))
        memo[id(self)] = twin
        return twin

    def join(self, layer: nn.Module) -> None:
        """Count a column layer among the users; its inner layer is its attribute `linear`."""
        self.layers.append(layer)

    def apply(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The output of the inner layer of `layer` for `x`, whose gradient is summed over the ranks once for all users.

        This holds for users that pass the same tensor object in turn.
        """
        if layer.training and self.randomness is not None:
            self.randomness.enter(x)
        compute = layer._compute
        if self.comm.size == 1 or not (torch.is_grad_enabled() and x.requires_grad):
            return compute(x)  # type: ignore[operator, no-any-return]
        if self._left and self._input is x and self._version == _version(x):
            self._left -= 1
        else:
            if self._left:
                # The siblings have different inputs; waiting for them would keep a graph alive.
                self.users = 1
            self._enter(x)
        entered, weights = self._entered, self._weights
        assert entered is not None
        if not self._left:
            self._input = self._entered = None
            self._weights = {}
        if weights and id(layer) in weights:  # compiled layers share a graph as long as it depends on no id
            weight, later = weights[id(layer)]
            return _Linear.apply(entered, weight, layer.linear.bias, later)  # type: ignore[union-attr, no-any-return]
        return compute(entered)  # type: ignore[operator, no-any-return]

    def _enter(self, x: Tensor) -> None:
        self._weights = {}
        if self._overlaps(x):
            later = _Later()
            waited = _Wait.apply(x, later)
            for layer in self.layers:
                own = _Later()
                self._weights[id(layer)] = (_WeightGradient.apply(layer.linear.weight, own), own)  # type: ignore[union-attr]
            self._entered = _Start.apply(waited, later, self.comm)
        else:
            self._entered = copy_to(x, self.comm)
        self._input, self._version, self._left = x, _version(x), self.users - 1

    def _overlaps(self, x: Tensor) -> bool:
        """Whether all users are plain linear layers with enough work to overlap with the all-reduce."""
        if torch.compiler.is_compiling():
            # The backward is one graph then, and its order is the compiler's.
            return False
        if self.users != len(self.layers) or torch.is_autocast_enabled(x.device.type):
            return False
        inner: list[Any] = [layer.linear for layer in self.layers]
        plain = all(layer._is_plain for layer in self.layers)
        return plain and sum(x.numel() * linear.out_features for linear in inner) >= OVERLAP_MACS


def _version(x: Tensor) -> int:
    """The number of changes of `x` in place, which is unknown while a graph is compiled."""
    return 0 if torch.compiler.is_compiling() else x._version
