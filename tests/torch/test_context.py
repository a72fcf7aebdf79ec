"""Context parallelism: the same losses, norms and weights as with whole sequences, or a refusal that names the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from partita.errors import ModelError, PlanError
from partita.torch.collectives.groups import single_groups
from partita.torch.load import load
from partita.torch.model.parts import local_tensors, plan_of
from partita.torch.new import fresh
from partita.torch.train import TrainSettings, train
from partita.training import Saves
from tests.support.models import CONFIGS
from tests.support.ranks import ranks

SETTINGS = TrainSettings(
    steps=3, batch_size=4, sequence_length=13, microbatches=2, learning_rate=3e-3, warmup_steps=1, clip_norm=0.5
)
_TOKENS = torch.arange(900) ** 2 % 23
AUXILIARY = {**CONFIGS["qwen3-moe"], "output_router_logits": True}
CONVOLUTIONS = {
    "model_type": "lfm2", "vocab_size": 101, "hidden_size": 56, "intermediate_size": 37, "num_hidden_layers": 2,
    "num_attention_heads": 7, "num_key_value_heads": 7, "layer_types": ["conv", "full_attention"],
    "block_auto_adjust_ff_dim": False,
}  # fmt: skip
BLOOM = {"model_type": "bloom", "vocab_size": 101, "hidden_size": 56, "n_layer": 2, "n_head": 7}
_BERT_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def _settings(**more: Any) -> TrainSettings:
    return TrainSettings(**{**SETTINGS.__dict__, **more})


def _trained(data: dict[str, Any], mesh: dict[str, int], more: dict[str, Any]) -> tuple[Any, ...]:
    where: dict[str, Any] = dict(mesh) if mesh else {"groups": single_groups()}
    model = fresh(data, dtype="float64", seed=3, **where)
    reports = train(model, _TOKENS, _settings(**more))
    plan, _ = plan_of(model)
    norms = {
        name: float(tensor.detach().square().sum())
        for name, tensor in local_tensors(model, plan).items()
        if plan.tensor(name).split is None
    }
    return [r.loss for r in reports], [r.grad_norm for r in reports], norms, [r.tokens for r in reports]


CASES = {
    "cp 2": ("llama-7-heads-1-kv", {"cp": 2}, {}),
    "cp 2 x tp 2": ("qwen2-14-heads-2-kv", {"cp": 2, "tp": 2}, {}),
    "cp 2 x pp 2": ("mistral", {"cp": 2, "pp": 2}, {"schedule": "zb-h1"}),
    "cp 2 x dp 2 with the optimizer distributed": ("llama-7-heads-1-kv", {"cp": 2, "dp": 2}, {"zero": True}),
    "cp 3, experts": ("qwen3-moe", {"cp": 3}, {}),
    "cp 2, experts with an auxiliary loss": ("auxiliary", {"cp": 2}, {}),
    "cp 2, recomputed": ("mistral", {"cp": 2}, {"checkpointing": "full"}),
    "cp 2, attention recomputed": ("llama-7-heads-1-kv", {"cp": 2}, {"checkpointing": "selective"}),
    "cp 4, learned positions": ("gpt2", {"cp": 4}, {}),
    "cp 2, both directions": ("bert-masked-lm", {"cp": 2}, {}),
}


def _data(name: str) -> dict[str, Any]:
    data = AUXILIARY if name == "auxiliary" else CONFIGS[name]
    dropouts = {"gpt2": ("attn_pdrop", "resid_pdrop", "embd_pdrop"), "bert-masked-lm": _BERT_DROPOUTS}
    return {**data, **dict.fromkeys(dropouts.get(name, ()), 0.0)}


@pytest.mark.parametrize("case", CASES)
def test_trains_as_with_whole_sequences(case: str) -> None:
    name, mesh, more = CASES[case]
    losses, norms, weights, tokens = ranks(1).run(_trained, _data(name), {}, {})[0]
    tolerance = 1e-5 if name in ("qwen3-moe", "auxiliary") else 1e-11  # a router computes in float32
    size = 1
    for ranks_of_axis in mesh.values():
        size *= ranks_of_axis
    for theirs in ranks(size).run(_trained, _data(name), mesh, more):
        assert theirs[0] == pytest.approx(losses, rel=tolerance)
        assert theirs[1] == pytest.approx(norms, rel=tolerance)
        assert theirs[3] == tokens
        for parameter, value in theirs[2].items():
            assert value == pytest.approx(weights[parameter], rel=tolerance), parameter


def _refused(data: dict[str, Any], mesh: dict[str, int], more: dict[str, Any]) -> str:
    try:
        train(fresh(data, seed=0, **mesh), _TOKENS, _settings(**more))
    except (ModelError, PlanError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("data", "more", "why"),
    [
        (CONVOLUTIONS, {}, "cannot be trained with cp=2"),
        (BLOOM, {}, "cannot be trained with cp=2"),
        (CONFIGS["llama-7-heads-1-kv"], {"sequence_length": 1}, "a sequence of 1 tokens cannot be split over cp=2"),
    ],
)
def test_refuses_what_it_cannot_compute(data: dict[str, Any], more: dict[str, Any], why: str) -> None:
    for found in ranks(2).run(_refused, data, {"cp": 2}, more):
        assert why in found


def _saved_and_loaded(folder: str) -> tuple[list[float], list[float]]:
    model = fresh(CONFIGS["llama-7-heads-1-kv"], dtype="float64", seed=3, cp=2)
    train(model, _TOKENS, SETTINGS, saves=Saves(Path(folder), every=2))
    again = load(Path(folder), dtype="float64", groups=single_groups())
    mine = {name: tensor.detach() for name, tensor in local_tensors(model, plan_of(model)[0]).items()}
    pairs = [(mine[name], tensor) for name, tensor in again.named_parameters() if name in mine]
    assert pairs
    return [float((one - other.detach()).abs().max()) for one, other in pairs], [0.0] * len(pairs)


def test_saves_the_unsplit_model_once(tmp_path: Path) -> None:
    for differences, zeros in ranks(2).run(_saved_and_loaded, str(tmp_path / "run")):
        assert differences == zeros
