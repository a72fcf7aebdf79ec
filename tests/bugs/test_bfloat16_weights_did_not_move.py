"""A bfloat16 model was trained in bfloat16: at the default learning rate most steps of a norm's weight were rounded away."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from partita.errors import CheckpointError
from partita.torch.collectives.groups import single_groups
from partita.torch.load import load
from partita.torch.model.parts import local_tensors, plan_of
from partita.torch.new import fresh
from partita.torch.stages.pipeline import Pipeline
from partita.torch.train import accumulate_gradients, make_optimizer, make_saver, train
from partita.torch.training.replicas import clip_gradients
from partita.torch.weights.adapters import add_lora
from partita.torch.weights.moments import Held, restore_optimizer
from partita.torch.weights.peft_format import load_adapters
from partita.torch.weights.save import save
from partita.training import TrainSettings, schedule_of
from partita.training.saving import Saves
from partita.training.state import read_state
from tests.support.batches import batch
from tests.support.masters import distance, masters_of
from tests.support.models import CONFIGS
from tests.support.ranks import on
from tests.torch.test_resume import digest

SETTINGS = TrainSettings(steps=20, batch_size=4, sequence_length=12, min_learning_rate=1.0)
"""The default learning rate, after its warm-up."""
LLAMA: dict[str, Any] = {**CONFIGS["llama-3-heads"], "tie_word_embeddings": True}
"""Its head is tied to its embedding, which two stages hold; every tensor rank holds its one KV head."""

Layout = dict[str, Any]
ALONE: Layout = {}
LAYOUTS: list[Any] = [
    {"tp": 2},
    {"pp": 2},
    {"dp": 2, "zero": True},
    pytest.param({"dp": 2, "zero": 3}, marks=pytest.mark.slow),
    pytest.param({"tp": 3}, marks=pytest.mark.slow),
    pytest.param({"dp": 2}, marks=pytest.mark.slow),
    pytest.param({"tp": 2, "pp": 2}, marks=pytest.mark.slow),
]


def tokens() -> Tensor:
    return torch.arange(2000) ** 2 % 23


def size_of(layout: Layout) -> int:
    return math.prod(size for axis, size in layout.items() if axis != "zero")


def where(layout: Layout) -> dict[str, Any]:
    mesh = {axis: size for axis, size in layout.items() if axis != "zero"}
    return mesh or {"groups": single_groups()}


def run(layout: Layout, folder: str, resume: str | None = None, **changes: Any) -> None:
    """Train to the end, with checkpoints, from the beginning or from a checkpoint."""
    torch.set_num_threads(1)
    model = load(resume, **where(layout)) if resume else fresh(LLAMA, seed=3, dtype="bfloat16", **where(layout))
    settings = replace(SETTINGS, zero=layout.get("zero", False), **changes)
    train(model, tokens(), settings, saves=Saves(Path(folder), every=10, max_shard_bytes=60_000), resume=resume)


def on_disk(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank: its checkpoint at the middle and the one at its end."""
    folder = tmp_path_factory.mktemp("alone")
    run(ALONE, str(folder))
    return folder


def test_norm_weights_move_at_the_default_rate(alone: Path) -> None:
    tensors = on_disk(alone / "step-000020")
    masters = masters_of(tensors)
    weights = {n: t for n, t in tensors.items() if not n.startswith(("master.", "exp_avg"))}
    assert masters.keys() == weights.keys()
    for name, master in masters.items():
        assert master.dtype == tensors[f"exp_avg.{name}"].dtype == tensors[f"exp_avg_sq.{name}"].dtype == torch.float32
        assert weights[name].dtype == torch.bfloat16
        assert torch.equal(weights[name], master.bfloat16())
    norms = [t for n, t in weights.items() if "norm" in n]
    assert len(norms) == 5
    assert all(bool((norm != 1).any()) for norm in norms)


def test_masters_follow_a_float32_run(alone: Path) -> None:
    start = fresh(LLAMA, seed=3, dtype="bfloat16", groups=single_groups()).float()
    first = {name: tensor.detach().clone() for name, tensor in local_tensors(start, plan_of(start)[0]).items()}
    train(start, tokens(), SETTINGS)
    exact = {n: t.detach() for n, t in local_tensors(start, plan_of(start)[0]).items()}
    masters = masters_of(on_disk(alone / "step-000020"))
    for tensors in (exact, first):
        tensors.pop("lm_head.weight")
    assert distance(masters, exact, first) < 0.02


