"""`train` with the caller's optimizer and loss: the run of a loop written by hand over the unsplit model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import partita.torch as pt
from partita.errors import CheckpointError, ModelError, PlanError
from partita.torch.collectives.groups import single_groups
from partita.torch.model.parts import local_tensors, plan_of
from partita.torch.proof.compare import local_part_of
from partita.training.saving import Saves
from tests.support.compare import assert_equal
from tests.support.models import CONFIGS
from tests.support.ranks import on

NAME = "llama-7-heads-1-kv"
SETTINGS = pt.TrainSettings(
    steps=4, batch_size=8, sequence_length=9, microbatches=2, clip_norm=0.5, lr_schedule="linear", warmup_steps=2
)
MESHES: dict[str, dict[str, int]] = {
    "alone": {},
    "tp": {"tp": 2},
    "dp": {"dp": 2},
    "pp": {"pp": 2},
    "tp-dp": {"tp": 2, "dp": 2},
}


def size_of(mesh: dict[str, int]) -> int:
    return mesh.get("tp", 1) * mesh.get("pp", 1) * mesh.get("dp", 1)


def batches() -> list[dict[str, Tensor]]:
    """Batches of which the replicas and the micro-batches have unequally many labels."""
    made = []
    for step in range(SETTINGS.steps):
        ids = torch.randint(1, 101, (8, 10), generator=torch.Generator().manual_seed(step))
        labels = ids.clone()
        for row in range(8):
            labels[row, : row + step % 2] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def unsplit_model() -> Any:
    return pt.fresh(CONFIGS[NAME], dtype="float64", seed=3, groups=single_groups()).train()


def split_model(mesh: dict[str, int]) -> Any:
    where: dict[str, Any] = dict(mesh) if mesh else {"groups": single_groups()}
    return pt.fresh(CONFIGS[NAME], dtype="float64", seed=3, **where)


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups with their own learning rates and weight decay."""
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    others = [p for name, p in model.named_parameters() if "norm" not in name]
    return [{"params": norms, "lr": 3e-2, "weight_decay": 0.0}, {"params": others}]


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adam": lambda model: torch.optim.Adam(groups_of(model), lr=1e-2, amsgrad=True),
    "nesterov": lambda model: torch.optim.SGD(
        groups_of(model), lr=1e-1, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1e-1),
}


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with smoothed labels, and the square of the logarithm of the sum of the exponentials."""
    trained = labels != -100
    entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=0.1)
    return entropy + 1e-2 * (logits.logsumexp(-1).square() * trained).sum()


def class_weights() -> Tensor:
    return torch.linspace(0.5, 2.0, 101, dtype=torch.float64)


def weighted(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), class_weights().to(logits.dtype), reduction="sum")


def weight_of(labels: Tensor) -> Tensor:
    return class_weights()[labels[labels != -100]].sum()


def by_sequence(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over sequences of their mean losses."""
    losses = F.cross_entropy(logits.mT, labels, reduction="none")
    return (losses.sum(1) / (labels != -100).sum(1).clamp(min=1)).sum()


LOSSES: dict[str, dict[str, Any]] = {
    "usual": {},
    "smoothed": {"loss": smoothed},
    "weighted": {"loss": weighted, "loss_weight": weight_of},
    "by_sequence": {"loss": by_sequence, "loss_weight": len},
}


def means(loss: str, logits: Tensor, labels: Tensor) -> Tensor:
    """The mean of a loss over a complete batch, as torch computes it where it does."""
    flat, goal = logits.flatten(0, 1), labels.flatten()
    if loss == "usual":
        return F.cross_entropy(flat, goal)
    if loss == "weighted":
        return F.cross_entropy(flat, goal, class_weights())
    if loss == "by_sequence":
        return torch.stack([F.cross_entropy(*one) for one in zip(logits, labels, strict=True)]).mean()
    squares = logits.logsumexp(-1).square()[labels != -100]
    return F.cross_entropy(flat, goal, label_smoothing=0.1) + 1e-2 * squares.mean()


