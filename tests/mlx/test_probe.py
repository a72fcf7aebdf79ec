"""Proof before use on MLX: what is not right is refused with a true reason, and what cannot be measured too."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from partita.core.mesh import Mesh
from partita.core.plan import Plan
from partita.core.sharding.rules import Rule, Rules
from partita.errors import DistributedError, ModelError
from partita.mlx.collectives.groups import single_groups
from partita.mlx.collectives.threads import ThreadCommunicator, run_as_threads
from partita.mlx.model.mlx_lm_models import build, spec_of
from partita.mlx.proof import family
from partita.mlx.proof.compare import compare, generate_steps, gradients
from partita.mlx.proof.family import candidates, fill, plan_of_model, prove, sample_inputs
from tests.support.mlx_models import tiny_config


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "_proven", {})


def _rules(**changes: str) -> Rules:
    table = {
        "embed_tokens": "vocab", "lm_head": "vocab", "q_proj": "column heads", "{k_proj,v_proj}": "column kv_heads",
        "o_proj": "row heads", "{gate_proj,up_proj}": "column", "down_proj": "row", "{q_norm,k_norm}": "replicate partial_grad",
    }  # fmt: skip
    table.update({key.replace("__", ","): value for key, value in changes.items()})
    return Rules.parse(table)


def test_right_rules_pass() -> None:
    config = tiny_config("qwen3")
    model = build(config)
    plan = plan_of_model(model, Mesh(tp=2), rules=_rules(), config=config)
    assert not plan.rules.proven
    assert len(plan.modules) == 2 + 4 * 7


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        # A row layer that gets whole inputs would see the wrong ones.
        ({"down_proj": "row split_input"}, "With its rules the forward fails"),
        # Norms of heads inside a region see a part of their gradient only.
        ({"{q_norm,k_norm}": "replicate"}, "the gradient model.layers.0.self_attn.[qk]_norm.weight differs"),
        # Keys without their values, or heads dealt as plain features.
        ({"{k_proj,v_proj}": "replicate"}, "With its rules"),
    ],
)
def test_wrong_rules_are_refused_with_what_differs(change: dict[str, str], reason: str) -> None:
    config = tiny_config("qwen3")
    with pytest.raises(ModelError, match=f"qwen3 cannot be split over tp=2: .*{reason}"):
        plan_of_model(build(config), Mesh(tp=2), rules=_rules(**change), config=config)


def test_the_dtype_of_the_model_is_measured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that are right in float64 and keep five bits in bfloat16 are refused for a model in bfloat16 only."""
    total = ThreadCommunicator._sum

    def coarse(self: ThreadCommunicator, x: mx.array) -> mx.array:
        found = total(self, x)
        if x.dtype != mx.bfloat16:
            return found
        step = 2.0 ** (mx.floor(mx.log2(mx.maximum(mx.abs(found), 1e-20))) - 4)
        return (mx.round(found / step) * step).astype(mx.bfloat16)

    monkeypatch.setattr(ThreadCommunicator, "_sum", coarse)
    config = tiny_config("qwen3")
    model = build(config)
    assert plan_of_model(model, Mesh(tp=2), rules=_rules(), config=config)
    model.set_dtype(mx.bfloat16)
    with pytest.raises(ModelError, match=r"is rounded by .* in bfloat16, where .* is allowed"):
        plan_of_model(model, Mesh(tp=2), rules=_rules(), config=config)


def test_what_the_first_rules_get_wrong_is_split_otherwise() -> None:
    config = tiny_config("seed_oss")
    plan = plan_of_model(build(config), Mesh(tp=2), config=config)
    # It takes the embedding's weight as it is.
    assert plan.tensor("model.embed_tokens.weight").split is None
    assert plan.tensor("model.layers.0.mlp.up_proj.weight").split is not None
    config = tiny_config("exaone")
    plan = plan_of_model(build(config), Mesh(tp=2), config=config)
    inside = [m for m in plan.modules.values() if plan.spec.layer_of(m.path) is not None]
    assert all(module.gather_output for module in inside)


def test_candidates_go_from_most_to_least() -> None:
    config = tiny_config("qwen3")
    spec = spec_of(build(config), config)

    def apart(rules: Rules) -> tuple[int, bool]:
        plan = Plan.make(spec, Mesh(tp=2), None, rules)
        return sum(m.gather_output for m in plan.modules.values()), "model.embed_tokens" in plan.modules

    assert [apart(rules) for rules in candidates(spec, _rules())] == [
        (0, True), (0, False), (16, True), (12, True), (28, True), (28, False),
    ]  # fmt: skip