def by_hand(layout: Layout) -> tuple[float, bool]:
    """The largest difference between a model that `train` trained and one whose copies torch's own AdamW steps.

    Also whether any parameter differs from where it began.
    """
    settings = replace(SETTINGS, steps=4, learning_rate=3e-3, warmup_steps=1, clip_norm=0.5, microbatches=2)
    trained, other = (fresh(LLAMA, seed=3, dtype="bfloat16", **where(layout)) for _ in range(2))
    first = [p.detach().clone() for p in trained.parameters()]
    train(trained, tokens(), replace(settings, zero=layout.get("zero", False)))
    plan, groups = plan_of(other)
    copies = {p: p.detach().float() for p in other.parameters()}
    optimizer = torch.optim.AdamW(
        [
            {"params": [c for c in copies.values() if c.dim() >= 2], "weight_decay": settings.weight_decay},
            {"params": [c for c in copies.values() if c.dim() < 2], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95), eps=settings.epsilon,
    )  # fmt: skip
    pipeline = Pipeline(other, schedule_of(plan, settings))
    other.train()
    for step in range(settings.steps):
        rows = batch(tokens(), step, settings.batch_size, settings.sequence_length, settings.seed)
        accumulate_gradients(pipeline, rows, step, settings)
        clip_gradients(other, plan, groups, settings.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(step)
        for parameter, copy in copies.items():
            copy.grad = parameter.grad.float() if parameter.grad is not None else None
        optimizer.step()
        with torch.no_grad():
            for parameter, copy in copies.items():
                parameter.copy_(copy)
        other.zero_grad(set_to_none=True)
    pairs = list(zip(trained.parameters(), other.parameters(), strict=True))
    assert all(p.dtype == torch.bfloat16 for pair in pairs for p in pair)
    moved = any(not torch.equal(a, b) for (a, _), b in zip(pairs, first, strict=True))
    return max(float((a - b).detach().abs().max()) for a, b in pairs), moved


@pytest.mark.parametrize("layout", [ALONE, *LAYOUTS], ids=str)
def test_every_rank_steps_float32_copies(layout: Layout) -> None:
    assert on(size_of(layout), by_hand, layout) == [(0.0, True)] * size_of(layout)


@pytest.mark.parametrize("layout", [ALONE, *LAYOUTS], ids=str)
def test_resumes_bit_for_bit_on_the_same_layout(layout: Layout, alone: Path, tmp_path: Path) -> None:
    whole = alone
    if layout:
        on(size_of(layout), run, layout, str(tmp_path / "whole"))
        whole = tmp_path / "whole"
    on(size_of(layout), run, layout, str(tmp_path / "again"), str(whole / "step-000010"))
    assert digest(tmp_path / "again" / "step-000020") == digest(whole / "step-000020")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_resumes_on_another_layout(layout: Layout, alone: Path, tmp_path: Path) -> None:
    on(size_of(layout), run, layout, str(tmp_path), str(alone / "step-000010"))
    start, expected, found = (
        masters_of(on_disk(folder))
        for folder in (alone / "step-000010", alone / "step-000020", tmp_path / "step-000020")
    )
    assert distance(found, expected, start) < 0.02


def write_again(layout: Layout, source: str, folder: str) -> tuple[int, int]:
    """Load a checkpoint with the optimizer's state, and write it without a step between.

    Returns:
        The elements of the masters on this rank, and of its parameters.
    """
    model = load(source, **where(layout))
    optimizer = make_optimizer(model, replace(SETTINGS, zero=layout.get("zero", False)), plan_of(model)[1])
    state = read_state(Path(source))
    restore_optimizer(model, optimizer, Path(source))
    with make_saver(model, optimizer, Saves(Path(folder), every=1, max_shard_bytes=60_000), state) as saver:
        saver.after(state.step)
        saver.wait()
    inner = Held.of(optimizer).inner
    assert inner is not None
    kept = sum(one["master"].numel() for one in inner.state.values())
    return kept, sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("layout", [ALONE, *LAYOUTS], ids=str)
def test_masters_on_disk_do_not_depend_on_the_layout(layout: Layout, alone: Path, tmp_path: Path) -> None:
    kept = on(size_of(layout), write_again, layout, str(alone / "step-000010"), str(tmp_path))
    assert digest(tmp_path / "step-000010") == digest(alone / "step-000010")
    if layout.get("zero"):
        (first, whole), (second, _) = kept
        assert first + second == whole
        assert max(first, second) < 0.6 * whole
    else:
        assert all(one == whole for one, whole in kept)


def change_state(folder: Path, change: Any) -> None:
    """Rewrite the optimizer's state of a checkpoint as `change` makes it, in one file."""
    state = {n: t for n, t in on_disk(folder).items() if n.startswith(("master.", "exp_avg"))}
    for file in folder.glob("optimizer*"):
        file.unlink()
    save_file(change(state), folder / "optimizer.safetensors")


def copied(source: Path, folder: Path) -> Path:
    (folder / "run").mkdir()
    for file in source.iterdir():
        (folder / "run" / file.name).write_bytes(file.read_bytes())
    return folder / "run"


def restored(source: Path, **changes: Any) -> dict[str, Tensor]:
    """The masters that an optimizer has after it went on from a checkpoint, by name."""
    model = load(source, dtype=changes.pop("dtype", None), groups=single_groups())
    plan, groups = plan_of(model)
    optimizer = make_optimizer(model, replace(SETTINGS, **changes), groups)
    assert optimizer is not None
    restore_optimizer(model, optimizer, source)
    return {n: optimizer.state[p]["master"] for n, p in local_tensors(model, plan).items() if n != "lm_head.weight"}


def test_a_checkpoint_without_masters_goes_on_from_its_weights(alone: Path, tmp_path: Path) -> None:
    source = copied(alone / "step-000010", tmp_path)
    change_state(source, lambda state: {n: t.bfloat16() for n, t in state.items() if not n.startswith("master.")})
    weights = on_disk(source)
    masters = restored(source)
    assert masters.keys() == {n for n in weights if not n.startswith("exp_avg")}
    for name, master in masters.items():
        assert master.dtype == torch.float32
        assert torch.equal(master, weights[name].float())
    run(ALONE, str(tmp_path / "again"), str(source))


def test_state_of_another_dtype_is_refused(alone: Path, tmp_path: Path) -> None:
    source = alone / "step-000010"
    with pytest.raises(
        CheckpointError, match=r"has master\.\S+, so \S+ was trained there in a narrower dtype than torch.float32"
    ):
        restored(source, dtype="float32")
    with pytest.raises(CheckpointError, match=r"has master\.\S+, .* and keep the run's master_dtype"):
        restored(source, master_dtype="model")
    with pytest.raises(CheckpointError, match=r"differs in master_dtype \('float32' then, 'model' now\)"):
        run(ALONE, str(tmp_path / "again"), str(source), master_dtype="model")
    wide = copied(source, tmp_path)
    change_state(wide, lambda state: {n: t for n, t in state.items() if not n.startswith("master.")})
    with pytest.raises(
        CheckpointError, match=r"exp_avg\.\S+ is F32, but \S+ was loaded as torch.bfloat16\. Load it in its own dtype"
    ):
        restored(wide)


def test_the_models_dtype_on_request(tmp_path: Path) -> None:
    run(ALONE, str(tmp_path), master_dtype="model", steps=2)
    tensors = on_disk(tmp_path / "step-000002")
    assert not masters_of(tensors)
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}


def test_autocast_changes_nothing_of_a_bfloat16_model_on_a_cpu() -> None:
    losses = []
    for autocast in (None, "bfloat16"):
        model = fresh(LLAMA, seed=3, dtype="bfloat16", groups=single_groups())
        losses.append([r.loss for r in train(model, tokens(), replace(SETTINGS, steps=3, autocast=autocast))])
    assert losses[0] == losses[1]


def adapted(layout: Layout, base: str, folder: str, resume: str | None = None) -> None:
    torch.set_num_threads(1)
    model = load(base, **where(layout))
    if resume is None:
        add_lora(model, 2, seed=5)
    else:
        load_adapters(model, resume)
    settings = replace(SETTINGS, zero=layout.get("zero", False))
    train(model, tokens(), settings, saves=Saves(Path(folder), every=10, base=base), resume=resume)


@pytest.mark.parametrize(
    "layout", [ALONE, {"tp": 2}, pytest.param({"dp": 2, "zero": True}, marks=pytest.mark.slow)], ids=str
)
def test_adapters_of_a_bfloat16_model_have_masters(layout: Layout, tmp_path: Path) -> None:
    base = str(tmp_path / "base")
    save(fresh(LLAMA, seed=3, dtype="bfloat16", groups=single_groups()), base)
    on(size_of(layout), adapted, layout, base, str(tmp_path / "whole"))
    on(size_of(layout), adapted, layout, base, str(tmp_path / "again"), str(tmp_path / "whole" / "step-000010"))
    last = tmp_path / "whole" / "step-000020"
    assert digest(tmp_path / "again" / "step-000020") == digest(last)
    tensors = load_file(last / "adapter_model.safetensors")
    masters = masters_of(on_disk(last))
    assert masters.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16
        assert masters[name].dtype == torch.float32
        assert torch.equal(tensor, masters[name].bfloat16())
        assert not torch.equal(tensor.float(), masters[name])
