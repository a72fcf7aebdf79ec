"""`pipeline_auto_parallel`: an existing model, cut into a stage a rank, called as before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from partita.errors import PlanError
from partita.torch import pipeline_auto_parallel
from partita.torch.model.transformers_models import model_class, read_hf_config
from tests.support.ranks import ranks
from tests.torch.test_schedules import config_of


def called(name: str, slices: list[tuple[int, int]] | None) -> tuple[float, float, bool | None, float]:
    config = read_hf_config(config_of(name, 5))
    torch.manual_seed(0)
    whole = model_class(config)(config).eval()
    rank = torch.distributed.get_rank()
    start, stop = slices[rank] if slices is not None else (None, None)
    model = copy.deepcopy(whole)
    split = pipeline_auto_parallel(model, None, start, stop)
    assert split is model
    ids = torch.arange(14).view(2, 7)
    with torch.no_grad():
        logits = float((split(ids)[0] - whole(ids)[0]).abs().max())
        loss = float(split(input_ids=ids, labels=ids).loss - whole(input_ids=ids, labels=ids).loss)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    same = torch.equal(split.generate(ids, **options), whole.generate(ids, **options)) if "bert" not in name else None
    return logits, loss, same, sum(p.numel() for p in split.parameters()) / sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize(
    ("name", "slices"),
    [("llama-biases-tied", [(0, 1), (1, 4), (4, 5)]), ("gpt2", None), ("opt", None), ("bert-masked-lm", None)],
)
def test_every_rank_has_the_final_output(name: str, slices: list[tuple[int, int]] | None) -> None:
    for logits, loss, same, share in ranks(3).run(called, name, slices):
        # One micro-batch through the same kernels: bit-equal.
        assert (logits, loss) == (0.0, 0.0)
        assert same in (True, None)
        assert share < 0.7


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(5))
        self.leave = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x)
        return self.leave(x)


def own_module() -> tuple[float, float, list[str]]:
    torch.manual_seed(0)
    whole = Net()
    split = pipeline_auto_parallel(copy.deepcopy(whole))
    x = torch.randn(2, 4)
    for _ in range(2):  # gradients add up
        split(x).square().sum().backward()
        whole(x).square().sum().backward()
    grads = dict(whole.named_parameters())
    errors = [float((p.grad - grads[n].grad).abs().max()) for n, p in split.named_parameters()]
    return float((split(x) - whole(x)).abs().max()), max(errors), [n for n, _ in split.named_parameters()]


def test_a_module_of_ones_own_trains() -> None:
    results = ranks(3).run(own_module)
    assert [(output, grad) for output, grad, _ in results] == [(0.0, 0.0)] * 3
    assert sorted(name for _, _, names in results for name in names) == sorted(dict(Net().named_parameters()))


def refused(start: int, stop: int) -> str:
    with pytest.raises((PlanError, Exception)) as error:
        pipeline_auto_parallel(Net(), None, start, stop)
    return str(error.value)


def test_slices_must_make_up_the_model() -> None:
    for said in ranks(2).run(refused, 0, 2):
        assert "rank 1 requests layers 0 to 2" in said


def no_list() -> Any:
    with pytest.raises(Exception) as error:
        pipeline_auto_parallel(nn.Linear(2, 2))
    return str(error.value)


def test_without_a_list_of_layers() -> None:
    for said in ranks(2).run(no_list):
        assert "no list of layers" in said
