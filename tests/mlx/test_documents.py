"""Documents of unequal lengths and masks on MLX: every mesh has the loss of each document alone, and of the torch engine."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from partita.errors import ModelError, PlanError
from partita.mlx.collectives.groups import single_groups
from partita.mlx.load import load, shard
from partita.mlx.train import train
from partita.training import Saves, StepReport, TrainSettings
from partita.training.data.encode import Encoded
from partita.training.data.samples import Samples
from partita.training.data.store import Store
from tests.mlx.test_stage import whole
from tests.support.mlx_ranks import mlx_ranks

SETTINGS = TrainSettings(steps=3, batch_size=4, sequence_length=14, learning_rate=1e-2, warmup_steps=2, eval_every=2)
PACKED = replace(SETTINGS, packing=True, sequence_length=23)
LENGTHS = (9, 2, 14, 4, 11, 3, 6, 17, 5, 8, 2, 13, 7)


def rows(count: int = len(LENGTHS)) -> list[dict[str, list[int]]]:
    """Documents of which the first third is not trained on, and at least one id."""
    made = []
    for number, length in enumerate(LENGTHS[:count]):
        ids = [(7 * i * i + 3 * i + 5 * number) % 97 for i in range(length)]
        first = max(1, length // 3)
        made.append({"input_ids": ids, "labels": [-100] * first + ids[first:]})
    return made


def _data(settings: TrainSettings) -> Samples:
    stores = [
        Store.of(Encoded(one["input_ids"], [label != -100 for label in one["labels"]]) for one in rows(count))
        for count in (len(LENGTHS), 5)
    ]
    return Samples.of(stores, settings, [3, 1])


def _numbers(reports: list[StepReport]) -> list[tuple[Any, ...]]:
    return [(r.loss, r.grad_norm, r.eval_loss, r.tokens) for r in reports]


def _compare(settings: TrainSettings, mesh: dict[str, int], count: int) -> list[tuple[Any, ...]]:
    model = whole("llama", mx.float64)
    alone = shard(copy.deepcopy(model), groups=single_groups())
    expected = _numbers(train(alone, _data(settings), settings, eval_data=rows(7)))
    split = shard(model, **mesh)
    settings = replace(settings, microbatches=count, checkpointing=settings.packing)
    found = _numbers(train(split, _data(settings), settings, eval_data=rows(7)))
    for mine, theirs in zip(found, expected, strict=True):
        assert mine[3] == theirs[3]
        # Some operations of MLX compute float64 in float32 so that only rounding of that is left.
        for one, other in zip(mine[:3], theirs[:3], strict=True):
            assert one == other or one == pytest.approx(other, rel=1e-6), (mine, theirs)
    return found


@pytest.mark.parametrize("settings", [SETTINGS, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("size", "mesh", "count"), [(2, {"dp": 2}, 2), (2, {"tp": 2}, 1), (2, {"pp": 2}, 2), (4, {"dp": 2, "pp": 2}, 2)]
)
def test_every_mesh_has_the_losses_of_one_rank(
    size: int, mesh: dict[str, int], count: int, settings: TrainSettings
) -> None:
    """Packed rows are recomputed in backward too."""
    found = mlx_ranks(size).run(_compare, settings, mesh, count)
    assert all(one == found[0] for one in found)
    assert [one[2] is not None for one in found[0]] == [False, True, True]


def _alone(model: Any, one: dict[str, list[int]]) -> tuple[float, int]:
    """The summed loss of a document in a batch of its own, and its labels."""
    labels = np.array(one["labels"][1:])
    logits = np.array(model(mx.array([one["input_ids"][:-1]]))[0].astype(mx.float64))
    logits -= logits.max(-1, keepdims=True)
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(labels)), labels]
    return float(losses[labels != -100].sum()), int((labels != -100).sum())


PACKED_FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({}, "float64"),
    "gpt_neox": ({}, "float64"),
    "gemma3_text": ({"sliding_window": 4}, "float64"),  # documents that are longer than the window
    "cohere2": ({"sliding_window": 4}, "float64"),
    "minicpm3": ({}, "float64"),  # frequencies of long and short texts
    "qwen3_moe": ({}, "float32"),
    "deepseek_v3": ({}, "float32"),
}


@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_packed_documents_have_the_loss_of_the_documents_alone(family: str) -> None:
    changes, dtype = PACKED_FAMILIES[family]
    model = shard(whole(family, getattr(mx, dtype), **changes), groups=single_groups())
    sums = [_alone(model, one) for one in rows()]
    expected = sum(loss for loss, _ in sums) / sum(count for _, count in sums)
    settings = replace(SETTINGS, packing=True, sequence_length=32, steps=1)
    stores = [Store.of(Encoded(one["input_ids"], [label != -100 for label in one["labels"]]) for one in rows())]
    samples = Samples.of(stores, settings)
    assert len(samples) < 6
    (report,) = train(model, samples, replace(settings, batch_size=len(samples)))
    # Some operations of MLX compute float64 in float32.
    assert report.loss == pytest.approx(expected, rel=1e-7 if dtype == "float64" else 1e-6)


def test_a_document_has_the_loss_of_the_document_alone() -> None:
    model = shard(whole("llama", mx.float64), groups=single_groups())
    sums = [_alone(model, one) for one in rows()]
    settings = replace(SETTINGS, steps=1, batch_size=len(LENGTHS), sequence_length=20)
    (report,) = train(model, rows(), settings)
    # Rotary embeddings are computed in float32.
    expected = sum(loss for loss, _ in sums) / sum(count for _, count in sums)
    assert report.loss == pytest.approx(expected, rel=1e-7)


def test_rows_with_positions_of_their_own() -> None:
    """A loader's rows, which hold two documents each."""
    model = shard(whole("llama", mx.float64), groups=single_groups())
    pairs = [(one, other) for one, other in zip(rows()[::2], rows()[1::2], strict=False)]
    width = max(len(a["input_ids"]) + len(b["input_ids"]) for a, b in pairs)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
    for a, b in pairs:
        left = width - len(a["input_ids"]) - len(b["input_ids"])
        batch["input_ids"].append([*a["input_ids"], *b["input_ids"], *[0] * left])
        batch["labels"].append([*a["labels"], *b["labels"], *[-100] * left])
        batch["position_ids"].append([*range(len(a["input_ids"])), *range(len(b["input_ids"])), *range(left)])
    sums = [_alone(model, one) for one in rows()[: 2 * len(pairs)]]
    expected = sum(loss for loss, _ in sums) / sum(count for _, count in sums)
    settings = replace(SETTINGS, steps=1, batch_size=len(pairs), sequence_length=width, packing=True)
    data = [{name: np.array(value) for name, value in batch.items()}]
    (report,) = train(model, data, settings)
    assert report.loss == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("gpt2", {}, r"its forward fails on a packed row|its logits of a packed row"),  # positions of a table
        ("mamba2", {}, "it keeps a state besides keys and values"),
        ("ministral3", {"sliding_window": None}, r"a token's place in the row \(llama_4_scaling_beta in its config\)"),
    ],
)
def test_families_whose_documents_are_not_independent_are_refused(
    family: str, changes: dict[str, Any], why: str
) -> None:
    model = shard(whole(family, **changes), groups=single_groups())
    with pytest.raises(ModelError, match=rf"{family} cannot be trained with packing \(--packing\) on MLX: .*({why})"):
        train(model, _data(PACKED), PACKED)


