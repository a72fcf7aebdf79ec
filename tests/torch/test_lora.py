"""LoRA on split layers, ours and peft's, against the same adapter on the unsplit layer or model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from partita.core.sharding.split import Split
from partita.errors import ModelError
from partita.torch import (
    ColumnParallelLinear,
    Communicator,
    LoraLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    shard,
)
from partita.torch.model.parts import unsplit_name
from partita.torch.new import fresh
from partita.torch.weights.adapters import add_lora
from tests.support.compare import assert_equal, draw, part, world
from tests.support.models import CONFIGS
from tests.support.ranks import on, ranks

F64 = torch.float64


# --- our adapter --------------------------------------------------------------------------------------------------------


def adapters(layer: ColumnParallelLinear | RowParallelLinear) -> tuple[Tensor, Tensor]:
    """The unsplit `lora_A` and `lora_B` of a layer."""
    lora = layer.linear
    a, b = lora.lora_A.weight.detach(), lora.lora_B.weight.detach()  # type: ignore[union-attr]
    if isinstance(layer, RowParallelLinear):
        return layer.comm.gather_split(a, 1, layer.split), b
    return a, layer.comm.gather_split(b, 0, layer.split)


def lora_by_formula(put_on: str) -> None:
    comm = world()
    if put_on == "lora_rank":
        column = ColumnParallelLinear(
            6, 9, gather_output=False, init_type="biased_normal", lora_rank=3, group=comm, dtype=F64
        )
        row = RowParallelLinear(
            9, 5, input_is_parallel=True, init_type="biased_normal", lora_rank=3, group=comm, dtype=F64
        )
        alpha = 3.0
    else:
        # Ranks that have drawn different numbers must agree on the adapter nevertheless.
        column = ColumnParallelLinear(6, 9, gather_output=False, init_type="biased_normal", group=comm, dtype=F64)
        row = RowParallelLinear(9, 5, input_is_parallel=True, init_type="biased_normal", group=comm, dtype=F64)
        torch.manual_seed(100 + comm.rank)
        alpha = 7.0
        column.linear, row.linear = LoraLinear(column.linear, 3, alpha), LoraLinear(row.linear, 3, alpha)
        assert comm.all_gather(torch.rand(1)).unique().numel() == 1, "the generators have parted"
        torch.manual_seed(1)
    weights = {"up": column.master_weight, "up_bias": column.master_bias, "down": row.master_weight}
    x = draw(2, 4, 6).requires_grad_()
    base = F.linear(F.gelu(F.linear(x, weights["up"], weights["up_bias"])), weights["down"], row.bias)
    assert_equal(row(F.gelu(column(x))), base, what="a fresh adapter")
    # Something to compare: the same unsplit B on every rank, each its part.
    up_b, down_b = draw(9, 3), draw(5, 3)
    with torch.no_grad():
        column.linear.lora_B.weight.copy_(part(up_b, 0, column.split.ranges(comm.rank)))  # type: ignore[union-attr, operator]
        row.linear.lora_B.weight.copy_(down_b)  # type: ignore[union-attr, operator]
    (up_a, _), (down_a, _) = adapters(column), adapters(row)
    assert float(up_a.abs().max()) <= 6**-0.5  # Kaiming's bound, by the unsplit inputs
    assert float(down_a.abs().max()) <= 9**-0.5
    whole = [t.clone().requires_grad_() for t in (up_a, up_b, down_a, down_b)]
    other = x.detach().clone().requires_grad_()
    scale = alpha / 3

    def unsplit(x: Tensor) -> Tensor:
        a, b, c, d = whole
        h = F.gelu(F.linear(x, weights["up"], weights["up_bias"]) + scale * (x @ a.T @ b.T))
        return F.linear(h, weights["down"], row.bias) + scale * (h @ c.T @ d.T)

    weight = draw(2, 4, 5)
    y, expected = row(F.gelu(column(x))), unsplit(other)
    assert_equal(y, expected)
    (y**2 * weight).sum().backward()
    (expected**2 * weight).sum().backward()
    assert_equal(x.grad, other.grad, what="dx")
    for name, found, true in (
        ("up A", column.linear.lora_A.weight.grad, whole[0].grad),  # type: ignore[union-attr]
        ("up B", column.linear.lora_B.weight.grad, part(whole[1].grad, 0, column.split.ranges(comm.rank))),  # type: ignore[arg-type, union-attr]
        ("down A", row.linear.lora_A.weight.grad, part(whole[2].grad, 1, row.split.ranges(comm.rank))),  # type: ignore[arg-type, union-attr]
        ("down B", row.linear.lora_B.weight.grad, whole[3].grad),  # type: ignore[union-attr]
    ):
        assert_equal(found, true, what=name)  # type: ignore[arg-type]
    assert column.weight.grad is None
    assert not column.weight.requires_grad


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("put_on", ["lora_rank", "afterwards"])
def test_lora_on_column_and_row(put_on: str, size: int) -> None:
    on(size, lora_by_formula, put_on)


def sequence_parallel_lora() -> None:
    comm = world()
    up, down = nn.Linear(6, 9, dtype=F64), nn.Linear(9, 6, dtype=F64)
    column = ColumnParallelLinear.from_linear(up, comm, sequence_parallel=True)
    row = RowParallelLinear.from_linear(down, comm, sequence_parallel=True)
    column.linear, row.linear = LoraLinear(column.linear, 2), LoraLinear(row.linear, 2)
    whole = nn.Sequential(LoraLinear(up, 2), LoraLinear(down, 2))
    bs = draw(9, 2), draw(6, 2)
    with torch.no_grad():
        column.linear.lora_B.weight.copy_(part(bs[0], 0, column.split.ranges(comm.rank)))  # type: ignore[operator, union-attr]
        row.linear.lora_B.weight.copy_(bs[1])  # type: ignore[operator, union-attr]
        for lora, layer, b in zip(whole, (column, row), bs, strict=True):
            lora.lora_A.weight.copy_(adapters(layer)[0])  # type: ignore[operator, union-attr]
            lora.lora_B.weight.copy_(b)  # type: ignore[operator, union-attr]
    x, weight = draw(2, 2 * comm.size, 6), draw(2, 2 * comm.size, 6)
    y, expected = row(column(x.chunk(comm.size, 1)[comm.rank])), whole(x)
    assert_equal(y, expected.chunk(comm.size, 1)[comm.rank])
    (y**2 * weight.chunk(comm.size, 1)[comm.rank]).sum().backward()
    (expected**2 * weight).sum().backward()
    assert_equal(column.linear.lora_A.weight.grad, whole[0].lora_A.weight.grad, what="A of the column layer")  # type: ignore[union-attr, arg-type]
    assert_equal(row.linear.lora_B.weight.grad, whole[1].lora_B.weight.grad, what="B of the row layer")  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("size", [2, 3])
def test_lora_with_sequence_parallelism(size: int) -> None:
    on(size, sequence_parallel_lora)


def lora_with_copies() -> None:
    comm = world()
    split = Split.kv_heads(6, 2, comm.size, width=2)
    assert not split.is_partition
    linear = nn.Linear(5, 4, dtype=F64)
    layer = ColumnParallelLinear.from_linear(linear, comm, split)
    layer.linear = LoraLinear(layer.linear, 2)
    b = draw(4, 2)
    with torch.no_grad():
        layer.linear.lora_B.weight.copy_(part(b, 0, split.ranges(comm.rank)))  # type: ignore[operator, union-attr]
    whole = LoraLinear(linear, 2)
    whole.lora_A.weight.data.copy_(layer.linear.lora_A.weight)  # type: ignore[union-attr, arg-type]
    whole.lora_B.weight.data.copy_(b)
    x, weights = draw(3, 5), draw(comm.size, 3, 4)
    (layer(x) * part(weights[comm.rank], -1, split.ranges(comm.rank))).sum().backward()
    held = torch.zeros(comm.size, 1, 4, dtype=F64)
    for rank in range(comm.size):
        for start, stop in split.ranges(rank):
            held[rank, :, start:stop] = 1
    (whole(x) * (weights * held).sum(0)).sum().backward()
    assert_equal(layer.linear.lora_B.weight.grad, part(whole.lora_B.weight.grad, 0, split.ranges(comm.rank)))  # type: ignore[union-attr, arg-type]
    assert_equal(layer.linear.lora_A.weight.grad, whole.lora_A.weight.grad)  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("size", [3, 4])
def test_lora_on_heads_that_several_ranks_hold(size: int) -> None:
    on(size, lora_with_copies)


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, None])
def test_a_rank_that_cannot_be(rank: Any) -> None:
    with pytest.raises(ModelError, match=f"the rank of LoRA must be an integer of at least 1; got {rank!r}"):
        LoraLinear(nn.Linear(3, 3), rank)


class Biased(nn.Module):
    """An adapter of a kind that nobody knows."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.shift = nn.Parameter(torch.zeros(1))


