"""AdamW over arrays by name, step by step what `torch.optim.AdamW` does; arrays narrower than float32 through master weights.

    gradient, in the array's dtype -> float32 -> moments -> master weight -> rounded into the array

Source: Loshchilov and Hutter 2019, 1711.05101; master weights: Micikevicius et al. 2018, 1710.03740, section 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import mlx.core as mx

from partita.mlx.model.trainable import Trainable

BETAS = (0.9, 0.95)


@dataclass
class AdamW:
    """The optimizer's state of what this rank trains.

    Attributes:
        weight_decay: Of arrays of two dimensions or more.
        epsilon: Added to what is divided by.
        master_dtype: Whether arrays narrower than float32 have masters and float32 moments (see `TrainSettings`).
        steps: Steps done, by name. They differ only after a run of torch, where an array may be without a gradient for a while.
        means: Running means of the gradients, by name.
        squares: Running means of their squares.
        masters: The float32 copies, which are stepped, of arrays narrower than that.
    """

    weight_decay: float
    epsilon: float
    master_dtype: str = "float32"
    steps: dict[str, int] = field(default_factory=dict)
    means: dict[str, mx.array] = field(default_factory=dict)
    squares: dict[str, mx.array] = field(default_factory=dict)
    masters: dict[str, mx.array] = field(default_factory=dict)

    def state_dtype(self, dtype: mx.Dtype) -> mx.Dtype:
        """The dtype of the state of an array of `dtype`; where it is another, the array has a master."""
        return mx.float32 if self.master_dtype == "float32" and dtype.size < 4 else dtype

    def step(self, trainable: Trainable, gradients: Mapping[str, mx.array], learning_rate: float) -> None:
        """Give the model new parameters, evaluated one at a time."""
        beta1, beta2 = BETAS
        for name, (home, key) in trainable.homes.items():
            steps = self.steps[name] = self.steps.get(name, 0) + 1
            size = learning_rate / (1 - beta1**steps)
            scale = (1 - beta2**steps) ** 0.5
            array = home[key]
            dtype = self.state_dtype(array.dtype)
            stepped = self.masters.get(name, array).astype(dtype)
            gradient = gradients[name].astype(dtype)
            mean = self.means.get(name, mx.zeros_like(gradient))
            square = self.squares.get(name, mx.zeros_like(gradient))
            mean = mean + (1 - beta1) * (gradient - mean)
            square = beta2 * square + (1 - beta2) * mx.square(gradient)
            if array.ndim >= 2:
                stepped = stepped * (1 - learning_rate * self.weight_decay)
            stepped = stepped - size * (mean / (mx.sqrt(square) / scale + self.epsilon))
            rounded = stepped.astype(array.dtype)
            mx.eval(rounded, stepped, mean, square)
            self.means[name], self.squares[name] = mean, square
            if dtype != array.dtype:
                self.masters[name] = stepped
            home[key] = rounded
