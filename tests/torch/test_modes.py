"""What a call changes of a model for its own duration."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from partita.torch.model.modes import attributes_at_hand


class Layer(nn.Module):
    shift: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(2, 2), nn.Parameter(torch.ones(2))
        self.register_parameter("bias", None)
        self.register_buffer("shift", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.register_buffer("shift", self.shift + 1)
        y: torch.Tensor = self.linear(x) * self.scale + self.shift
        return y if self.bias is None else y + self.bias


def test_submodules_and_parameters_are_ordinary_attributes_inside() -> None:
    model, x = nn.Sequential(Layer(), Layer()), torch.randn(3, 2)
    before = [set(vars(module)) for module in model.modules()]
    names, state = [name for name, _ in model.named_parameters()], list(model.state_dict())
    want = model(x)
    for layer in model:
        layer.register_buffer("shift", torch.zeros(2))
    with attributes_at_hand(model):
        assert "linear" in vars(model[0])
        assert vars(model[0])["scale"] is model[0].scale
        assert torch.equal(model(x), want)
        assert ([name for name, _ in model.named_parameters()], list(model.state_dict())) == (names, state)
    assert [set(vars(module)) for module in model.modules()] == before


def test_what_is_set_inside_stays() -> None:
    model = nn.Sequential(Layer())
    linear, scale = nn.Linear(2, 2), nn.Parameter(torch.zeros(2))
    with attributes_at_hand(model):
        model[0].linear, model[0].scale = linear, scale
        assert model[0].linear is linear
        assert model[0].scale is scale
    assert model[0].linear is linear
    assert model[0].scale is scale
    assert torch.equal(model(torch.ones(1, 2)), torch.ones(1, 2))


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
def test_compiled_modules_stay_as_they_are() -> None:
    model = nn.Sequential(Layer(), Layer())
    model[1].compile()
    with attributes_at_hand(model):
        assert "linear" in vars(model[0])
        assert "linear" not in vars(model[1])
        assert "weight" not in vars(model[1].linear)