def strange_adapters() -> None:
    comm = world()
    for layer in (ColumnParallelLinear(4, 6, group=comm), RowParallelLinear(4, 6, group=comm)):
        inner = layer.linear
        with pytest.raises(ModelError, match=r"Biased has 'shift', which cannot be split. Use LoRA or DoRA"):
            layer.linear = Biased(inner)
        assert layer.linear is inner  # as it was
    with pytest.raises(ModelError, match="an adapter on the meta device has no values yet"):
        ColumnParallelLinear(4, 6, group=comm, device="meta", lora_rank=2)
    # Weights that each rank brought by itself and that do something already.
    column = ColumnParallelLinear(4, 6, group=comm)
    lora = LoraLinear(column.linear, 2)
    nn.init.ones_(lora.lora_B.weight)
    drawn = lora.lora_A.weight.data.clone()
    lora.lora_A.weight.data += comm.rank
    with pytest.raises(ModelError, match=r"lora_A.weight must be equal on all ranks"):
        column.linear = lora
    lora.lora_A.weight.data = drawn
    column.linear = lora


def test_adapters_that_do_not_fit_are_refused_on_every_rank() -> None:
    on(2, strange_adapters)


# --- peft's -------------------------------------------------------------------------------------------------------------

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama() -> nn.Module:
    """Six heads that share two KV heads: over three ranks one rank needs both."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=31, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, initializer_range=0.4, attn_implementation="eager", tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(1)
    model: nn.Module = LlamaForCausalLM(config).double().eval()
    return model


def with_adapter(model: nn.Module, targets: Any, name: str = "default", **settings: Any) -> Any:
    import peft  # here, so that ranks which do not need it need not wait for it

    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, **settings)
    return peft.get_peft_model(model, config, name)


def both(targets: Any, true_targets: Any, **settings: Any) -> tuple[Any, Any]:
    """The split model with an adapter and the unsplit one with the same."""
    split, whole = shard(llama(), tp=Communicator().size), llama()
    pair = with_adapter(split, targets, **settings), with_adapter(whole, true_targets, **settings)
    match(*pair)
    return pair


def cut(model: nn.Module, name: str, whole: Tensor) -> Tensor:
    """This rank's part of a parameter, by its name in the split model."""
    layer: Any = None
    module: Any = model
    for step in name.split(".")[:-1]:
        module = getattr(module, step)
        if isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
            layer = module
    if layer is None:
        return whole
    dims: dict[type, dict[str, int]] = {
        ColumnParallelLinear: {"lora_B": 0, "weight": 0, "bias": 0},
        RowParallelLinear: {"lora_A": 1, "weight": 1},
        VocabParallelEmbedding: {"lora_embedding_A": 1, "weight": 0},
    }
    adapter = next((step for step in name.split(".") if step.startswith("lora_")), name.split(".")[-1])
    dim = dims[type(layer)].get(adapter)
    return whole if dim is None else part(whole, dim, layer.split.ranges(layer.comm.rank))