def test_verdicts_are_kept_for_one_config(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    measure = family._measure
    monkeypatch.setattr(family, "_measure", lambda *args: (measured.append(1), measure(*args))[1])
    for attention_bias in (False, False, True):
        config = {**tiny_config("llama"), "attention_bias": attention_bias}
        model = build(config)
        prove(model, Plan.make(spec_of(model, config), Mesh(tp=2), None, _rules()))
    assert len(measured) == 2


def test_chance_is_left_alone() -> None:
    mx.random.seed(11)
    expected = [mx.random.uniform().item() for _ in range(3)]
    config = tiny_config("cohere")
    model = build(config)
    mx.random.seed(11)
    plan_of_model(model, Mesh(tp=2), config=config)
    assert [mx.random.uniform().item() for _ in range(3)] == expected


def test_nothing_is_evaluated_of_the_model_itself() -> None:
    config = {**tiny_config("llama"), "hidden_size": 2048, "head_dim": 512, "intermediate_size": 200_000}
    before = mx.get_active_memory()
    model = build(config)
    plan = plan_of_model(model, Mesh(tp=2), config=config)
    assert plan.spec.parameters > 1_000_000_000
    assert mx.get_active_memory() - before < 20_000_000


def test_what_ends_the_process_is_not_run() -> None:
    config = tiny_config("phi3small")
    with pytest.raises(ModelError, match="phi3small writes out of bounds"):
        plan_of_model(build(config), Mesh(tp=2), config=config)


def test_a_model_without_arguments_is_refused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [nn.Linear(8, 8), nn.Linear(8, 8)]

    with pytest.raises(ModelError, match="stores no arguments that could be reduced"):
        plan_of_model(Model(), Mesh(tp=2), rules=Rules((Rule("layers.*", "column"),)))


# --- comparing ------------------------------------------------------------------------------------------------------------


def _llama(dtype: mx.Dtype = mx.float64) -> Any:
    mx.random.seed(0)
    return fill(build(tiny_config("llama")), dtype)


def test_a_model_equals_itself_and_not_another() -> None:
    one, other = _llama(), _llama()
    spec = spec_of(one)
    plan, groups = Plan.make(spec, Mesh()), single_groups()
    same = compare(one, other, plan, groups, sample_inputs(one))
    assert {d.error for d in same} == {0.0}
    gradient_names = [d.name for d in same if d.kind == "gradient"]
    assert set(gradient_names) == set(spec.tensors)
    layer = other.model.layers[2].mlp
    layer.up_proj.weight = layer.up_proj.weight + 1e-6
    found = compare(one, other, plan, groups, sample_inputs(one))
    first = next(d for d in found if d.error > 0)
    assert (first.kind, first.name) == ("module", "model.layers.2.mlp.up_proj")
    layer.up_proj.weight = layer.up_proj.weight + float("nan")
    found = compare(one, other, plan, groups, sample_inputs(one))
    assert next(d for d in found if d.name == "the model").error == float("inf")


def test_watching_and_differentiating_leave_no_trace() -> None:
    model = _llama()
    classes = [type(m) for m in model.modules()]
    weight = model.model.layers[0].mlp.up_proj.weight
    compare(model, _llama(), Plan.make(spec_of(model), Mesh()), single_groups(), sample_inputs(model))
    assert [type(m) for m in model.modules()] == classes
    assert model.model.layers[0].mlp.up_proj.weight is weight


def test_gradients_are_those_of_mlx() -> None:
    model = _llama()
    ids = sample_inputs(model)
    found = gradients(model, ids)
    logits = model(ids)
    weight = mx.random.normal(logits.shape, key=mx.random.key(0)).astype(logits.dtype)
    expected = nn.value_and_grad(model, lambda: (model(ids) * weight).sum())()[1]
    assert mx.array_equal(
        found["model.layers.1.mlp.down_proj.weight"], expected["model"]["layers"][1]["mlp"]["down_proj"]["weight"]
    ).item()


def test_steps_are_the_last_logits() -> None:
    model = _llama()
    ids = sample_inputs(model)
    assert mx.abs(generate_steps(model, ids) - model(ids)[:, -2:]).max().item() < 1e-12


# --- threads --------------------------------------------------------------------------------------------------------------


def test_collectives_of_threads() -> None:
    def work(comm: Any) -> list[Any]:
        x = mx.arange(3) + 10 * comm.rank
        return [
            comm.all_sum(x).tolist(), comm.all_max(x).tolist(), comm.all_gather(x[: comm.rank + 1], 0, [1, 2]).tolist(),
            comm.broadcast(x, 1).tolist(), comm.all_gather_object({"rank": comm.rank}),
            comm.all_sum(mx.ones(2, mx.bfloat16)).tolist(),
        ]  # fmt: skip

    for found in run_as_threads(2, work):
        assert found == [[10, 12, 14], [10, 11, 12], [0, 10, 11], [10, 11, 12], [{"rank": 0}, {"rank": 1}], [2.0, 2.0]]


def test_a_thread_that_fails_ends_the_others() -> None:
    def work(comm: Any) -> None:
        if comm.rank == 1:
            raise KeyError("here")
        comm.barrier()

    with pytest.raises(KeyError, match="here"):
        run_as_threads(3, work)


def test_unlike_arrays_are_told() -> None:
    with pytest.raises(DistributedError, match="different arrays"):
        run_as_threads(2, lambda comm: comm.all_sum(mx.ones(2 + comm.rank)))


def test_threads_leave_nothing_that_ends_the_process() -> None:
    """A stream of MLX that outlived its thread has aborted the process at its end, now and then."""
    program = (
        "import mlx.core as mx\nfrom partita.mlx.collectives.threads import run_as_threads\n"
        "def work(comm):\n    mx.random.seed(0)\n    mx.eval(comm.all_sum(mx.random.uniform(shape=(2,))))\n"
        "for _ in range(3): run_as_threads(2, work)\n"
    )
    for _ in range(5):
        assert subprocess.run([sys.executable, "-c", program], timeout=100).returncode == 0
