"""AdamW over arrays by name, step by step what `torch.optim.AdamW` does.

Source: Loshchilov and Hutter 2019, 1711.05101.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import mlx.core as mx

from partita.mlx.trainable import Trainable

BETAS = (0.9, 0.95)


@dataclass
class AdamW:
    """The optimizer's state of what this rank trains.

    Attributes:
        weight_decay: Of arrays of two dimensions or more.
        epsilon: Added to what is divided by.
        steps: Steps done, by name. They differ only after a run of torch, where an array may be without a gradient for a while.
        means: Running means of the gradients, by name.
        squares: Running means of their squares.
    """

    weight_decay: float
    epsilon: float
    steps: dict[str, int] = field(default_factory=dict)
    means: dict[str, mx.array] = field(default_factory=dict)
    squares: dict[str, mx.array] = field(default_factory=dict)

    def step(self, trainable: Trainable, gradients: Mapping[str, mx.array], learning_rate: float) -> None:
        """Give the model new parameters, evaluated one at a time."""
        beta1, beta2 = BETAS
        for name, (home, key) in trainable.homes.items():
            steps = self.steps[name] = self.steps.get(name, 0) + 1
            size = learning_rate / (1 - beta1**steps)
            scale = (1 - beta2**steps) ** 0.5
            gradient = gradients[name]
            mean = self.means.get(name, mx.zeros_like(gradient))
            square = self.squares.get(name, mx.zeros_like(gradient))
            mean = mean + (1 - beta1) * (gradient - mean)
            square = beta2 * square + (1 - beta2) * mx.square(gradient)
            array = home[key]
            if array.ndim >= 2:
                array = array * (1 - learning_rate * self.weight_decay)
            array = array - size * (mean / (mx.sqrt(square) / scale + self.epsilon))
            mx.eval(array, mean, square)
            self.means[name], self.squares[name] = mean, square
            home[key] = array
