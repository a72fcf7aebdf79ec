"""Sharded states over replicas: losses and weights are those of plain data parallel training, memory is the formulas'."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from partita.errors import DivergedError, ModelError, PlanError
from partita.torch.compile import compile_layers
from partita.torch.load import load
from partita.torch.model.parts import local_tensors, plan_of
from partita.torch.new import fresh
from partita.torch.train import TrainSettings, train
from partita.torch.training import sharded
from partita.torch.weights.adapters import add_lora
from partita.torch.weights.save import save
from partita.training.saving import Saves
from tests.support.models import CONFIGS
from tests.support.peaks import measured
from tests.support.ranks import ranks

SETTINGS = TrainSettings(
    steps=3, batch_size=8, sequence_length=12, microbatches=2, learning_rate=3e-3, warmup_steps=1, clip_norm=0.5
)


def tokens() -> Tensor:
    return torch.arange(2000) ** 2 % 23


def quiet(name: str, **changes: Any) -> dict[str, Any]:
    off = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)
    return {**CONFIGS[name], **off, **changes}


def trained(name: str, where: dict[str, Any], settings: TrainSettings, dtype: str, **changes: Any) -> tuple[Any, Any]:
    model = fresh(quiet(name, **changes), dtype=dtype, seed=3, **where)
    reports = train(model, tokens(), settings)
    assert all(p.grad is None for p in model.parameters())
    weights = {n: t.detach().clone() for n, t in local_tensors(model, plan_of(model)[0]).items()}
    return [(r.loss, r.grad_norm) for r in reports], weights


def compared(
    name: str, where: dict[str, Any], levels: tuple[int, ...], changes: dict[str, Any], dtype: str
) -> list[Any]:
    """For each level whether losses and weights equal plain ones bit for bit, and the largest relative differences."""
    found = []
    settings = replace(SETTINGS, **changes)
    layers = {"num_hidden_layers": 4, "n_layer": 4} if where.get("pp", 1) > 1 else {}
    expected, weights = trained(name, where, settings, dtype, **layers)
    for level in levels:
        lines, other = trained(name, where, replace(settings, zero=level), dtype, **layers)
        same = all(a[0] == b[0] for a, b in zip(lines, expected, strict=True)) and all(
            torch.equal(t, other[n]) for n, t in weights.items()
        )
        apart = max(abs(x / y - 1) for a, b in zip(lines, expected, strict=True) for x, y in zip(a, b, strict=True))
        far = max(float((t - other[n]).abs().max() / t.abs().max().clamp(min=1e-30)) for n, t in weights.items())
        found.append((level, same, apart, far))
    return found


EXACT: list[Any] = [
    ("llama-7-heads-1-kv", {"dp": 2}, {}, "float32"),
    pytest.param("gpt2", {"dp": 2}, {"checkpointing": True}, "bfloat16", marks=pytest.mark.slow),
    pytest.param("qwen3-moe", {"dp": 2}, {"optimizer": "sgd"}, "float32", marks=pytest.mark.slow),
    pytest.param("opt", {"dp": 2}, {"autocast": "bfloat16"}, "float32", marks=pytest.mark.slow),
    pytest.param("llama-biases-tied", {"dp": 2}, {"master_dtype": "model"}, "bfloat16", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "where", "changes", "dtype"), EXACT, ids=str)
def test_bit_for_bit(name: str, where: dict[str, Any], changes: dict[str, Any], dtype: str) -> None:
    """Two replicas add in one order only. The norm is summed by shards in float64, and rounds its last bit otherwise."""
    for found in ranks(2).run(compared, name, where, (1, 2, 3), {"microbatches": 1, **changes}, dtype):
        assert [same for _, same, _, _ in found] == [True] * 3, found
        assert max(apart for _, _, apart, _ in found) <= 1e-14


MESHES: list[Any] = [
    ("llama-biases-tied", {"dp": 2, "pp": 2}, {"schedule": "zb-h1"}),
    *(
        pytest.param(*one, marks=pytest.mark.slow)
        for one in (
            ("llama-7-heads-1-kv", {"dp": 2, "tp": 2}, {}),
            ("llama-biases-tied", {"dp": 2, "tp": 2}, {}),
            ("qwen3-moe", {"dp": 2, "tp": 2}, {"checkpointing": "selective"}),
            ("llama-biases-tied", {"dp": 2, "pp": 2}, {"schedule": "1f1b", "checkpointing": True}),
            ("gpt2", {"dp": 2, "pp": 2}, {"schedule": "gpipe"}),
            ("gpt2", {"dp": 2, "pp": 2, "vpp": 2}, {"schedule": "interleaved-1f1b", "checkpointing": True}),
            ("gpt2", {"dp": 2, "pp": 2, "vpp": 2, "placement": "v"}, {"schedule": "zb-v"}),
            ("llama-7-heads-1-kv", {"dp": 2, "cp": 2}, {}),
            ("gpt2", {"dp": 4}, {"checkpointing": 2}),
            ("deepseek-v3", {"dp": 4}, {"checkpointing": True}),
        )
    ),
]


@pytest.mark.parametrize(("name", "where", "changes"), MESHES, ids=str)
def test_meshes(name: str, where: dict[str, Any], changes: dict[str, Any]) -> None:
    """In float64. Level 3 sums over the replicas after each micro-batch, so its order of sums differs."""
    # AdamW divides gradients by their own size and epsilon; a small one would blow up the rounding of small gradients.
    for found in ranks(4).run(compared, name, where, (1, 2, 3), {"epsilon": 1e-4, **changes}, "float64"):
        assert max(max(apart, far) for _, _, apart, far in found) <= 1e-12, found


def adapted(level: int) -> tuple[list[float], list[str], list[float], int]:
    """Losses and weights of adapters on a frozen model, and the elements that a replica holds after a step."""
    torch.manual_seed(11)
    model = fresh(quiet("llama-7-heads-1-kv"), dtype="float64", seed=3, dp=2)
    add_lora(model, 4, alpha=8)
    held: list[int] = []
    reports = train(
        model,
        tokens(),
        replace(SETTINGS, zero=level),
        on_step=lambda _: held.append(sum(map(Tensor.numel, model.parameters()))),
    )  # fmt: skip
    changed = [(n, float(p.detach().abs().sum())) for n, p in model.named_parameters()]
    return [r.loss for r in reports], [n for n, _ in changed], [value for _, value in changed], held[-1]


@pytest.mark.slow
def test_frozen_weights_with_adapters() -> None:
    losses, names, values, whole = ranks(2).run(adapted, 0)[0]
    for level in (2, 3):
        for found, theirs, other, held in ranks(2).run(adapted, level):
            assert found == pytest.approx(losses, rel=1e-12)
            assert theirs == names
            assert other == pytest.approx(values, rel=1e-12)
            assert held == whole if level == 2 else abs(held - whole / 2) < 0.01 * whole


def bytes_held(level: int, shape: dict[str, Any]) -> tuple[int, int, float]:
    """Parameters, and the bytes of parameters, gradients and optimizer state after backward; and the loss of an evaluation."""
    model = fresh(quiet("llama-7-heads-1-kv", **shape), dtype="bfloat16", seed=3, dp=4)
    count = sum(p.numel() for p in model.parameters())
    settings = replace(SETTINGS, zero=level, microbatches=2, steps=2)
    held: list[int] = []

    def measure(inner: Any) -> None:
        tensors = [*model.parameters()] + [p.grad for p in model.parameters() if p.grad is not None]
        for group in inner.param_groups:
            for shard in group["params"]:
                tensors += [shard] if shard.grad is None else [shard, shard.grad]
                tensors += [t for t in inner.state[shard].values() if t.dim()]
        held.append(sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()))

    step = sharded.ShardedOptimizer.step

    def measured(self: Any) -> None:
        measure(self.inner)
        step(self)

    sharded.ShardedOptimizer.step = measured  # type: ignore[method-assign]
    try:
        reports = train(model, tokens(), settings, eval_data=tokens()[:400])
    finally:
        sharded.ShardedOptimizer.step = step  # type: ignore[method-assign]
    assert reports[-1].eval_loss is not None
    return count, held[-1], reports[-1].eval_loss


@pytest.mark.parametrize(
    "shape",
    [
        {"num_hidden_layers": 1},
        pytest.param({"hidden_size": 112, "vocab_size": 307}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_bytes_are_those_of_the_formulas(shape: dict[str, Any]) -> None:
    """After the second step's backward, when the optimizer has its state: for four replicas within 5 %."""
    losses = []
    for level, formula in (
        (1, lambda p: 4 * p + 12 * p / 4),
        (2, lambda p: 2 * p + 14 * p / 4),
        (3, lambda p: 16 * p / 4),
    ):
        for count, held, loss in ranks(4).run(bytes_held, level, shape):
            assert held == pytest.approx(formula(count), rel=0.05), level
            losses.append(loss)
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-2)
    assert losses[:8] == [losses[0]] * 8


