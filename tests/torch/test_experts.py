"""Expert parallelism: complete experts on each rank give the values, gradients and files of the unsplit model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from partita.checkpoint.run_folder import RunFolder
from partita.core.mesh import Mesh
from partita.errors import ModelError, PlanError
from partita.torch import Sampling, generate
from partita.torch.collectives.groups import make_groups, single_groups
from partita.torch.compile import compile_layers
from partita.torch.load import load
from partita.torch.model.float64 import Float64Everywhere
from partita.torch.model.transformers_models import build_on_meta, read_hf_config
from partita.torch.new import fresh
from partita.torch.proof.compare import compare
from partita.torch.proof.family import fill_unsplit, plan_of_model, sample_inputs
from partita.torch.quantized.tensor import QuantizedTensor
from partita.torch.split.apply import apply_plan
from partita.torch.split.finish import finish
from partita.torch.train import TrainSettings, train
from partita.torch.weights.adapters import add_lora
from partita.torch.weights.save import save
from partita.training import Saves
from tests.support.models import CONFIGS, UNMEASURED
from tests.support.quantized import FP8, QWEN_MOE, dequantized, fp8, write_quantized
from tests.support.ranks import ranks

MODELS: dict[str, dict[str, Any]] = {
    "mixtral": CONFIGS["mixtral"],
    "mixtral, 5 experts": {**CONFIGS["mixtral"], "num_local_experts": 5},
    "qwen3-moe": CONFIGS["qwen3-moe"],
    "deepseek-v3": CONFIGS["deepseek-v3"],
    "gpt-oss": UNMEASURED["gpt-oss"],
}


Routing = Literal["as it is", "to one rank", "ties"]


def _routed(model: nn.Module, routing: Routing) -> None:
    """Send all tokens to the first two experts, or give all experts the same score."""
    for name, parameter in model.named_parameters():
        if routing != "as it is" and "router" in name:
            parameter.data.zero_()
            if routing == "to one rank" and name.endswith("bias"):
                parameter.data[:2] = 3.0


def _differences(
    data: dict[str, Any], mesh: Mesh, routing: Routing = "as it is"
) -> tuple[list[tuple[str, str, float]], int]:
    unsplit = fill_unsplit(build_on_meta(read_hf_config(data), torch.float64))
    _routed(unsplit, routing)
    plan = plan_of_model(unsplit, mesh)
    groups = make_groups(plan.mesh)
    split = finish(apply_plan(copy.deepcopy(unsplit), plan, groups), plan, groups)
    with Float64Everywhere():
        found = compare(unsplit, split, plan, groups, sample_inputs(unsplit))
    # The bias of an expert's output is on each of the ranks that hold a part of its weights.
    held = sum(
        p.numel()
        for name, p in split.named_parameters()
        if ".experts." in name and not ("down_proj_bias" in name and groups.ep.rank % mesh.expert_tp)
    )
    return [(d.kind, d.name, d.error) for d in found], held


CASES = [
    ("mixtral", Mesh(tp=2, ep=2)),
    ("mixtral, 5 experts", Mesh(tp=3, ep=3)),
    ("qwen3-moe", Mesh(tp=3, ep=3)),
    ("qwen3-moe", Mesh(tp=2, ep=2, pp=2)),
    ("deepseek-v3", Mesh(tp=2, ep=2)),
    ("gpt-oss", Mesh(tp=2, ep=2)),
    ("mixtral, 5 experts", Mesh(dp=2, ep=2)),
    ("gpt-oss", Mesh(dp=2, ep=2)),
    ("deepseek-v3", Mesh(cp=2, ep=2)),
    ("qwen3-moe", Mesh(dp=2, pp=2, ep=2)),
    ("mixtral, 5 experts", Mesh(dp=3, ep=3)),
    ("qwen3-moe", Mesh(dp=2, tp=2, ep=4, etp=1)),
    ("qwen3-moe", Mesh(dp=2, tp=2, ep=2, etp=1)),
    ("mixtral, 5 experts", Mesh(dp=4, ep=2)),
    ("qwen3-moe", Mesh(tp=4, ep=2, etp=1)),
    ("deepseek-v3", Mesh(tp=3, dp=2, ep=2, etp=1)),
    ("mixtral, 5 experts", Mesh(tp=4, ep=2, etp=2)),
    ("gpt-oss", Mesh(tp=4, ep=2, etp=2)),
    ("gpt-oss", Mesh(dp=2, tp=2, ep=2, etp=2)),
    ("qwen3-moe", Mesh(cp=2, tp=2, ep=2, etp=2)),
    ("deepseek-v3", Mesh(dp=4, ep=2, etp=2)),
]


@pytest.mark.parametrize(("name", "mesh"), CASES, ids=repr)
def test_distributed_experts_equal_the_unsplit_model(name: str, mesh: Mesh) -> None:
    found = ranks(mesh.size).run(_differences, MODELS[name], mesh)
    for differences, _ in found:
        assert {kind for kind, _, _ in differences} == {"module", "output", "gradient"}
        assert [d for d in differences if not d[2] <= 1e-12] == []
    unsplit = fill_unsplit(build_on_meta(read_hf_config(MODELS[name]), torch.float64))
    assert sum(held for _, held in found) == mesh.axis_size("edp") * sum(
        p.numel() for path, p in unsplit.named_parameters() if ".experts." in path
    )


@pytest.mark.parametrize("mesh", [Mesh(tp=2, ep=2), Mesh(dp=2, ep=2), Mesh(dp=2, tp=2, ep=2, etp=2)], ids=repr)
@pytest.mark.parametrize("routing", ["to one rank", "ties"])
def test_any_routing(routing: Routing, mesh: Mesh) -> None:
    for differences, _ in ranks(mesh.size).run(_differences, MODELS["gpt-oss"], mesh, routing):
        assert {name for kind, name, _ in differences if kind == "gradient" and "experts" in name}
        assert [d for d in differences if not d[2] <= 1e-12] == []


SETTINGS = TrainSettings(
    steps=3, batch_size=4, sequence_length=13, microbatches=2, learning_rate=3e-3, warmup_steps=1, clip_norm=0.5
)
AUXILIARY = {**CONFIGS["qwen3-moe"], "num_experts": 5, "output_router_logits": True}
_TOKENS = torch.arange(900) ** 2 % 23


def _settings(**more: Any) -> TrainSettings:
    return TrainSettings(**{**SETTINGS.__dict__, **more})


def _trained(
    data: dict[str, Any], mesh: dict[str, int], more: dict[str, Any], folder: str
) -> tuple[list[float], list[float]]:
    where: dict[str, Any] = dict(mesh) if mesh else {"groups": single_groups()}
    model = fresh(data, dtype="float64", seed=3, **where)
    # The router computes in float32, and what is recomputed runs outside of the mode.
    with nullcontext() if "checkpointing" in more else Float64Everywhere():
        reports = train(model, _TOKENS, _settings(**more), saves=Saves(Path(folder), every=2))
    return [r.loss for r in reports], [r.grad_norm for r in reports]


def _weights_of(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_file(RunFolder(folder).step_folder(SETTINGS.steps) / "model.safetensors")
    return weights


TRAINED: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "ep 2": ({"tp": 2, "ep": 2}, {}),
    "ep 2, stages": ({"tp": 2, "ep": 2, "pp": 2}, {"schedule": "zb-h1"}),
    "ep 2, replicas": ({"tp": 2, "ep": 2, "etp": 1, "dp": 2}, {"zero": True}),
    "ep 3, recomputed": ({"tp": 3, "ep": 3}, {"checkpointing": "full"}),
    "ep 2, muon": ({"tp": 2, "ep": 2}, {"optimizer": "muon"}),
    "ep 2 over replicas": ({"dp": 2, "ep": 2}, {}),
    "ep 3 over replicas, recomputed": ({"dp": 3, "ep": 3}, {"checkpointing": "full", "batch_size": 6}),
    "ep 2 of 4 replicas": ({"dp": 4, "ep": 2}, {"microbatches": 1}),
    "ep 2 of 4 replicas, ZeRO-1": ({"dp": 4, "ep": 2}, {"microbatches": 1, "zero": 1}),
    "ep 2 of 4 replicas, ZeRO-2": ({"dp": 4, "ep": 2}, {"microbatches": 1, "zero": 2}),
    "ep 2 of 4 replicas, ZeRO-3": ({"dp": 4, "ep": 2}, {"microbatches": 1, "zero": 3}),
    "ep 2 over replicas, stages": ({"dp": 2, "pp": 2, "ep": 2}, {"schedule": "zb-h1"}),
    "ep 2 over replicas, stages, ZeRO-3": ({"dp": 2, "pp": 2, "ep": 2}, {"zero": 3}),
    "ep 4 over replicas and tensor ranks": ({"dp": 2, "tp": 2, "ep": 4, "etp": 1}, {}),
    "ep 2 of 4 tensor ranks": ({"tp": 4, "ep": 2, "etp": 1}, {}),
    "ep 2 of replicas and tensor ranks, muon": (
        {"dp": 3, "tp": 2, "ep": 3, "etp": 1},
        {"optimizer": "muon", "batch_size": 6},
    ),
    "ep 2 over parts of sequences": ({"cp": 2, "ep": 2}, {}),
    "ep 4 over parts of sequences and replicas": ({"cp": 2, "dp": 2, "ep": 4}, {"zero": 1}),
    "ep 2 x etp 2": ({"tp": 4, "ep": 2, "etp": 2}, {}),
    "ep 2 x etp 2, muon": ({"tp": 4, "ep": 2, "etp": 2}, {"optimizer": "muon"}),
    "ep 2 x etp 2 over replicas, muon": ({"dp": 2, "tp": 2, "ep": 2, "etp": 2}, {"optimizer": "muon"}),
    "ep 2 x etp 2 over replicas, recomputed": ({"dp": 2, "tp": 2, "ep": 2, "etp": 2}, {"checkpointing": "full"}),
    "ep 2 x etp 2 over replicas alone, ZeRO-3": ({"dp": 4, "ep": 2, "etp": 2}, {"microbatches": 1, "zero": 3}),
    "ep 2 x etp 2 over parts of sequences": ({"cp": 2, "tp": 2, "ep": 2, "etp": 2}, {"zero": 2}),
}


@pytest.mark.parametrize("case", TRAINED)
def test_trains_and_saves_like_the_unsplit_model(case: str, tmp_path: Path) -> None:
    mesh, more = TRAINED[case]
    exact = 1e-5 if "checkpointing" in more else 1e-12
    alone = {key: value for key, value in more.items() if key not in ("schedule", "zero")}
    alone["microbatches"] = more.get("microbatches", 2) * mesh.get("dp", 1)  # one auxiliary loss for each
    losses, norms = ranks(1).run(_trained, AUXILIARY, {}, alone, str(tmp_path / "alone"))[0]
    for theirs in ranks(Mesh(**mesh).size).run(_trained, AUXILIARY, mesh, more, str(tmp_path / "split")):
        assert theirs[0] == pytest.approx(losses, rel=exact)
        assert theirs[1] == pytest.approx(norms, rel=exact)
    expected, found = _weights_of(tmp_path / "alone"), _weights_of(tmp_path / "split")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) <= exact, name


def _saved(folder: str, mesh: dict[str, int]) -> None:
    where: dict[str, Any] = dict(mesh) if mesh else {"groups": single_groups()}
    save(fresh(MODELS["mixtral, 5 experts"], dtype="float32", seed=3, **where), f"{folder}/new")
    save(load(f"{folder}/new", **where), f"{folder}/again")


def test_files_do_not_depend_on_ep(tmp_path: Path) -> None:
    ranks(1).run(_saved, str(tmp_path / "alone"), {})
    mesh = {"dp": 2, "tp": 2, "ep": 2, "etp": 2}
    ranks(4).run(_saved, str(tmp_path / "split"), mesh)
    expected = (tmp_path / "alone" / "new" / "model.safetensors").read_bytes()
    for name in ("new", "again"):
        assert (tmp_path / "split" / name / "model.safetensors").read_bytes() == expected


def _own_optimizer(folder: str, mesh: dict[str, int], resume: bool) -> list[float]:
    where: dict[str, Any] = dict(mesh) if mesh else {"groups": single_groups()}
    run = RunFolder(Path(folder))
    start = run.step_folder(2) if resume else None
    model = load(start, dtype="float64", **where) if start else fresh(AUXILIARY, dtype="float64", seed=3, **where)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    saves = None if resume else Saves(Path(folder), every=2)
    with Float64Everywhere():
        microbatches = 4 // mesh.get("dp", 1)
        settings = TrainSettings(steps=3, batch_size=4, sequence_length=13, microbatches=microbatches, clip_norm=0.5)
        reports = train(model, _TOKENS, settings, optimizer=optimizer, saves=saves, resume=start)
    return [report.loss for report in reports]


@pytest.mark.slow
def test_an_optimizer_of_ones_own_resumes_in_another_layout(tmp_path: Path) -> None:
    losses = ranks(2).run(_own_optimizer, str(tmp_path), {"dp": 2, "ep": 2}, False)[0]
    meshes: list[dict[str, int]] = [{}, {"tp": 2, "ep": 2}, {"cp": 2, "ep": 2}]
    for mesh in meshes:
        for found in ranks(Mesh(**mesh).size).run(_own_optimizer, str(tmp_path), mesh, True):
            assert found == pytest.approx(losses[2:], rel=1e-11)


def _resumed(folder: str, mesh: dict[str, int], more: dict[str, Any]) -> list[float]:
    where: dict[str, Any] = dict(mesh) if mesh else {"groups": single_groups()}
    run = RunFolder(Path(folder))
    model = load(run.step_folder(2), dtype="float64", **where)
    with Float64Everywhere():
        reports = train(model, _TOKENS, _settings(**more), resume=run.step_folder(2))
    return [report.loss for report in reports] + [report.grad_norm for report in reports]


RESUMED: list[tuple[dict[str, int], dict[str, Any], dict[str, int], dict[str, Any]]] = [
    ({"dp": 2, "ep": 2}, {"zero": 1}, {"tp": 2, "ep": 2}, {"microbatches": 4}),
    ({"tp": 2, "pp": 2, "ep": 2}, {"microbatches": 4}, {"dp": 2, "pp": 2, "ep": 2}, {"zero": 3}),
    ({"dp": 4, "ep": 2}, {"microbatches": 1, "zero": 3}, {"dp": 2, "tp": 2, "ep": 4, "etp": 1}, {}),
    ({"dp": 2, "ep": 2}, {}, {}, {"microbatches": 4}),
    ({"tp": 4, "ep": 2, "etp": 2}, {"microbatches": 4}, {"dp": 2, "ep": 2}, {"zero": 3}),
    ({"dp": 2, "ep": 2}, {"zero": 1}, {"dp": 2, "tp": 2, "ep": 2, "etp": 2}, {"zero": 2}),
]


@pytest.mark.parametrize("case", range(len(RESUMED)))
def test_resumes_in_another_layout(case: int, tmp_path: Path) -> None:
    before, first, after, then = RESUMED[case]
    whole = ranks(Mesh(**before).size).run(_trained, AUXILIARY, before, first, str(tmp_path))[0]
    for found in ranks(Mesh(**after).size).run(_resumed, str(tmp_path), after, then):
        assert found == pytest.approx([whole[0][2], whole[1][2]], rel=1e-11)


def _uneven(mesh: dict[str, int], packing: bool) -> tuple[list[float], float]:
    """Documents of unlike lengths; the replicas evaluate unlike numbers of them."""
    where: dict[str, Any] = dict(mesh) if mesh else {"groups": single_groups()}
    model = fresh(CONFIGS["qwen3-moe"], dtype="float64", seed=3, **where)
    documents = [[int(_TOKENS[31 * n + i]) for i in range(3 + 5 * n % 11)] for n in range(9)]
    settings = _settings(packing=packing, microbatches=2 if mesh else 4, eval_every=2)
    with Float64Everywhere():
        reports = train(model, documents, settings, eval_data=documents[:5])
    return [report.loss for report in reports], next(r.eval_loss for r in reports if r.eval_loss is not None)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_documents_of_unlike_lengths(packing: bool) -> None:
    (expected,) = ranks(1).run(_uneven, {}, packing)
    for losses, evaluated in ranks(2).run(_uneven, {"dp": 2, "ep": 2}, packing):
        assert losses == pytest.approx(expected[0], rel=1e-12)
        assert evaluated == pytest.approx(expected[1], rel=1e-12)


def _written(folder: str, mesh: dict[str, int]) -> tuple[int, ...]:
    where: dict[str, Any] = dict(mesh) if mesh else {"groups": single_groups()}
    model = load(folder, dtype="float64", **where)
    return generate(model, [[3, 1, 4, 1, 5]], Sampling(max_new_tokens=12))[0].tokens


@pytest.mark.slow
def test_writes_the_same_text(tmp_path: Path) -> None:
    ranks(1).run(_trained, AUXILIARY, {}, {}, str(tmp_path / "run"))
    (expected,) = ranks(1).run(_written, str(tmp_path / "run"), {})
    meshes: list[dict[str, int]] = [{"tp": 3, "ep": 3}, {"tp": 4, "ep": 2, "etp": 2}]
    for mesh in meshes:
        for found in ranks(mesh["tp"]).run(_written, str(tmp_path / "run"), mesh):
            assert found == expected


def _adapted(mesh: dict[str, int]) -> list[float]:
    where: dict[str, Any] = dict(mesh) if mesh else {"groups": single_groups()}
    model = fresh(CONFIGS["qwen3-moe"], dtype="float64", seed=3, **where)
    add_lora(model, rank=2, seed=0)
    with Float64Everywhere():
        return [report.loss for report in train(model, _TOKENS, SETTINGS)]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"tp": 2, "ep": 2}, {"dp": 2, "ep": 2}])
def test_adapters_beside_distributed_experts(mesh: dict[str, int]) -> None:
    (expected,) = ranks(1).run(_adapted, {})
    for found in ranks(2).run(_adapted, mesh):
        assert found == pytest.approx(expected, rel=1e-12)


def _quantized(folder: Path, mesh: dict[str, Any]) -> tuple[float, int]:
    model = load(folder, dtype="float64", **mesh)
    whole = dequantized(folder)
    ids = torch.arange(10).view(2, 5)
    with Float64Everywhere(), torch.no_grad():
        found, expected = model(input_ids=ids).logits, whole(input_ids=ids).logits
    held = [t for t in model.parameters() if isinstance(t, QuantizedTensor) and t.dim() == 3]
    return float((found - expected).abs().max() / expected.abs().max()), sum(t.shape[0] for t in held)


@pytest.mark.slow
def test_quantized_experts(tmp_path: Path) -> None:
    write_quantized(tmp_path, QWEN_MOE, FP8, fp8)
    for mesh in ({"tp": 2, "ep": 2}, {"tp": 4, "ep": 2, "etp": 2}):
        found = ranks(mesh["tp"]).run(_quantized, tmp_path, mesh)
        assert all(error < 1e-12 for error, _ in found)
        assert sum(count for _, count in found) == 2 * 2 * QWEN_MOE["num_experts"] * mesh.get("etp", 1)


def _refusal(data: dict[str, Any], mesh: dict[str, Any]) -> str:
    try:
        fresh(data, seed=0, **mesh)
    except (ModelError, PlanError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("data", "mesh", "why"),
    [
        (CONFIGS["llama-3-heads"], {"tp": 2, "ep": 2}, "has fused experts. Leave ep out."),
        (CONFIGS["mixtral"], {"tp": 2, "etp": 1}, "etp=1 differs from tp=2, but ep is 1"),
    ],
)
def test_refuses_what_it_cannot_distribute(data: dict[str, Any], mesh: dict[str, int], why: str) -> None:
    for found in ranks(2).run(_refusal, data, mesh):
        assert why in found


PROMPTS = [[1, 2, 3], [5, 6, 7, 8, 9, 10, 11], [4, 4]]


def _generated(mesh: dict[str, int], prompts: list[list[int]]) -> list[list[int]]:
    """The tokens of each prompt; with sampling, so that texts end at different steps."""
    with Float64Everywhere():
        model = fresh(CONFIGS["qwen3-moe"], seed=0, dtype=torch.float64, **mesh)
        model.generation_config.eos_token_id = list(range(0, model.config.vocab_size, 4))  # type: ignore[union-attr]
        found = generate(model, prompts, Sampling(max_new_tokens=6, temperature=1.0, seed=3))
    return [one.tokens for one in found]


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["unequal", "one replica without"])
@pytest.mark.parametrize("mesh", [{"dp": 2, "ep": 2}, {"dp": 2, "pp": 2, "ep": 2}], ids=repr)
def test_replicas_that_hold_experts_together_generate_together(mesh: dict[str, int], prompts: list[list[int]]) -> None:
    (expected,) = ranks(1).run(_generated, {}, prompts)
    if len(prompts) > 1:
        assert len({len(tokens) for tokens in expected}) > 1
    for found in ranks(Mesh(**mesh).size).run(_generated, mesh, prompts):
        assert found == expected


def _fails_on_one_replica(mesh: dict[str, int]) -> str:
    model = fresh(CONFIGS["qwen3-moe"], seed=0, **mesh)
    for name, parameter in model.named_parameters():
        if "embed" in name:
            parameter.data[2] = float("nan")
    with pytest.raises(ModelError) as error:
        generate(model, [[1, 3], [1, 2]], Sampling(max_new_tokens=4, ignore_eos=True))
    return str(error.value)


@pytest.mark.parametrize("mesh", [{"dp": 2, "ep": 2}, {"dp": 2, "pp": 2, "ep": 2}], ids=repr)
def test_a_replica_whose_logits_are_not_finite_ends_all(mesh: dict[str, int]) -> None:
    for why in ranks(Mesh(**mesh).size).run(_fails_on_one_replica, mesh):
        assert "not finite" in why or "NaN" in why


def _refusals() -> list[str]:
    """What only `train` may do with experts that replicas hold together."""
    model = fresh(CONFIGS["qwen3-moe"], seed=0, dp=2, ep=2)
    ids = torch.arange(6).view(1, 6)
    calls: list[Callable[[], Any]] = [
        lambda: model.generate(input_ids=ids, max_new_tokens=2),  # type: ignore[operator]
        lambda: model.train()(input_ids=ids),
        lambda: torch.nn.parallel.DistributedDataParallel(model),
        lambda: compile_layers(model),
    ]
    found = []
    for call in calls:
        with pytest.raises(ModelError) as error:
            call()
        found.append(str(error.value))
    return found


def test_refuses_what_replicas_cannot_do_together() -> None:
    for found in ranks(2).run(_refusals):
        for why, text in zip(found, ("requests of its own", "a loop of your own", "Parallel", "compiled"), strict=True):
            assert text in why
            assert "ep=2" in why
