"""Dropout was seeded by the replica alone: all stages, and all micro-batches of a step over stages, dropped alike."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from partita.core.mesh import Mesh
from partita.torch.collectives.groups import single_groups
from partita.torch.model.float64 import Float64Everywhere
from partita.torch.model.parts import plan_of
from partita.torch.new import fresh
from partita.torch.proof.compare import compare_parameters
from partita.torch.train import TrainSettings, train
from tests.support.mlx_ranks import BACKENDS, mlx_ranks
from tests.support.models import CONFIGS
from tests.support.ranks import ranks
from tests.torch.test_schedules import plan_for, tokens

DATA = {**CONFIGS["gpt2"], "n_layer": 4, "resid_pdrop": 0.3, "embd_pdrop": 0.2, "attn_pdrop": 0.1}
SETTINGS = TrainSettings(
    steps=2, batch_size=4, sequence_length=12, microbatches=2, learning_rate=3e-3, warmup_steps=1, epsilon=1e-4
)


def masks(mesh: dict[str, int]) -> dict[tuple[int, int], list[int]]:
    """What the residual dropout of each layer keeps, by layer and number of the call."""
    model = fresh(DATA, dtype="float64", seed=3, **mesh)
    kept: dict[tuple[int, int], list[int]] = {}

    def note(layer: int, output: Tensor) -> None:
        number = sum(1 for place, _ in kept if place == layer)
        kept[layer, number] = (output[0] != 0).flatten().int().tolist()

    for path, module in model.named_modules():
        if path.endswith("attn.resid_dropout"):
            layer = int(path.split(".")[-3])
            module.register_forward_hook(lambda _, args, output, layer=layer: note(layer, output))
    train(model, tokens(), SETTINGS)
    return kept


def test_layers_micro_batches_steps_and_replicas_drop_different_elements() -> None:
    first, second = ranks(2).run(masks, {"pp": 2})
    other = ranks(2).run(masks, {"dp": 2})
    assert len(first) == len(second) == 2 * 4
    found = [*first.values(), *second.values()]
    assert len({tuple(mask) for mask in found}) == len(found)
    assert 0.6 < np.mean(found) < 0.8
    assert other[0].keys() == other[1].keys()
    assert not any(other[0][key] == other[1][key] for key in other[0])


def apart(mesh: Mesh, kind: str, vpp: int, changes: dict[str, Any], whole: dict[str, Any]) -> tuple[float, float]:
    """How far losses and parameters are from those of one rank that has the same micro-batches."""
    with Float64Everywhere():
        unsplit = fresh(DATA, dtype="float64", seed=3, groups=single_groups())
        expected = train(unsplit, tokens(), replace(SETTINGS, **whole))
        split = fresh(DATA, dtype="float64", seed=3, plan=plan_for(DATA, mesh, kind, vpp))
        reports = train(split, tokens(), replace(SETTINGS, **changes, schedule=kind))
    loss = max(abs(a.loss / b.loss - 1) for a, b in zip(reports, expected, strict=True))
    return loss, max(one.error for one in compare_parameters(unsplit, split, *plan_of(split)))


@pytest.mark.parametrize(
    ("mesh", "kind", "vpp", "changes"),
    [
        (Mesh(pp=2), "zb-h1", 1, {}),
        (Mesh(pp=2), "interleaved-1f1b", 2, {"checkpointing": True}),
        (Mesh(dp=2), "1f1b", 1, {"microbatches": 1}),
    ],
    ids=["zb-h1", "interleaved-checkpointing", "dp2"],
)
def test_the_same_micro_batches_drop_the_same_on_every_mesh(
    mesh: Mesh, kind: str, vpp: int, changes: dict[str, Any]
) -> None:
    for loss, parameter in ranks(2).run(apart, mesh, kind, vpp, changes, {}):
        assert max(loss, parameter) <= 1e-12, (loss, parameter)


def losses_and_norms(mesh: dict[str, int], data: dict[str, Any], checkpointing: bool) -> list[tuple[float, float]]:
    model = fresh(data, dtype="float64", seed=3, **mesh)
    reports = train(model, tokens(), replace(SETTINGS, checkpointing=checkpointing))
    return [(report.loss, report.grad_norm) for report in reports]


AGAIN = {
    "gpt2": DATA,
    # Without residual dropout a layer would be computed again only up to the middle of a split region.
    "gpt2-attention-alone": {**DATA, "resid_pdrop": 0.0, "attn_pdrop": 0.3},
    "opt-attention-alone": {**CONFIGS["opt"], "dropout": 0.0, "attention_dropout": 0.3},
}


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"pp": 2}], ids=str)
@pytest.mark.parametrize("name", AGAIN)
def test_what_is_computed_again_drops_the_same(name: str, mesh: dict[str, int]) -> None:
    kept = ranks(2).run(losses_and_norms, mesh, AGAIN[name], False)
    again = ranks(2).run(losses_and_norms, mesh, AGAIN[name], True)
    for one, other in zip(kept, again, strict=True):
        for a, b in zip(one, other, strict=True):
            assert b == pytest.approx(a, rel=1e-12)


def own_loop(checkpointing: bool) -> list[list[float]]:
    """What the first layers of both stages keep when the split model is called with labels; gradients of one weight."""
    model: Any = fresh(DATA, dtype="float64", seed=3, pp=2)
    kept: list[list[float]] = []
    for path, module in model.named_modules():
        if path.endswith("attn.resid_dropout"):
            module.register_forward_hook(lambda _, args, output: kept.append((output[0] != 0).flatten().tolist()))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    ids = tokens()[:24].view(2, 12)
    torch.manual_seed(5)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
    grads = [float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None]
    return [*(kept if not checkpointing else []), grads]


def test_a_loop_of_ones_own_drops_different_elements_on_each_stage() -> None:
    stages = ranks(2).run(own_loop, False)
    found = [tuple(mask) for stage in stages for mask in stage[:-1]]
    assert len(found) == 2 * 2 * 2
    assert len(set(found)) == len(found)
    for stage, again in zip(stages, ranks(2).run(own_loop, True), strict=True):
        assert again[-1] == pytest.approx(stage[-1], rel=1e-12)


def masks_on_mlx() -> list[list[float]]:
    """What the dropout of the first adapter of this stage keeps, each time it is called."""
    import mlx.core as mx
    import mlx.nn as nn

    from partita.mlx.new import fresh as fresh_on_mlx
    from partita.mlx.train import train as train_on_mlx
    from partita.mlx.weights.adapter_places import adapters
    from partita.mlx.weights.adapters import add_lora

    kept: list[list[float]] = []

    class Noted(nn.Module):
        def __call__(self, x: mx.array) -> mx.array:
            mask = mx.random.bernoulli(0.7, x.shape)
            kept.append(mask.flatten().astype(mx.float32).tolist())
            return x * mask / 0.7

    model = fresh_on_mlx({**CONFIGS["llama-3-heads"], "num_hidden_layers": 2}, seed=3, pp=2)
    add_lora(model, 2, seed=1)
    _, _, adapter = adapters(model)[0]
    adapter.dropout = Noted()
    train_on_mlx(model, [token % 23 for token in range(500)], SETTINGS)
    return kept


def test_what_mlx_computes_again_in_backward_drops_the_same() -> None:
    first, last = mlx_ranks(2, BACKENDS[0]).run(masks_on_mlx)
    # Two steps of two micro-batches: the first stage computes each again in backward, the last one only differentiates.
    assert len(first) == 8
    assert len(last) == 4
    assert sorted(first)[::2] == sorted(first)[1::2]
    assert len({tuple(mask) for mask in [*first, *last]}) == 4 + 4
