"""The collectives with gradients, on real ranks, against the same computation on one."""

from __future__ import annotations

import torch

from partita.torch.comm import Communicator
from partita.torch.mappings import copy_to
from tests.support.ranks import ranks


def _copy(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    comm = Communicator()
    x = torch.arange(4.0, dtype=torch.float64, requires_grad=True)
    y = copy_to(x, comm)
    (y * (comm.rank + 1)).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def test_copy_sums_the_gradients() -> None:
    for y, grad in ranks(2).run(_copy, 2):
        assert torch.equal(y, torch.arange(4.0, dtype=torch.float64))
        assert torch.equal(grad, torch.full((4,), 3.0, dtype=torch.float64))