def order_of_gathers(checkpointing: bool) -> list[str]:
    """What a replica starts to gather, and which layer it computes, in the first step."""
    model: Any = fresh(quiet("llama-7-heads-1-kv", num_hidden_layers=3), dtype="float64", seed=3, dp=2)
    events: list[str] = []
    layer_of = {name: name.split("layers.")[1][0] for name, _ in model.named_parameters() if "layers." in name}
    start, gathering = sharded.start_gathering, sharded.ShardedOptimizer._enters_backward

    def started(slots: Any) -> Any:
        if slots[0].name in layer_of:
            events.append(f"gather {layer_of[slots[0].name]}")
        return start(slots)

    def backward(self: Any, unit: Any) -> None:
        gathering(self, unit)
        events.append(f"backward {layer_of[unit.slots[0].name]}")

    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, index=index: events.append(f"forward {index}"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded, "start_gathering", started)
        patch.setattr(sharded.ShardedOptimizer, "_enters_backward", backward)
        train(model, tokens(), replace(SETTINGS, zero=3, microbatches=1, steps=1, checkpointing=checkpointing))
    return events


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_layer_is_gathered_while_the_one_before_it_computes(checkpointing: bool) -> None:
    for events in ranks(2).run(order_of_gathers, checkpointing):
        assert events[:6] == ["gather 0", "gather 1", "forward 0", "gather 2", "forward 1", "forward 2"]
        after = [event for event in events[6:] if not event.startswith("forward")]
        assert after == ["gather 2", "gather 1", "backward 2", "gather 0", "backward 1", "backward 0"]


