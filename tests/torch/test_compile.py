"""`torch.compile` of split models: the same outputs and gradients as without it, collectives included, and no rank waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from partita.core.mesh import Mesh
from partita.errors import PartitaError, PlanError
from partita.ranks.liveness import ME
from partita.schedule import build
from partita.torch.collectives.comm import Communicator
from partita.torch.collectives.groups import make_groups, single_groups
from partita.torch.collectives.mappings import gather_from
from partita.torch.compile import compile_layers
from partita.torch.layers.linear import ColumnParallelLinear, RowParallelLinear
from partita.torch.layers.loss import vocab_parallel_cross_entropy
from partita.torch.load import shard
from partita.torch.model.parts import plan_of
from partita.torch.new import fresh
from partita.torch.stages.pipeline import Pipeline
from partita.torch.weights.adapters import add_lora
from tests.support.compare import assert_equal
from tests.support.ranks import ranks
from tests.torch.test_stage import deep, unsplit_of

pytestmark = pytest.mark.timeout(120)

IDS = torch.arange(12).view(2, 6)
QUIET = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "summary_first_dropout": 0.0}
DROPPING = {**QUIET, "attn_pdrop": 0.3, "resid_pdrop": 0.2}


def model_of(name: str, layers: int = 1, dtype: str = "float64", **where: Any) -> nn.Module:
    """A split model with so few layers; `gpt2-dropping` has dropout."""
    data = deep(name.removesuffix("-dropping"), layers)
    if data["model_type"] == "gpt2":
        data |= DROPPING if name.endswith("-dropping") else QUIET
    if data["model_type"] == "mixtral":
        data |= {"intermediate_size": 48}  # whose half the grouped kernels take
    return shard(unsplit_of(data, dtype), **(where or {"tp": 2})).train()


def layers_of(model: nn.Module) -> list[nn.Module]:
    plan, _ = plan_of(model)
    return [layer for name, layer in model.get_submodule(plan.spec.layers).named_children() if name.isdigit()]


def step(model: nn.Module, ids: Tensor = IDS, call: Any = None) -> dict[str, Tensor]:
    """The logits and all gradients, of `call` if it is not the model itself."""
    torch.manual_seed(7)
    model.zero_grad()
    logits = (model if call is None else call)(input_ids=ids, use_cache=False).logits
    logits.square().mean().backward()
    return {"logits": logits.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_equal(actual[name], tensor, tolerance, name)


@contextmanager
def counted() -> Iterator[list[str]]:
    """What this rank waits in, in order."""
    calls: list[str] = []
    plain = ME.begin

    def counting(call: str) -> None:
        calls.append(call)
        plain(call)

    ME.begin = counting  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        del ME.begin


# --- layers of models -----------------------------------------------------------------------------------------------------


def _layers(name: str, dtype: str, backend: str, full: bool) -> None:
    torch._dynamo.reset()
    model = model_of(name, dtype=dtype)
    step(model)  # the first call also compares the ranks' inputs
    with counted() as plain_calls:
        expected = step(model)
    for layer in layers_of(model):
        layer.compile(backend=backend, fullgraph=full)
    first = step(model)
    with counted() as calls:
        second = step(model)
    # float32: compilers sum in another order.
    tolerance = 1e-12 if dtype == "float64" else 1e-5
    assert_same(first, expected, tolerance)
    assert_same(second, expected, tolerance)
    assert calls == plain_calls


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama-7-heads-1-kv", "float64"), ("qwen3", "float64"), ("qwen2-14-heads-2-kv", "float64"), ("gpt2", "float64"),
     ("mixtral", "float32")],
)  # fmt: skip
def test_a_layer_is_one_graph_with_the_same_gradients(name: str, dtype: str) -> None:
    ranks(2).run(_layers, name, dtype, "aot_eager", True)


def test_dropout_is_the_same() -> None:
    ranks(2).run(_layers, "gpt2-dropping", "float64", "aot_eager", False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-7-heads-1-kv", "gpt2"])
def test_with_inductor(name: str) -> None:
    ranks(2).run(_layers, name, "float32", "inductor", True)


@pytest.mark.slow
def test_over_open_mpi() -> None:
    pytest.importorskip("mpi4py")
    ranks(2, "mpi").run(_layers, "llama-7-heads-1-kv", "float64", "aot_eager", True)


# --- ranks compile at different times -------------------------------------------------------------------------------------


def _alone() -> list[int]:
    torch._dynamo.reset()
    model = model_of("llama-7-heads-1-kv", layers=2)
    lengths = (6, 5, 6, 3)
    expected = [step(model, IDS[:, :length]) for length in lengths]
    for layer in layers_of(model):
        layer.compile(backend="aot_eager", fullgraph=True)
    compiled = []
    torch._dynamo.utils.counters.clear()
    for length, want in zip(lengths, expected, strict=True):
        if torch.distributed.get_rank() == 1 and length == 6:
            torch._dynamo.reset()
        assert_same(step(model, IDS[:, :length]), want)
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return compiled


def test_a_rank_may_compile_alone() -> None:
    first, second = ranks(2).run(_alone)
    assert first[0] == second[0] == 1  # both layers share a graph
    assert first[-1] < second[-1]


# --- whole models, stages, adapters ---------------------------------------------------------------------------------------


def _whole() -> None:
    torch._dynamo.reset()
    model = model_of("llama-7-heads-1-kv")
    expected = step(model)
    assert_same(step(model, call=torch.compile(model, backend="aot_eager")), expected)


def test_a_whole_model() -> None:
    ranks(2).run(_whole)


def _stages() -> None:
    torch._dynamo.reset()
    model = model_of("llama-7-heads-1-kv", layers=4, tp=1, pp=2)
    expected = step(model)
    for layer in layers_of(model):
        layer.compile(backend="aot_eager", fullgraph=True)
    assert_same(step(model), expected)


def test_the_layers_of_stages() -> None:
    ranks(2).run(_stages)


def _adapters() -> None:
    torch._dynamo.reset()
    model = model_of("llama-7-heads-1-kv")
    add_lora(model, 2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.constant_(parameter, 0.1)
    expected = step(model)
    for layer in layers_of(model):
        layer.compile(backend="aot_eager", fullgraph=True)
    assert_same(step(model), expected)


def test_adapters() -> None:
    ranks(2).run(_adapters)


# --- single layers --------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A region with sequence parallelism and one whose input and output are whole."""

    def __init__(self, comm: Communicator) -> None:
        super().__init__()
        self.comm = comm
        over: dict[str, Any] = {"group": comm, "dtype": torch.float64, "sequence_parallel": True}
        self.up = ColumnParallelLinear(6, 6, gather_output=False, **over)
        self.down = RowParallelLinear(6, 6, input_is_parallel=True, **over)
        self.whole = ColumnParallelLinear(6, 5, group=comm, dtype=torch.float64)
        self.again = RowParallelLinear(5, 7, group=comm, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.up(x).relu())
        return self.again(self.whole(gather_from(x, self.comm, 1)))