def match(split: nn.Module, whole: nn.Module, name: str = "") -> dict[str, nn.Parameter]:
    """Give both the same adapter, and say which parameter of the unsplit model each one of the split model is."""
    of_whole = {unsplit_name(n): p for n, p in whole.named_parameters()}
    of_split = dict(split.named_parameters())
    assert sorted(map(unsplit_name, of_split)) == sorted(of_whole), "the adapters have other names"
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for n in sorted(of_split):
            parameter, true = of_split[n], of_whole[unsplit_name(n)]
            if "lora" in n and name in n:
                true.copy_(torch.randn(true.shape, generator=generator, dtype=F64))
                parameter.copy_(cut(split, n, true))
            assert_equal(parameter, cut(split, n, true), 0, n)
    return {n: of_whole[unsplit_name(n)] for n in of_split}


def compare(split: nn.Module, whole: nn.Module, tolerance: float = 1e-12) -> int:
    """Logits, loss and every gradient."""
    ids = torch.randint(0, 31, (2, 6), generator=torch.Generator().manual_seed(3))
    y, expected = split(input_ids=ids, labels=ids), whole(input_ids=ids, labels=ids)
    assert_equal(y.logits, expected.logits, tolerance, "logits")
    assert_equal(y.loss, expected.loss, tolerance, "loss")
    split.zero_grad()
    whole.zero_grad()
    y.loss.backward()
    expected.loss.backward()
    of_whole = {unsplit_name(n): p for n, p in whole.named_parameters()}
    trained = 0
    for n, parameter in split.named_parameters():
        true = of_whole[unsplit_name(n)]
        assert parameter.requires_grad == true.requires_grad, n
        assert (parameter.grad is None) == (true.grad is None), n
        if true.grad is not None:
            trained += 1
            assert_equal(parameter.grad, cut(split, n, true.grad), tolerance, n)
    return trained