def refused(settings: dict[str, Any], changes: dict[str, Any], compiled: bool) -> str:
    model = fresh({**quiet("opt"), **changes}, dtype="float32", seed=3, dp=2)
    if compiled:
        compile_layers(model)
    with pytest.raises((PlanError, ModelError)) as error:
        train(model, tokens(), replace(SETTINGS, **settings))
    return str(error.value)


@pytest.mark.parametrize(
    ("settings", "changes", "compiled", "message"),
    [
        ({"zero": 2, "optimizer": "muon"}, {}, False, "muon orthogonalizes unsplit matrices. Use optimizer adamw"),
        ({"zero": 3}, {"layerdrop": 0.1}, False, "layerdrop=0.1 skips other layers on each replica"),
        pytest.param({"zero": 3}, {}, True, "which a compiled layer cannot. Use zero=2", marks=pytest.mark.slow),
    ],
)
def test_what_is_refused(settings: dict[str, Any], changes: dict[str, Any], compiled: bool, message: str) -> None:
    assert all(message in said for said in ranks(2).run(refused, settings, changes, compiled))


@pytest.mark.parametrize("value", [4, -1, "2", 0.5])
def test_other_levels_are_refused(value: Any) -> None:
    with pytest.raises(PlanError, match=f"zero must be 0, 1, 2 or 3, but is {value!r}"):
        TrainSettings(zero=value)
    assert TrainSettings(zero=True).zero == 1


