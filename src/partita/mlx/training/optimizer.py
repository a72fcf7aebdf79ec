"""AdamW over arrays by name, with the steps of `torch.optim.AdamW`; narrower arrays than float32 have master weights.

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
    """The optimizer's state of this rank's trainable arrays.

    Attributes:
        weight_decay: Weight decay of arrays of two dimensions or more.
        epsilon: Added to the denominator.
        master_dtype: Whether arrays narrower than float32 have masters and float32 moments (see `TrainSettings`).
        steps: Completed steps, by name. They differ only after a torch run, where an array may lack a gradient for some steps.
        means: Running means of the gradients, by name.
        squares: Running means of their squares.
        masters: Float32 copies of narrower arrays; the optimizer updates these.
    """

    weight_decay: float
    epsilon: float
    master_dtype: str = "float32"
    steps: dict[str, int] = field(default_factory=dict)
    means: dict[str, mx.array] = field(default_factory=dict)
    squares: dict[str, mx.array] = field(default_factory=dict)
    masters: dict[str, mx.array] = field(default_factory=dict)

    def state_dtype(self, dtype: mx.Dtype) -> mx.Dtype:
        """The dtype of the state of an array of `dtype`; if it differs, the array has a master."""
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