def peft_all_linear() -> None:
    split, whole = both("all-linear", "all-linear")
    assert compare(split, whole) == 2 * 2 * len(LINEARS)


def peft_names() -> None:
    split, whole = both(["q_proj", "v_proj", "down_proj"], ["q_proj", "v_proj", "down_proj"])
    assert compare(split, whole) == 12
    split, whole = both(r".*layers\.1.*\.(up|down)_proj", r".*layers\.1.*\.(up|down)_proj", use_rslora=True)
    assert compare(split, whole) == 4


def peft_embedding() -> None:
    split, whole = both(["embed_tokens"], ["embed_tokens"])
    assert compare(split, whole) == 2


def peft_starts_equal() -> None:
    comm = Communicator()
    base = llama()
    ids = torch.arange(12).view(2, 6)
    expected = base(input_ids=ids).logits
    torch.manual_seed(50 + comm.rank)
    split = with_adapter(shard(base, tp=comm.size), "all-linear")
    assert comm.all_gather(torch.rand(1)).unique().numel() == 1, "the generators have parted"
    assert_equal(split(input_ids=ids).logits, expected, what="a fresh adapter changes nothing")
    drawn = {}
    for n, p in split.named_parameters():
        if "lora_A" in n:
            layer = split.get_submodule(n.partition(".linear.")[0])
            row = isinstance(layer, RowParallelLinear)
            drawn[n] = comm.gather_split(p.detach(), 1, layer.split) if row else p.detach()
            others = comm.all_gather(drawn[n].unsqueeze(0), 0)
            assert all(torch.equal(o, drawn[n]) for o in others), n
            # As the unsplit layer's: uniform up to 1 / sqrt(inputs).
            bound = drawn[n].shape[1] ** -0.5
            assert 0.5 * bound < float(drawn[n].abs().max()) <= bound
            assert len({column.numpy().tobytes() for column in drawn[n].T}) == drawn[n].shape[1]
    # It is trained as the unsplit one from the same start.
    whole = with_adapter(llama(), "all-linear")
    of_whole = {unsplit_name(n): p for n, p in whole.named_parameters()}
    for n, tensor in drawn.items():
        of_whole[unsplit_name(n)].data.copy_(tensor)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.2) for m in (split, whole)]
    for _ in range(3):
        compare(split, whole)
        for optimizer in optimizers:
            optimizer.step()
    compare(split, whole)