def _run(call: Callable[..., Tensor], module: nn.Module, x: Tensor, *more: Any) -> dict[str, Tensor]:
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = call(x, *more)
    y.square().sum().backward()
    grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **grads}  # type: ignore[dict-item]


def _regions() -> None:
    torch._dynamo.reset()
    comm = make_groups(Mesh(tp=2)).tp
    block = Block(comm)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for length in (2, 3, 4):  # the second compiles for any length
        x = torch.randn(2, length, 6, dtype=torch.float64)
        assert_same(_run(compiled, block, x), _run(block, block, x))


def test_regions_of_every_kind() -> None:
    ranks(2).run(_regions)


def _loss() -> None:
    torch._dynamo.reset()
    comm = make_groups(Mesh(tp=2)).tp
    head = ColumnParallelLinear(6, 11, gather_output=False, group=comm, dtype=torch.float64)
    target = torch.tensor([3, 10, -100, 0])

    def loss(x: Tensor, target: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy(head(x), target, comm, head.split, label_smoothing=0.1)

    x = torch.randn(4, 6, dtype=torch.float64)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert_same(_run(compiled, head, x, target), _run(loss, head, x, target))
    with pytest.raises(RuntimeError, match="outside the vocabulary of 11"):
        compiled(x, target + 1)


def test_the_loss() -> None:
    ranks(2).run(_loss)


# --- what is refused ------------------------------------------------------------------------------------------------------


def _one_rank_lacks_a_compiler() -> str:
    from torch._inductor import config

    model = model_of("llama-7-heads-1-kv")
    with config.patch({"cpp.cxx": ("/none",)} if torch.distributed.get_rank() == 1 else {}):
        try:
            compile_layers(model)
        except PartitaError as error:
            return f"{type(error).__name__}: {error}"
    return "compiled"


@pytest.mark.slow
def test_a_rank_without_a_compiler_fails_all() -> None:
    first, second = ranks(2).run(_one_rank_lacks_a_compiler)
    assert first.startswith("PeerFailed")
    assert second.startswith("ModelError")
    assert "Install g++" in first
    assert "Install g++" in second


def test_schedules_that_separate_weight_gradients_are_refused() -> None:
    model = fresh(deep("llama-7-heads-1-kv", 1), groups=single_groups())
    for layer in layers_of(model):
        layer.compile(backend="eager")
    with pytest.raises(PlanError, match="zero-bubble schedules"):
        Pipeline(model, build("zb-h1", 1, 2))
