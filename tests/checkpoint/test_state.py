"""The state of a training run: it reads back, it tells this run from another, and it knows nothing of layouts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita.errors import CheckpointError
from partita.training import TrainSettings
from partita.training.random import step_seed
from partita.training.state import FREE, STATE_NAME, TrainingState, kept_settings, read_state

TEXT = np.arange(100)
SETTINGS = TrainSettings(steps=20, batch_size=4, sequence_length=8, seed=3)
RUN = TrainingState.of(SETTINGS, TEXT, {"data": "text.txt"})


@given(
    st.integers(0, 10**9),
    st.builds(
        TrainSettings,
        steps=st.integers(1, 10**9),
        learning_rate=st.floats(0, 1e3),
        seed=st.integers(-(2**63), 2**63 - 1),
        autocast=st.sampled_from([None, "bfloat16"]),
        mask_token=st.none() | st.integers(0, 10**6),
    ),
)
def test_it_reads_back(tmp_path_factory: pytest.TempPathFactory, step: int, settings: TrainSettings) -> None:
    folder = tmp_path_factory.mktemp("made")
    state = TrainingState.of(settings, TEXT, {"data": "stdlib", "keep": None}).at(step)
    (folder / STATE_NAME).write_text(state.to_json(), encoding="utf-8")
    assert read_state(folder) == state


def test_it_does_not_depend_on_the_layout() -> None:
    other = replace(SETTINGS, microbatches=2, schedule="zb-h1", zero=True, checkpointing=True)
    assert TrainingState.of(other, TEXT, {"data": "text.txt"}).to_json() == RUN.to_json()
    assert not set(kept_settings(SETTINGS)) & set(FREE)


def test_the_position_in_the_data() -> None:
    assert RUN.at(7).sequences == 28
    assert json.loads(RUN.at(7).to_json())["data"]["sequences"] == 28


MAY_CHANGE: list[dict[str, Any]] = [
    {"steps": 21}, {"microbatches": 4}, {"schedule": "gpipe"}, {"group_size": 2}, {"zero": True}, {"checkpointing": True},
]  # fmt: skip
MAY_NOT: list[tuple[dict[str, Any], str]] = [
    ({"steps": 19}, r"steps \(20 then, 19 now; more are allowed\)"),
    ({"batch_size": 8}, r"batch_size \(4 then, 8 now\)"),
    ({"sequence_length": 9}, r"sequence_length \(8 then, 9 now\)"),
    ({"learning_rate": 1e-3}, r"learning_rate \(0.0003 then, 0.001 now\)"),
    ({"min_learning_rate": 0.0}, "min_learning_rate"),
    ({"warmup_steps": 0}, "warmup_steps"),
    ({"weight_decay": 0.0}, "weight_decay"),
    ({"epsilon": 1e-6}, "epsilon"),
    ({"clip_norm": 0.0}, "clip_norm"),
    ({"mtp_weight": 0.1}, "mtp_weight"),
    ({"mask_token": 1}, "mask_token"),
    ({"autocast": "bfloat16"}, r"autocast \(None then, 'bfloat16' now\)"),
    ({"master_dtype": "model"}, r"master_dtype \('float32' then, 'model' now\)"),
    ({"seed": 4, "batch_size": 2}, r"batch_size \(4 then, 2 now\), seed \(3 then, 4 now\)"),
]


@pytest.mark.parametrize("change", MAY_CHANGE)
def test_what_may_change(change: dict[str, Any]) -> None:
    assert RUN.at(7).go_on(TrainingState.of(replace(SETTINGS, **change), TEXT), Path("step-000007")) == 7


@pytest.mark.parametrize(("change", "said"), MAY_NOT)
def test_what_would_be_another_run(change: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=f"step-000007: the options specify another run, which differs in {said}"):
        RUN.at(7).go_on(TrainingState.of(replace(SETTINGS, **change), TEXT), Path("step-000007"))


@pytest.mark.parametrize("text", [TEXT[:-1], TEXT[::-1]])
def test_another_text_is_another_run(text: Any) -> None:
    with pytest.raises(CheckpointError, match=r"the text \(100 tokens then, (99|100) now, of other content\)"):
        RUN.go_on(TrainingState.of(SETTINGS, text), Path("step-000007"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, r"has no training_state\.json, so training cannot resume from it"),
        ("{}", "must have `partita_training: 1`, but has None"),
        ('{"partita_training": 1}', "is incomplete or changed: KeyError at 'step'"),
        (
            '{"partita_training": 1, "step": 1, "settings": {"speed": 1}, "data": {}, "notes": {}}',
            "is incomplete or changed",
        ),
        ("{", "the state"),
    ],
)
def test_what_is_no_state(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / STATE_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=said):
        read_state(tmp_path)


def test_every_step_replica_and_seed_draws_its_own_numbers() -> None:
    seeds = {step_seed(seed, step, replica) for seed in range(-5, 5) for step in range(50) for replica in range(8)}
    assert len(seeds) == 10 * 50 * 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Random bits: a half of them set, give or take four standard deviations.
    ones = sum(seed.bit_count() for seed in seeds)
    assert abs(ones - len(seeds) * 63 / 2) < 4 * (len(seeds) * 63 / 4) ** 0.5