def peft_second_adapter() -> None:
    import peft

    split, whole = both(["q_proj", "down_proj"], ["q_proj", "down_proj"])
    torch.manual_seed(70 + Communicator().rank)
    settings = {"r": 3, "lora_alpha": 1}
    split.add_adapter("second", peft.LoraConfig(target_modules=["q_proj", "down_proj"], **settings))
    whole.add_adapter("second", peft.LoraConfig(target_modules=["q_proj", "down_proj"], **settings))
    for model in (split, whole):
        model.set_adapter("second")
    split(input_ids=torch.arange(4).view(1, 4))  # what is whole is made equal
    match(split, whole, "second")
    assert compare(split, whole) == 8
    for model in (split, whole):
        model.set_adapter("default")
    assert compare(split, whole) == 8
    with split.disable_adapter(), whole.disable_adapter():
        ids = torch.arange(4).view(1, 4)
        assert_equal(split(input_ids=ids).logits, whole(input_ids=ids).logits)


def peft_merge() -> None:
    split, whole = both("all-linear", "all-linear")
    merged, other = split.merge_and_unload(), whole.merge_and_unload()
    assert sorted(unsplit_name(n) for n, _ in merged.named_parameters()) == sorted(
        n for n, _ in other.named_parameters()
    )
    ids = torch.arange(12).view(2, 6)
    assert_equal(merged(input_ids=ids).logits, other(input_ids=ids).logits)


def peft_modules_to_save() -> None:
    # peft deep-copies these layers; copies of heads must go on having their gradients summed.
    keys = ["k_proj", "v_proj", "lm_head"]
    split, whole = both(["down_proj"], ["down_proj"], modules_to_save=keys)
    assert compare(split, whole) == 4 + 5


def deep_copy() -> None:
    split = copy.deepcopy(shard(llama(), tp=Communicator().size))
    assert compare(split, llama()) == 2 * 9 + 3


def frozen_then_trained() -> None:
    split = shard(llama().requires_grad_(False), tp=Communicator().size)
    assert not any(p.requires_grad for p in split.parameters())
    assert compare(split.requires_grad_(True), llama()) == 2 * 9 + 3


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    "check",
    [
        peft_all_linear, peft_names, peft_embedding, peft_starts_equal, peft_second_adapter, peft_merge,
        peft_modules_to_save, deep_copy, frozen_then_trained,
    ],
)  # fmt: skip
def test_peft_on_a_split_model_equals_peft_on_the_unsplit_one(check: Callable[[], None], size: int) -> None:
    pytest.importorskip("peft")
    ranks(size).run(check)


