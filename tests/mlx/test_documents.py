"""Documents of unequal lengths and masks on MLX: every mesh has the loss of each document alone, and of the torch engine."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from partita.errors import PlanError
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


def _compare(mesh: dict[str, int], count: int) -> list[tuple[Any, ...]]:
    model = whole("llama", mx.float64)
    alone = shard(copy.deepcopy(model), groups=single_groups())
    expected = _numbers(train(alone, _data(SETTINGS), SETTINGS, eval_data=rows(7)))
    split = shard(model, **mesh)
    settings = replace(SETTINGS, microbatches=count)
    found = _numbers(train(split, _data(settings), settings, eval_data=rows(7)))
    for mine, theirs in zip(found, expected, strict=True):
        assert mine[3] == theirs[3]
        # Some operations of MLX compute float64 in float32 so that only rounding of that is left.
        for one, other in zip(mine[:3], theirs[:3], strict=True):
            assert one == other or one == pytest.approx(other, rel=1e-6), (mine, theirs)
    return found


@pytest.mark.parametrize(
    ("size", "mesh", "count"), [(2, {"dp": 2}, 2), (2, {"tp": 2}, 1), (2, {"pp": 2}, 2), (4, {"dp": 2, "pp": 2}, 2)]
)
def test_every_mesh_has_the_losses_of_one_rank(size: int, mesh: dict[str, int], count: int) -> None:
    found = mlx_ranks(size).run(_compare, mesh, count)
    assert all(one == found[0] for one in found)
    assert [one[2] is not None for one in found[0]] == [False, True, True]


def test_a_document_has_the_loss_of_the_document_alone() -> None:
    model = shard(whole("llama", mx.float64), groups=single_groups())
    summed, count = 0.0, 0
    for one in rows():
        logits = np.array(model(mx.array([one["input_ids"][:-1]]))[0].astype(mx.float64))
        for row, label in zip(logits, one["labels"][1:], strict=True):
            if label != -100:
                summed += float(np.log(np.exp(row - row.max()).sum()) + row.max() - row[label])
                count += 1
    settings = replace(SETTINGS, steps=1, batch_size=len(LENGTHS), sequence_length=20)
    (report,) = train(model, rows(), settings)
    # Rotary embeddings are computed in float32.
    assert report.loss == pytest.approx(summed / count, rel=1e-7)


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
        (rows(), replace(SETTINGS, packing=True), "the MLX engine does not support packing=True"),
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