def by_hand(optimizer: str, loss: str) -> tuple[Any, list[float], list[float], float]:
    """The unsplit model after the loop, its losses and norms, and the loss of the first batch with the last weights."""
    model = unsplit_model()
    stepper = OPTIMIZERS[optimizer](model)
    factors = [SETTINGS.rate_factor_at(step) for step in range(SETTINGS.steps)]
    rates = torch.optim.lr_scheduler.LambdaLR(stepper, lambda step: factors[min(step, len(factors) - 1)])
    losses, norms = [], []

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"][:, :-1], use_cache=False).logits
        return means(loss, logits, batch["labels"][:, 1:])

    for batch in batches():
        value = loss_of(batch)
        value.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.clip_norm)))
        stepper.step()
        rates.step()
        stepper.zero_grad()
        losses.append(float(value.detach()))
    with torch.no_grad():
        return model, losses, norms, float(loss_of(batches()[0]))


def assert_same_weights(model: Any, unsplit: Any) -> None:
    plan, groups = plan_of(model)
    whole = unsplit.state_dict()
    for name, tensor in local_tensors(model, plan).items():
        assert_equal(tensor, local_part_of(whole[name], plan, name, groups), 1e-10, name)


def _equal(mesh: dict[str, int], optimizer: str, loss: str) -> None:
    unsplit, losses, norms, evaluated = by_hand(optimizer, loss)
    model = split_model(mesh)
    stepper = OPTIMIZERS[optimizer](model)
    rates = [group["lr"] for group in stepper.param_groups]
    data = DataLoader(batches(), batch_size=None)  # type: ignore[arg-type]
    held = DataLoader(batches()[:1], batch_size=None)  # type: ignore[arg-type]
    reports = pt.train(model, data, SETTINGS, eval_data=held, optimizer=stepper, **LOSSES[loss])
    assert [r.loss for r in reports] == pytest.approx(losses, rel=1e-11)
    assert [r.grad_norm for r in reports] == pytest.approx(norms, rel=1e-10)
    assert reports[-1].eval_loss == pytest.approx(evaluated, rel=1e-10)
    assert [r.learning_rate for r in reports] == [rates[0] * SETTINGS.rate_factor_at(n) for n in range(SETTINGS.steps)]
    assert [group["lr"] for group in stepper.param_groups] == rates
    assert losses[-1] != losses[0]
    assert_same_weights(model, unsplit)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
    ("optimizer", "loss"),
    [("adam", "usual"), ("adam", "smoothed"), ("nesterov", "weighted"), ("sgd", "by_sequence")],
)
def test_the_run_is_that_of_a_loop_by_hand(mesh: str, optimizer: str, loss: str) -> None:
    on(size_of(MESHES[mesh]), _equal, MESHES[mesh], optimizer, loss)


def _run(mesh: dict[str, int], optimizer: str, folder: str, resume: str | None, **given: Any) -> list[Any]:
    where: dict[str, Any] = dict(mesh) if mesh else {"groups": single_groups()}
    model = pt.load(resume, **where) if resume is not None else split_model(mesh)
    stepper = OPTIMIZERS[optimizer](model)
    data = DataLoader(batches(), batch_size=None)  # type: ignore[arg-type]
    saves = Saves(Path(folder), every=2, max_shard_bytes=60_000)
    reports = pt.train(
        model, data, SETTINGS, saves=saves, resume=resume, optimizer=stepper, **{"loss": smoothed, **given}
    )
    assert_same_weights(model, by_hand(optimizer, "smoothed")[0])
    return [[r.step, r.loss, r.grad_norm] for r in reports]