def refused_by_name() -> None:
    import peft

    comm = Communicator()
    warnings.simplefilter("ignore")  # peft's own, on methods that we refuse

    def put_on(config: Any) -> None:
        peft.get_peft_model(shard(llama().float(), tp=comm.size), config)

    for settings, why in (
        ({"bias": "all"}, "bias='all' does not work"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices=\[1\] does not work"),
        ({"target_parameters": ["q_proj.weight"]}, r"target_parameters=\['q_proj.weight'\] does not work"),
        ({"layer_replication": [(0, 2)]}, r"layer_replication=\[\(0, 2\)\] does not work"),
        (
            {"init_lora_weights": "eva", "eva_config": peft.EvaConfig()},
            "(eva_config|init_lora_weights)=.* does not work",
        ),
    ):
        with pytest.raises(ModelError, match=f"peft's {why} on a split model.*merge it"):
            put_on(peft.LoraConfig(**{"target_modules": "all-linear", **settings}))
    for config, name in (
        (peft.LoHaConfig(target_modules=["linear"]), "LoHaModel"),
        (peft.IA3Config(target_modules=["linear"], feedforward_modules=[]), "IA3Model"),
        (peft.AdaLoraConfig(target_modules=["linear"], total_step=10), "AdaLoraModel"),
    ):
        with pytest.raises(ModelError, match=f"peft's {name} does not work on a split model. Use a LoraConfig"):
            put_on(config)
    with pytest.raises(ValueError, match=r"Target modules .*nowhere.* not found in the base model"):
        put_on(peft.LoraConfig(target_modules=["nowhere"]))


def test_other_adapters_are_refused_by_name() -> None:
    pytest.importorskip("peft")
    ranks(2).run(refused_by_name)


def _sums_of_adapters(name: str, mesh: dict[str, int]) -> dict[str, float]:
    model = fresh(CONFIGS[name], seed=1, **mesh)  # type: ignore[arg-type]
    torch.manual_seed(3)
    add_lora(model, 4)
    return {n: p.detach().double().sum().item() for n, p in model.named_parameters() if "lora_A" in n}


@pytest.mark.parametrize("name", ["llama-7-heads-1-kv", "gpt2"])
def test_adapters_do_not_depend_on_the_stages(name: str) -> None:
    alone = ranks(1).run(_sums_of_adapters, name, {})[0]
    first, last = ranks(2).run(_sums_of_adapters, name, {"pp": 2})
    assert first.keys() | last.keys() == alone.keys()
    assert {**first, **last} == alone


def options_of_add_lora(layout: dict[str, int]) -> None:
    """Targets, dropout and scale of our own adapters, in training with one seed, against one rank's."""
    from partita.torch.collectives.groups import single_groups

    config = {**CONFIGS["llama-7-heads-1-kv"], "dtype": "float64"}
    made = [fresh(config, seed=1, dtype="float64", **where) for where in (layout, {"groups": single_groups()})]
    for model in made:
        paths = add_lora(model, 4, alpha=3, seed=2, targets=["q_proj", "mlp.down_proj"], dropout=0.3, rslora=True)
        assert {path.rpartition(".")[2] for path in paths} == {"q_proj", "down_proj"}
        adapter = model.get_submodule(paths[0]).linear if layout and model is made[0] else model.get_submodule(paths[0])
        assert adapter.scaling == pytest.approx(3 / 2)  # alpha / sqrt(rank)
    ids = torch.arange(8).view(1, 8)
    for _ in range(2):
        outputs = []
        for model in made:
            torch.manual_seed(9)
            model.train()
            outputs.append(model(input_ids=ids, labels=ids))
            outputs[-1].loss.backward()
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        p -= 0.5 * p.grad
                        p.grad = None
        assert_equal(outputs[0].logits, outputs[1].logits, what="logits")
    made[1].eval()
    assert not torch.equal(outputs[1].logits, made[1](input_ids=ids).logits), "nothing was dropped"
    with pytest.raises(
        ModelError, match=r"has no linear layer nope inside model.layers to adapt. Its linear layers are down_"
    ):
        add_lora(fresh(config, seed=1, **layout), 2, targets=["nope"])
    if layout.get("tp", 1) > 1:
        with pytest.raises(
            ModelError, match=r"dropout 0.1 of adapters does not work with tp=2 on a model whose config"
        ):
            add_lora(fresh(CONFIGS["gpt2"], seed=1, **layout), 2, dropout=0.1)


def test_options_of_add_lora() -> None:
    ranks(2).run(options_of_add_lora, {"tp": 2})