def test_the_model_is_as_before_a_packed_run() -> None:
    model = shard(whole("llama"), groups=single_groups())
    before = [type(module) for module in model.modules()]
    train(model, _data(PACKED), PACKED)
    assert [type(module) for module in model.modules()] == before


def test_a_resumed_run_sees_the_same_samples(tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=6)
    model = shard(whole("llama"), groups=single_groups())
    done = train(model, _data(settings), settings, saves=Saves(tmp_path, every=3), eval_data=rows(7))
    model = load(tmp_path / "step-000003", groups=single_groups())
    resumed = train(model, _data(settings), settings, resume=tmp_path / "step-000003", eval_data=rows(7))
    assert _numbers(resumed) == _numbers(done[3:])


@pytest.mark.parametrize(
    ("data", "settings", "says"),
    [
        (
            [{"input_ids": [[0, 1, 2]], "attention_mask": [[0, 1, 1]]}],
            SETTINGS,
            "padding must be behind the ids of a row",
        ),
    ],
)
def test_what_needs_positions_or_masks_is_refused(data: Any, settings: TrainSettings, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        train(shard(whole("llama"), groups=single_groups()), data, settings)


def test_batches_of_a_loader_in_arrays_of_mlx() -> None:
    batch = {"input_ids": mx.array([[1, 2, 3, 4], [5, 6, 0, 0]]), "attention_mask": mx.array([[1] * 4, [1, 1, 0, 0]])}
    settings = replace(SETTINGS, steps=2, batch_size=2)
    losses = [
        train(shard(whole("llama"), groups=single_groups()), data, settings)[0].loss
        for data in ([batch], [[1, 2, 3, 4], [5, 6]])
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