@pytest.mark.parametrize(
    ("optimizer", "first", "second"),
    [("adam", "tp", "pp"), ("adam", "dp", "tp-dp"), ("nesterov", "alone", "dp"), ("sgd", "pp", "tp")],
)
def test_a_run_resumes_in_any_layout(optimizer: str, first: str, second: str, tmp_path: Path) -> None:
    whole = on(size_of(MESHES[first]), _run, MESHES[first], optimizer, str(tmp_path / "one"), None)
    source = str(tmp_path / "one" / "step-000002")
    rest = on(size_of(MESHES[second]), _run, MESHES[second], optimizer, str(tmp_path / "two"), source)
    for reports in rest:
        for found, expected in zip(reports, whole[0][2:], strict=True):
            assert found == pytest.approx(expected, rel=1e-10)
    for run in ("one", "two"):
        state = json.loads((tmp_path / run / "latest" / "training_state.json").read_text())
        assert state["own"] == [f"optimizer {'Adam' if optimizer == 'adam' else 'SGD'}", "loss"]
        assert (tmp_path / run / "latest" / "optimizer.json").is_file()


def test_another_optimizer_or_loss_is_another_run(tmp_path: Path) -> None:
    _run({}, "sgd", str(tmp_path / "one"), None)
    source = str(tmp_path / "one" / "step-000002")
    data = DataLoader(batches(), batch_size=None)  # type: ignore[arg-type]
    changes: list[dict[str, Any]] = [
        {"loss": smoothed},
        {"optimizer": OPTIMIZERS["adam"], "loss": smoothed},
        {"optimizer": OPTIMIZERS["sgd"]},
    ]
    for change in changes:
        model = pt.load(source, groups=single_groups())
        given = {**change, **({"optimizer": change["optimizer"](model)} if "optimizer" in change else {})}
        with pytest.raises(
            CheckpointError, match=r"gave to train\(\) as optimizer= and loss= \(optimizer SGD, loss then"
        ):
            pt.train(model, data, SETTINGS, resume=source, **given)


@pt.elementwise_optimizer
class NeedsClosure(torch.optim.SGD):
    def step(self, closure: Any) -> None:  # type: ignore[override]
        super().step(closure)


def _refused_optimizers(mesh: dict[str, int]) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, other = split_model(mesh), split_model(mesh)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rank = plan_of(model)[1].rank
    own = list(model.parameters())
    sgd = torch.optim.SGD(own, lr=0.1)
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        ("adamw", {}, ModelError, r"optimizer must be a torch\.optim\.Optimizer .*got 'adamw'"),
        (sgd, {"zero": True}, PlanError, "zero shards the state of the optimizer that train creates"),
        (sgd, {"weight_decay": 0.2, "beta1": 0.8}, PlanError, "weight_decay, beta1 of the settings"),
        (
            torch.optim.SGD(other.parameters()),
            {},
            ModelError,
            "parameters of optimizer, one of shape .* are not the model",
        ),
        (
            torch.optim.SGD(own[1:]),
            {},
            ModelError,
            r"optimizer leaves out model\.embed_tokens.*freeze it",
        ),
        (NeedsClosure(own), {}, ModelError, "needs a closure"),
        (ZeroRedundancyOptimizer(own, torch.optim.SGD, lr=0.1), {}, ModelError, "state on several replicas"),
        (
            sgd if rank == 0 else None,
            {},
            ModelError,
            "on every rank; got SGD with 1 groups on rank 0, and none on rank 1",
        ),
    ]
    for optimizer, change, kind, text in cases:
        with pytest.raises(kind, match=text):
            pt.train(model, torch.arange(500) % 23, replace(SETTINGS, **change), optimizer=optimizer)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("mesh", ["tp", "dp"])
def test_optimizers_that_cannot_train_are_refused_before_any_step(mesh: str) -> None:
    on(2, _refused_optimizers, MESHES[mesh])


def _refused_losses() -> None:
    model = split_model({"pp": 2})
    cases: list[tuple[dict[str, Any], str]] = [
        ({"loss": lambda logits, labels: logits.sum(-1)}, r"returned torch.float32 \[1, 2\]"),
        ({"loss": lambda logits, labels: logits.detach().sum()}, r"returned torch.float32 \[\] without a gradient"),
        ({"loss": lambda logits, labels: 3.0}, "returned 3.0"),
        ({"loss": smoothed, "loss_weight": lambda labels: -1}, "at least 0; got -1.0"),
        ({"loss_weight": len}, "Give loss too"),
    ]
    for given, text in cases:
        with pytest.raises(ModelError, match=text):
            pt.train(model, torch.arange(500) % 23, SETTINGS, **given)


