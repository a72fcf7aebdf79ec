"""The auxiliary loss of routers was refused over stages, and nothing said that micro-batches change it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from partita.core.mesh import Mesh
from partita.errors import ModelError
from partita.generation import Sampling
from partita.torch.collectives.groups import single_groups
from partita.torch.generate import generate
from partita.torch.model.float64 import Float64Everywhere
from partita.torch.model.parts import plan_of
from partita.torch.model.transformers_models import build_on_meta, read_hf_config
from partita.torch.new import fresh
from partita.torch.proof.balance_probe import balance_of
from partita.torch.proof.compare import compare_parameters
from partita.torch.train import TrainSettings, train
from tests.cli.conftest import Run, partita
from tests.cli.models import write
from tests.support.batches import batch
from tests.support.models import CONFIGS
from tests.support.ranks import on, ranks
from tests.torch.test_schedules import plan_for, tokens

COEFFICIENT = 0.5
"""So large that a wrong auxiliary loss moves every parameter."""

SETTINGS = TrainSettings(
    steps=3, batch_size=8, sequence_length=12, learning_rate=3e-3, warmup_steps=1, clip_norm=0.5, epsilon=1e-4
)
__all__ = ["partita"]

KINDS = {"gpipe": 1, "1f1b": 1, "interleaved-1f1b": 2, "zb-h1": 1, "zb-v": 2}


def config_of(name: str) -> dict[str, Any]:
    asks = {"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT, "num_hidden_layers": 4}
    dense = {"mlp_only_layers": [1]} if name == "qwen3-moe" else {}
    return {**CONFIGS[name], **asks, **dense}


def apart(name: str, mesh: Mesh, kinds: dict[str, int], changes: dict[str, Any], whole: dict[str, Any]) -> list[Any]:
    """For each kind of schedule how far losses, norms and parameters are from those of one rank with settings `whole`."""
    found = []
    data = config_of(name)
    with Float64Everywhere():
        unsplit = fresh(data, dtype="float64", seed=3, groups=single_groups())
        expected = train(unsplit, tokens(), replace(SETTINGS, **whole))
        for kind, vpp in kinds.items():
            split = fresh(data, dtype="float64", seed=3, plan=plan_for(data, mesh, kind, vpp))
            reports = train(split, tokens(), replace(SETTINGS, **changes, schedule=kind))
            lines = [
                max(abs(getattr(a, what) / getattr(b, what) - 1) for a, b in zip(reports, expected, strict=True))
                for what in ("loss", "grad_norm")
            ]
            worst = max(compare_parameters(unsplit, split, *plan_of(split)), key=lambda d: d.error)
            found.append((kind, *lines, worst.error, worst.name))
    return found


def check(name: str, mesh: Mesh, kinds: dict[str, int], changes: dict[str, Any], whole: dict[str, Any]) -> None:
    for found in ranks(mesh.size).run(apart, name, mesh, kinds, changes, whole):
        for kind, loss, norm, parameter, where in found:
            assert max(loss, norm, parameter) <= 1e-12, (kind, loss, norm, parameter, where)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("qwen3-moe", {"interleaved-1f1b": 2, "zb-h1": 1}),
        *(pytest.param(name, KINDS, marks=pytest.mark.slow) for name in ("mixtral", "qwen3-moe")),
    ],
)
def test_every_schedule_has_the_loss_of_one_rank(name: str, kinds: dict[str, int]) -> None:
    check(name, Mesh(pp=2), kinds, {"microbatches": 4}, {"microbatches": 4})


@pytest.mark.parametrize("mesh", [Mesh(tp=2), Mesh(dp=2)], ids=str)
def test_the_same_micro_batches_have_the_same_loss_on_two_ranks(mesh: Mesh) -> None:
    check("qwen3-moe", mesh, {"1f1b": 1}, {"microbatches": 4 // mesh.dp}, {"microbatches": 4})


@pytest.mark.parametrize("mesh", [Mesh(tp=2, pp=2), Mesh(dp=2, pp=2)], ids=str)
def test_the_same_micro_batches_have_the_same_loss_on_four_ranks(mesh: Mesh) -> None:
    check("qwen3-moe", mesh, {"zb-h1": 1}, {"microbatches": 4 // mesh.dp}, {"microbatches": 4})


@pytest.mark.parametrize(
    ("mesh", "kinds", "microbatches"),
    [
        (Mesh(pp=2), {"interleaved-1f1b": 2, "zb-h1": 1}, 2),
        (Mesh(dp=2), {"1f1b": 1}, 1),
        (Mesh(tp=2, pp=2), {"1f1b": 1}, 8),
    ],
    ids=str,
)
def test_the_loss_of_sequences_depends_on_neither_mesh_nor_micro_batches(
    mesh: Mesh, kinds: dict[str, int], microbatches: int
) -> None:
    scope = {"aux_loss_scope": "sequence"}
    check("qwen3-moe", mesh, kinds, {"microbatches": microbatches, **scope}, {"microbatches": 1, **scope})


def first_losses(name: str, scope: str, rows_of_a_part: int) -> tuple[float, float]:
    """The loss of the first step, and what transformers' own forward gives for parts of so many rows of the batch."""
    with Float64Everywhere():
        model: Any = fresh(config_of(name), dtype="float64", seed=3, groups=single_groups())
        rows = batch(tokens(), 0, SETTINGS.batch_size, SETTINGS.sequence_length, SETTINGS.seed)
        parts = []
        with torch.no_grad():
            for part in rows.split(rows_of_a_part):
                output = model(input_ids=part[:, :-1], output_router_logits=True)
                entropy = F.cross_entropy(output.logits.flatten(0, 1), part[:, 1:].flatten())
                parts.append(float(entropy + COEFFICIENT * output.aux_loss))
        microbatches = 1 if scope == "sequence" else len(parts)
        settings = replace(SETTINGS, steps=1, microbatches=microbatches, aux_loss_scope=scope)
        return train(model, tokens(), settings)[0].loss, sum(parts) / len(parts)