def diverged(level: int) -> tuple[str, bool]:
    """The message, and whether the parameters are complete."""
    model = fresh(quiet("gpt2"), dtype="float32", seed=3, dp=2)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    with pytest.raises(DivergedError) as error:
        train(model, tokens(), replace(SETTINGS, zero=level, learning_rate=1e30, warmup_steps=0))
    return str(error.value), all(p.shape == shapes[n] and p.grad is None for n, p in model.named_parameters())


@pytest.mark.slow
def test_a_run_that_diverges_names_the_same_and_leaves_parameters_complete() -> None:
    expected = ranks(2).run(diverged, 0)
    for level in (2, 3):
        assert ranks(2).run(diverged, level) == expected


def kept(where: dict[str, Any], folder: str, name: str, changes: dict[str, Any]) -> tuple[list[bool], list[float]]:
    """Whether a model of which each replica keeps its shards trains, is saved and resumes as a complete one; and what it takes
    at once to load it, to hold it after training and to save it, as fractions of its complete parameters."""
    settings = replace(SETTINGS, zero=3, steps=2)
    whole: Any = fresh(quiet(name, **changes), dtype="bfloat16", seed=3, **where)
    size = sum(p.numel() * p.itemsize for p in whole.parameters())
    save(whole, f"{folder}/start")
    expected = train(whole, tokens(), settings)
    save(whole, f"{folder}/expected")
    with measured() as loading:
        model: Any = load(f"{folder}/start", zero=3, **where)
    with pytest.raises(ModelError, match=r"cannot be called, only be trained with zero=3 and saved"):
        model(input_ids=tokens()[None, :4])
    with pytest.raises(PlanError, match=r"Use zero=3 in both, or in neither"):
        train(model, tokens(), replace(settings, zero=2))
    found = train(model, tokens(), settings, saves=Saves(Path(folder) / "run", every=1))
    held = sum(p.untyped_storage().nbytes() for p in model.parameters())
    with measured() as saving:
        save(model=model, folder=f"{folder}/found")
    begun = Path(folder) / "run" / "step-000001"
    resumed = train(load(begun, zero=3, **where), tokens(), settings, resume=begun)
    made: Any = fresh(quiet(name, **changes), dtype="bfloat16", seed=3, zero=3, **where)
    save(made, f"{folder}/made")
    lines = [[(r.loss, r.grad_norm) for r in one] for one in (expected, found, resumed)]
    fractions = [loading[0] / size, held / size, saving[0] / size]
    return [lines[1] == lines[0], lines[2][-1] == lines[0][-1]], fractions


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "where", "changes"),
    [
        pytest.param("llama-biases-tied", {"dp": 2}, {"num_hidden_layers": 6}, marks=pytest.mark.ci),
        ("llama-7-heads-1-kv", {"dp": 2, "tp": 2}, {"num_hidden_layers": 6}),
        ("llama-biases-tied", {"dp": 2, "pp": 2}, {"num_hidden_layers": 6}),
        ("llama-7-heads-1-kv", {"cp": 2}, {"num_hidden_layers": 6}),
        ("qwen3-moe", {"dp": 4, "ep": 2}, {}),
    ],
    ids=str,
)
def test_no_rank_ever_holds_the_complete_model(
    name: str, where: dict[str, int], changes: dict[str, Any], tmp_path: Path
) -> None:
    """From loading to saving; files and losses are those of the complete model."""
    size = math.prod(n for axis, n in where.items() if axis not in ("ep", "etp"))
    for same, (loading, held, saving) in ranks(size).run(kept, where, str(tmp_path), name, changes):
        assert same == [True, True]
        assert held < 0.55
        assert loading < 0.7
        assert saving < 0.7
    for one, other in (("found", "expected"), ("made", "start"), ("run/step-000002", "expected")):
        files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in (one, other)]
        assert files[0] == files[1], one
