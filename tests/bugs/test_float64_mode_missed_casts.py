"""The float64 mode missed `x.type(torch.float32)`, so DeepSeek-V3's router stayed float32, as much else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from partita.torch.collectives.comm import exactly_empty
from partita.torch.model.float64 import Float64Everywhere

X = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64) / 3
IDS = torch.tensor([[1, 2, 4]])
NARROW = torch.ones(3)

CASTS: dict[str, Callable[[Tensor], Tensor]] = {
    "float": lambda x: x.float(),
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "to a dtype": lambda x: x.to(torch.float32),
    "to a dtype by keyword": lambda x: x.to(dtype=torch.bfloat16),
    "to a device and a dtype": lambda x: x.to("cpu", torch.float32),
    "to another tensor": lambda x: x.to(NARROW),
    "to another tensor by keyword": lambda x: x.to(tensor=NARROW),
    "type of a dtype": lambda x: x.type(torch.float32),
    "type of a name": lambda x: x.type("torch.FloatTensor"),
    "type of a class": lambda x: x.type(torch.FloatTensor),
    "type of another tensor": lambda x: x.type_as(NARROW),
}


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_keeps_every_digit(cast: str) -> None:
    with Float64Everywhere():
        got, of_ids = CASTS[cast](X), CASTS[cast](IDS)
    assert got.dtype == of_ids.dtype == torch.float64
    assert torch.equal(got, X)
    assert torch.equal(of_ids, IDS.double())


COMPUTED: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
    "softmax": (lambda: X.softmax(-1, torch.float32), X.softmax(-1)),
    "functional softmax": (lambda: F.softmax(X, -1, dtype=torch.float32), X.softmax(-1)),
    "sum": (lambda: X.sum(-1, dtype=torch.float32), X.sum(-1)),
    "mean": (lambda: torch.mean(X, -1, dtype=torch.float32), X.mean(-1)),
    "cumsum": (lambda: X.cumsum(-1, dtype=torch.float32), X.cumsum(-1)),
    "router": (lambda: F.linear(X.type(torch.float32), X.type(torch.float32)), F.linear(X, X)),
    "zeros": (lambda: torch.zeros(1, 3, dtype=torch.float32).index_add_(0, torch.tensor([0]), X), X),
    "zeros of the default dtype": (lambda: torch.zeros(1, 3).index_add_(0, torch.tensor([0]), X), X),
    "zeros like": (lambda: torch.zeros_like(X, dtype=torch.float32).index_add_(0, torch.tensor([0]), X), X),
    "new zeros": (lambda: X.new_zeros((1, 3), dtype=torch.bfloat16).index_add_(0, torch.tensor([0]), X), X),
    "arange": (lambda: X @ torch.arange(3, dtype=torch.float32), X @ torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)),
    "a number": (lambda: torch.matmul(X, torch.tensor([0.5] * 3)), X.sum(-1) / 2),
    "a quotient of integers": (lambda: torch.matmul(X, IDS[0] / 2), X @ IDS[0].double() / 2),
    "complex": (lambda: torch.fft.ifft(torch.fft.fft(X.type(torch.complex64))).real, X),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPUTED)
def test_what_is_computed_is_exact(name: str) -> None:
    compute, expected = COMPUTED[name]
    with Float64Everywhere():
        got = compute()
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-15, atol=1e-15)


def test_views_and_changes_in_place_stay() -> None:
    narrow = torch.zeros(4)
    with Float64Everywhere():
        narrow[1:3].add_(1)
        bits = NARROW.view(torch.int32).view(torch.float32)
        received = exactly_empty((2,), torch.float32, torch.device("cpu"))
    assert narrow.tolist() == [0, 1, 1, 0]
    assert torch.equal(bits, NARROW)
    assert received.dtype == torch.float32