@pytest.mark.parametrize(("scope", "rows"), [("microbatch", 8), ("microbatch", 2), ("sequence", 1)])
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_the_loss_is_that_of_transformers(name: str, scope: str, rows: int) -> None:
    loss, expected = first_losses(name, scope, rows)
    assert loss == pytest.approx(expected, rel=1e-12)


def test_a_scope_for_a_model_without_such_a_loss_is_refused() -> None:
    data = CONFIGS["llama-3-heads"]
    with pytest.raises(ModelError, match="aux_loss_scope='sequence' needs a model whose config requests"):
        balance_of(build_on_meta(read_hf_config(data)), plan_for(data, Mesh(), "1f1b", 1), "sequence")


def test_a_loss_of_another_form_is_refused_over_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mixtral import modeling_mixtral

    usual = modeling_mixtral.load_balancing_loss_func
    monkeypatch.setattr(modeling_mixtral, "load_balancing_loss_func", lambda *given: 2 * usual(*given))
    monkeypatch.setattr("partita.torch.proof.balance_probe._verdicts", {})
    model = build_on_meta(read_hf_config(config_of("mixtral")))
    over_stages = plan_for(config_of("mixtral"), Mesh(pp=2), "1f1b", 1)
    with pytest.raises(ModelError, match=r"cannot be computed over stages: its auxiliary loss differs.* by 5\.0e-01"):
        balance_of(model, over_stages, "microbatch")
    with pytest.raises(ModelError, match="cannot be computed of each sequence"):
        balance_of(model, plan_for(config_of("mixtral"), Mesh(), "1f1b", 1), "sequence")
    assert balance_of(model, plan_for(config_of("mixtral"), Mesh(), "1f1b", 1), "microbatch") is None


def generated(mesh: dict[str, int]) -> list[list[int]]:
    where: dict[str, Any] = mesh or {"groups": single_groups()}
    model = fresh(config_of("mixtral"), dtype="float64", seed=3, **where)
    return [done.tokens for done in generate(model, [[1, 2, 3], [4, 5]], Sampling(max_new_tokens=4))]


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"pp": 2}], ids=str)
def test_padded_prompts_are_continued_by_a_model_that_asks_for_the_loss(mesh: dict[str, int]) -> None:
    expected = on(1, generated, {})[0]
    assert ranks(2).run(generated, mesh) == [expected] * 2


def test_mlx_refuses_what_its_models_do_not_compute() -> None:
    from partita.mlx.new import fresh as fresh_on_mlx
    from partita.mlx.train import train as train_on_mlx

    config = {**config_of("qwen3-moe"), "num_hidden_layers": 2, "mlp_only_layers": []}
    model = fresh_on_mlx(config, seed=3)
    with pytest.raises(ModelError, match=r"do not compute the auxiliary loss of their routers.*use the torch engine"):
        train_on_mlx(model, [token % 101 for token in range(500)], SETTINGS)


@pytest.mark.parametrize(
    ("scope", "said"),
    [
        ("microbatch", "is computed over the 16 tokens of each micro-batch of 2 sequences."),
        ("sequence", "is computed over the 8 tokens of each sequence."),
    ],
)
def test_train_says_over_which_tokens_the_loss_is_computed(scope: str, said: str, tmp_path: Path, partita: Run) -> None:
    config = {
        **config_of("mixtral"),
        "architectures": ["MixtralForCausalLM"],
        "vocab_size": 257,
        "num_hidden_layers": 1,
    }
    text = tmp_path / "text.txt"
    text.write_text("import sys\nimport os\n" * 20)
    ended = partita(
        "train", "--config", write(tmp_path, config), "--data", str(text), "--steps", "1", "--batch-size", "4",
        "--sequence-length", "8", "--microbatches", "2", "--aux-loss-scope", scope,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert f"The auxiliary loss of the routers {said}" in ended.err
