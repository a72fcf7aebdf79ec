"""Training: the same losses, gradient norms and weights whatever the mesh."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from partita.errors import PlanError
from partita.torch.collectives.groups import single_groups
from partita.torch.model.parts import local_tensors, plan_of
from partita.torch.new import fresh
from partita.torch.train import TrainSettings, train
from partita.torch.weights.adapters import add_lora, merge_lora
from tests.support.batches import batch
from tests.support.models import CONFIGS
from tests.support.ranks import ranks

SETTINGS = TrainSettings(
    steps=5, batch_size=8, sequence_length=12, microbatches=2, learning_rate=3e-3, warmup_steps=2, clip_norm=0.5
)
_TOKENS = 2000


def _tokens() -> torch.Tensor:
    return torch.arange(_TOKENS) ** 2 % 23


def _trained(data: dict[str, Any], mesh: tuple[int, int] | None, checkpointing: bool) -> tuple[Any, ...]:
    quiet = {**data, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if data["model_type"] == "gpt2" else data
    where = {"groups": single_groups()} if mesh is None else {"tp": mesh[0], "dp": mesh[1]}
    model = fresh(quiet, dtype="float64", seed=3, **where)
    settings = TrainSettings(**{**SETTINGS.__dict__, "checkpointing": checkpointing})
    reports = train(model, _tokens(), settings)
    plan, _ = plan_of(model)
    norms = {
        n: float(t.detach().square().sum())
        for n, t in local_tensors(model, plan).items()
        if plan.tensor(n).split is None
    }
    return [r.loss for r in reports], [r.grad_norm for r in reports], norms


@pytest.mark.parametrize("name", ["qwen2-14-heads-2-kv", "gpt2", "qwen3-moe"])
def test_all_meshes_lie_on_one_line(name: str) -> None:
    losses, norms, weights = ranks(2).run(_trained, CONFIGS[name], None, False)[0]
    assert losses[-1] < losses[0]
    # Two steps of routing in float32 inside the model leave more than rounding; dense models leave rounding only.
    tolerance = 1e-5 if "moe" in name else 1e-11
    for size, mesh in ((2, (2, 1)), (3, (3, 1)), (4, (2, 2))):
        for their_losses, their_norms, their_weights in ranks(size).run(_trained, CONFIGS[name], mesh, size == 4):
            assert their_losses == pytest.approx(losses, rel=tolerance)
            assert their_norms == pytest.approx(norms, rel=tolerance)
            assert their_weights
            for parameter, value in their_weights.items():
                assert value == pytest.approx(weights[parameter], rel=tolerance), parameter


def _dropout_keeps_ranks_together() -> list[float]:
    model = fresh({**CONFIGS["gpt2"], "attn_pdrop": 0.3}, tp=3, seed=3)
    train(model, _tokens(), TrainSettings(steps=3, batch_size=4, sequence_length=12))
    plan, _ = plan_of(model)
    return [float(t.detach().sum()) for n, t in local_tensors(model, plan).items() if plan.tensor(n).split is None]


def test_dropout_inside_a_split_attention_leaves_replicated_weights_equal() -> None:
    first, *others = ranks(3).run(_dropout_keeps_ranks_together)
    assert first
    assert all(other == first for other in others)


def _lora(tp: int | None) -> tuple[list[float], list[float]]:
    where = {"groups": single_groups()} if tp is None else {"tp": tp}
    torch.manual_seed(11)
    model = fresh(CONFIGS["llama-7-heads-1-kv"], dtype="float64", seed=3, **where)
    add_lora(model, 4, alpha=8)
    losses = [r.loss for r in train(model, _tokens(), SETTINGS)]
    merge_lora(model)
    with torch.no_grad():
        return losses, model(input_ids=torch.arange(5).view(1, 5)).logits.flatten().tolist()


def test_lora_trains_the_same_on_any_mesh_and_merges() -> None:
    losses, logits = ranks(2).run(_lora, None)[0]
    for tp in (2, 3):
        for their_losses, their_logits in ranks(tp).run(_lora, tp):
            assert their_losses == pytest.approx(losses, rel=1e-11)
            assert their_logits == pytest.approx(logits, rel=1e-9, abs=1e-11)


def test_data_order_depends_on_seed_and_step_alone() -> None:
    tokens = torch.arange(100)
    whole = torch.cat([batch(tokens, step, 4, 8, seed=1) for step in range(3)])
    assert torch.equal(whole[:12, 0].sort().values, torch.arange(12) * 8)
    assert torch.equal(batch(tokens, 1, 4, 8, seed=1), whole[4:8])
    assert not torch.equal(batch(tokens, 0, 4, 8, seed=2), whole[:4])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, but is 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number of at least 0"),
        ({"autocast": "int8"}, "autocast must be bfloat16"),
    ],
)
def test_settings_are_checked(change: dict[str, Any], text: str) -> None:
    with pytest.raises(PlanError, match=text):
        TrainSettings(**change)
