"""Training by every schedule: losses, gradient norms and every parameter are the unsplit run's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from partita.core.mesh import Mesh
from partita.core.plan import Plan
from partita.errors import PlanError
from partita.schedule import Timeline, measured_costs, placement_of, simulate
from partita.torch.collectives.groups import single_groups
from partita.torch.model.float64 import Float64Everywhere
from partita.torch.model.parts import plan_of
from partita.torch.model.transformers_models import build_on_meta, read_hf_config, rules_of, spec_of
from partita.torch.new import fresh
from partita.torch.proof.compare import compare_parameters
from partita.torch.train import TrainSettings, train
from partita.torch.weights.adapters import add_lora
from tests.support.models import CONFIGS
from tests.support.ranks import ranks

# AdamW divides gradients by their own size and epsilon; a small one would blow up the rounding of small gradients.
SETTINGS = TrainSettings(
    steps=20,
    batch_size=4,
    sequence_length=12,
    microbatches=4,
    learning_rate=3e-3,
    warmup_steps=2,
    clip_norm=0.5,
    epsilon=1e-4,
)
KINDS = {"gpipe": 1, "1f1b": 1, "interleaved-1f1b": 2, "zb-h1": 1, "zb-h2": 1, "zb-v": 2}


def config_of(name: str, layers: int = 4) -> dict[str, Any]:
    off = (
        "attn_pdrop",
        "resid_pdrop",
        "embd_pdrop",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "hidden_dropout",
    )
    data = {**CONFIGS[name], **dict.fromkeys(off, 0.0), "num_hidden_layers": layers, "n_layer": layers}
    if data.get("layer_types"):
        data["layer_types"] = (data["layer_types"] * layers)[:layers]
    return data


def tokens() -> torch.Tensor:
    return torch.arange(2000) ** 2 % 23


def plan_for(data: dict[str, Any], mesh: Mesh, kind: str, vpp: int) -> Plan:
    built = build_on_meta(read_hf_config(data), torch.float64)
    spec = spec_of(built)
    return Plan.make(spec, mesh, None, rules_of(built, spec), vpp=vpp, placement=placement_of(kind))


def apart(
    data: dict[str, Any], mesh: tuple[int, int, int], kinds: dict[str, int], changes: dict[str, Any]
) -> list[Any]:
    """For each kind of schedule the largest relative difference of losses and norms, and the farthest parameter."""
    found = []
    with Float64Everywhere():
        whole = fresh(data, dtype="float64", seed=3, groups=single_groups())
        settings = replace(SETTINGS, **changes)
        expected = train(whole, tokens(), replace(settings, microbatches=1, zero=False, group_size=None))
        for kind, vpp in kinds.items():
            split = fresh(data, dtype="float64", seed=3, plan=plan_for(data, Mesh(*mesh), kind, vpp))
            reports = train(split, tokens(), replace(settings, schedule=kind))
            lines = [
                max(abs(getattr(a, what) / getattr(b, what) - 1) for a, b in zip(reports, expected, strict=True))
                for what in ("loss", "grad_norm")
            ]
            plan, groups = plan_of(split)
            worst = max(compare_parameters(whole, split, plan, groups), key=lambda d: d.error)
            found.append((kind, *lines, worst.error, worst.name))
    return found


@pytest.mark.parametrize(
    "name",
    [
        "llama-biases-tied",
        "gpt2",
        "deepseek-v3",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma3", "gpt-neox", "bert-masked-lm", "qwen3-moe")),
    ],
)
def test_every_schedule_trains_like_the_unsplit_model(name: str) -> None:
    for found in ranks(2).run(apart, config_of(name), (1, 2, 1), KINDS, {}):
        for kind, loss, norm, parameter, where in found:
            # 20 steps of float64: what is left is the order of sums.
            assert max(loss, norm) <= 1e-12, (kind, loss, norm)
            assert parameter <= 1e-12, (kind, parameter, where)


@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        ((1, 2, 2), {}),
        ((2, 2, 1), {"zero": True, "batch_size": 8}),
        pytest.param((2, 2, 1), {"batch_size": 8}, marks=pytest.mark.slow),
    ],
    ids=["tp2-pp2", "dp2-pp2-zero", "dp2-pp2"],
)
def test_with_other_axes(mesh: tuple[int, int, int], changes: dict[str, Any]) -> None:
    kinds = {"1f1b": 1, "zb-v": 2}
    for found in ranks(4).run(apart, config_of("llama-biases-tied"), mesh, kinds, {**changes, "steps": 5}):
        for kind, loss, norm, parameter, where in found:
            assert max(loss, norm, parameter) <= 1e-12, (kind, loss, norm, parameter, where)


def test_micro_batches_that_pp_does_not_divide_and_groups_of_them() -> None:
    kinds = {"interleaved-1f1b": 2}
    for changes in ({"microbatches": 3, "batch_size": 6}, {"microbatches": 5, "batch_size": 5, "group_size": 3}):
        for found in ranks(2).run(apart, config_of("llama-3-heads"), (1, 2, 1), kinds, {**changes, "steps": 3}):
            for kind, loss, norm, parameter, where in found:
                assert max(loss, norm, parameter) <= 1e-12, (kind, loss, norm, parameter, where)


def lora(pp: int) -> list[float]:
    where: dict[str, Any] = {"groups": single_groups()} if pp == 1 else {"pp": pp}
    model = fresh(config_of("llama-7-heads-1-kv"), dtype="float64", seed=3, **where)
    torch.manual_seed(5)
    if pp == 1:
        add_lora(model, 4, alpha=8)
    else:
        add_lora(model, 4, alpha=8)
    return [r.loss for r in train(model, tokens(), replace(SETTINGS, steps=4, schedule="zb-h1" if pp > 1 else None))]


def test_adapters_train_over_stages() -> None:
    for losses in ranks(2).run(lora, 2):
        assert losses[-1] < losses[0]
        assert all(loss == loss for loss in losses)


def checkpointed(kept: bool) -> list[float]:
    model = fresh(config_of("llama-7-heads-1-kv"), dtype="float64", seed=3, pp=2)
    settings = replace(SETTINGS, steps=3, schedule="zb-h1", checkpointing=not kept)
    return [r.loss for r in train(model, tokens(), settings)]


def test_computing_activations_again_changes_nothing() -> None:
    assert ranks(2).run(checkpointed, True) == ranks(2).run(checkpointed, False)


def bfloat16(pp: int) -> list[float]:
    where: dict[str, Any] = {"groups": single_groups()} if pp == 1 else {"pp": pp}
    model = fresh(config_of("llama-3-heads"), dtype="float32", seed=3, **where)
    settings = replace(SETTINGS, steps=4, autocast="bfloat16", schedule="zb-h1" if pp > 1 else None)
    return [r.loss for r in train(model, tokens(), settings)]


def test_bfloat16_over_stages_is_bfloat16_on_one() -> None:
    expected = bfloat16(1)
    for losses in ranks(2).run(bfloat16, 2):
        assert losses == pytest.approx(expected, rel=2e-2)


def timeline() -> tuple[Any, ...]:
    model = fresh(config_of("llama-3-heads"), pp=2)
    seen: list[Timeline] = []
    train(model, tokens(), replace(SETTINGS, steps=2, schedule="zb-h1"), on_timeline=seen.append)
    (measured,) = seen
    predicted = simulate(measured.schedule, measured_costs(measured))
    ordered = all(a <= b for row in zip(measured.starts, measured.ends, strict=True) for a, b in zip(*row, strict=True))
    return ordered, measured.makespan > 0, predicted.makespan > 0, measured.peak_activations


def test_a_step_is_measured_as_its_schedule_has_it() -> None:
    assert ranks(2).run(timeline) == [(True, True, True, (2, 2))] * 2


def wrong(changes: dict[str, Any], vpp: int) -> str:
    model = fresh(config_of("llama-3-heads"), pp=2, vpp=vpp)
    with pytest.raises((PlanError, ValueError)) as error:
        train(model, tokens(), replace(SETTINGS, **changes))
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "vpp", "text"),
    [
        ({"microbatches": 3}, 1, "batch_size must be a multiple of dp x micro-batches"),
        ({"schedule": "zb-v"}, 2, "needs its stages placed as `v`"),
        ({"schedule": "zb-h1"}, 2, "has one stage on every rank, but vpp is 2"),
        ({"schedule": "1f2b"}, 1, "Did you mean 1f1b"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], vpp: int, text: str) -> None:
    for said in ranks(2).run(wrong, changes, vpp):
        assert text in said
