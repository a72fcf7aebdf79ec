"""AdamW and SGD over arrays by name, with the steps of torch's; narrower arrays than float32 have master weights.

    gradient, in the array's dtype -> float32 -> moments -> master weight -> rounded into the array

Source: Loshchilov and Hutter 2019, 1711.05101; master weights: Micikevicius et al. 2018, 1710.03740, section 3.1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import mlx.core as mx

from partita.errors import PlanError
from partita.mlx.model.trainable import Trainable
from partita.training.settings import TrainSettings


@dataclass(kw_only=True)
class Optimizer(ABC):
    """The optimizer's state of this rank's trainable arrays.

    Attributes:
        master_dtype: Whether arrays narrower than float32 have masters and float32 moments (see `TrainSettings`).
        steps: Completed steps, by name. They differ only after a torch run, where an array may lack a gradient for some steps.
        masters: Float32 copies of narrower arrays; the optimizer updates these.
    """

    master_dtype: str = "float32"
    steps: dict[str, int] = field(default_factory=dict)
    masters: dict[str, mx.array] = field(default_factory=dict)

    @property
    @abstractmethod
    def moments(self) -> dict[str, dict[str, mx.array]]:
        """The moments by their kind on disk and the array's name."""

    @abstractmethod
    def update(self, name: str, stepped: mx.array, gradient: mx.array, learning_rate: float, decay: bool) -> mx.array:
        """Update the moments of an array; returns its new value in the gradient's dtype."""

    def state_dtype(self, dtype: mx.Dtype) -> mx.Dtype:
        """The dtype of the state of an array of `dtype`; if it differs, the array has a master."""
        return mx.float32 if self.master_dtype == "float32" and dtype.size < 4 else dtype

    def step(self, trainable: Trainable, gradients: Mapping[str, mx.array], learning_rate: float) -> None:
        """Give the model new parameters, evaluated one at a time. Arrays of two dimensions or more decay."""
        for name, (home, key) in trainable.homes.items():
            self.steps[name] = self.steps.get(name, 0) + 1
            array = home[key]
            dtype = self.state_dtype(array.dtype)
            stepped = self.masters.get(name, array).astype(dtype)
            stepped = self.update(name, stepped, gradients[name].astype(dtype), learning_rate, array.ndim >= 2)
            rounded = stepped.astype(array.dtype)
            mx.eval(rounded, stepped, *(kept[name] for kept in self.moments.values()))
            if dtype != array.dtype:
                self.masters[name] = stepped
            home[key] = rounded


@dataclass
class AdamW(Optimizer):
    """AdamW.

    Attributes:
        weight_decay: Weight decay of arrays of two dimensions or more.
        epsilon: Added to the denominator.
        betas: Decay of `means` and of `squares`.
        means: Running means of the gradients, by name.
        squares: Running means of their squares.
    """

    weight_decay: float
    epsilon: float
    betas: tuple[float, float] = (0.9, 0.95)
    means: dict[str, mx.array] = field(default_factory=dict)
    squares: dict[str, mx.array] = field(default_factory=dict)

    @property
    def moments(self) -> dict[str, dict[str, mx.array]]:
        """The running means."""
        return {"exp_avg": self.means, "exp_avg_sq": self.squares}

    def update(self, name: str, stepped: mx.array, gradient: mx.array, learning_rate: float, decay: bool) -> mx.array:
        """AdamW's step."""
        beta1, beta2 = self.betas
        size = learning_rate / (1 - beta1 ** self.steps[name])
        scale = (1 - beta2 ** self.steps[name]) ** 0.5
        mean = self.means.get(name, mx.zeros_like(gradient))
        square = self.squares.get(name, mx.zeros_like(gradient))
        mean = mean + (1 - beta1) * (gradient - mean)
        square = beta2 * square + (1 - beta2) * mx.square(gradient)
        self.means[name], self.squares[name] = mean, square
        if decay:
            stepped = stepped * (1 - learning_rate * self.weight_decay)
        return stepped - size * (mean / (mx.sqrt(square) / scale + self.epsilon))


@dataclass
class SGD(Optimizer):
    """SGD with momentum, as `torch.optim.SGD`: velocity = momentum x velocity + gradient + weight decay x weight.

    Attributes:
        weight_decay: Weight decay of arrays of two dimensions or more.
        momentum: Momentum.
        velocities: The velocities, by name.
    """

    weight_decay: float
    momentum: float
    velocities: dict[str, mx.array] = field(default_factory=dict)

    @property
    def moments(self) -> dict[str, dict[str, mx.array]]:
        """The velocities."""
        return {"momentum_buffer": self.velocities}

    def update(self, name: str, stepped: mx.array, gradient: mx.array, learning_rate: float, decay: bool) -> mx.array:
        """SGD's step."""
        if decay:
            gradient = gradient + self.weight_decay * stepped
        velocity = self.velocities.get(name, mx.zeros_like(gradient)) * self.momentum + gradient
        self.velocities[name] = velocity
        return stepped - learning_rate * velocity


def make_optimizer(settings: TrainSettings) -> Optimizer:
    """The optimizer of `settings`.

    Raises:
        PlanError: This engine does not have it.
    """
    if settings.optimizer == "sgd":
        return SGD(settings.weight_decay, settings.momentum, master_dtype=settings.master_dtype)
    if settings.optimizer != "adamw":
        raise PlanError(
            f"the MLX engine does not have optimizer {settings.optimizer}. Use adamw or sgd, or the torch engine."
        )
    betas = (settings.beta1, settings.beta2)
    return AdamW(settings.weight_decay, settings.epsilon, betas, master_dtype=settings.master_dtype)