def test_losses_of_another_form_are_refused_on_every_rank() -> None:
    on(2, _refused_losses)


def _groups_of_a_stage() -> list[float]:
    """Train the layers of the last stage only; the first stage has an empty group."""
    model = split_model({"pp": 2})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("lm_head"))
    optimizer = torch.optim.SGD([{"params": [p for p in model.parameters() if p.requires_grad]}], lr=0.1)
    reports = pt.train(model, torch.arange(500) % 23, SETTINGS, optimizer=optimizer)
    return [r.loss for r in reports]


def test_a_stage_may_train_nothing() -> None:
    first, second = on(2, _groups_of_a_stage)
    assert first == second
    assert first[-1] < first[0]


def _adapted(mesh: dict[str, int], base: str, folder: str, resume: str | None) -> list[list[float]]:
    """Train adapters on a model with a tied head, from the beginning or from a checkpoint."""
    where: dict[str, Any] = dict(mesh) if mesh else {"groups": single_groups()}
    model = pt.load(base, **where)
    if resume is None:
        pt.add_lora(model, 4, seed=1)
    else:
        pt.load_adapters(model, resume)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2, amsgrad=True)
    data = DataLoader(batches(), batch_size=None)  # type: ignore[arg-type]
    saves = Saves(Path(folder), every=2, base=base)
    reports = pt.train(model, data, SETTINGS, saves=saves, resume=resume, optimizer=optimizer)
    return [[r.step, r.loss, r.grad_norm] for r in reports]


def test_adapters_resume_in_another_layout(tmp_path: Path) -> None:
    base = str(tmp_path / "base")
    pt.save(pt.fresh(CONFIGS["llama-biases-tied"], dtype="float64", seed=3, groups=single_groups()), base)
    (whole,) = on(1, _adapted, {}, base, str(tmp_path / "one"), None)
    assert len({loss for _, loss, _ in whole}) == 4
    for mesh in ("tp", "pp"):
        source = str(tmp_path / "one" / "step-000002")
        for reports in on(2, _adapted, MESHES[mesh], base, str(tmp_path / mesh), source):
            for found, expected in zip(reports, whole[2:], strict=True):
                assert found == pytest.approx(expected, rel=1e-9)


def _tied(mesh: dict[str, int], folder: str, resume: str | None) -> list[list[float]]:
    where: dict[str, Any] = dict(mesh) if mesh else {"groups": single_groups()}
    name = CONFIGS["llama-biases-tied"]
    model = pt.load(resume, **where) if resume else pt.fresh(name, dtype="float64", seed=3, **where)
    optimizer = torch.optim.NAdam(model.parameters(), lr=1e-2)
    data = DataLoader(batches(), batch_size=None)  # type: ignore[arg-type]
    saves = Saves(Path(folder), every=2)
    reports = pt.train(model, data, SETTINGS, saves=saves, resume=resume, optimizer=optimizer, loss=smoothed)
    return [[r.step, r.loss, r.grad_norm] for r in reports]


def test_a_tied_head_on_two_stages_resumes(tmp_path: Path) -> None:
    (whole,) = on(1, _tied, {}, str(tmp_path / "one"), None)
    for reports in on(2, _tied, MESHES["pp"], str(tmp_path / "pp"), None):
        for found, expected in zip(reports, whole, strict=True):
            assert found == pytest.approx(expected, rel=1e-9)
    for mesh in ("tp", "pp"):
        source = str(tmp_path / "pp" / "step-000002")
        for reports in on(2, _tied, MESHES[mesh], str(tmp_path / f"again-{mesh}"), source):
            for found, expected in zip(reports, whole[2:], strict=True):
                assert found == pytest.approx(expected, rel=1e-9)
