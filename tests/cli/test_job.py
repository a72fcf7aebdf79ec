"""Jobs: what a launcher sends to its ranks is what they receive, and nothing is parsed or planned again."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from partita.cli.app import JOBS
from partita.cli.arguments.data import DataSources
from partita.cli.arguments.model import make_plan
from partita.cli.generate import GenerateJob
from partita.cli.job import from_json, to_json
from partita.cli.train_job import TrainJob
from partita.cli.verify import VerifyJob
from partita.core.mesh import Mesh
from partita.core.request import PlanRequest
from partita.core.sharding.rules import Rule, Rules
from partita.generation import Sampling
from tests.cli.models import TINY

RULES = Rules((Rule("lm_head", "vocab"),), proven=True)
SAMPLING = Sampling(
    max_new_tokens=3, temperature=0.5, stop=("a", "b"), logit_bias={3: -1.5, 7: 2.0}, bad_words_ids=((1, 2), (3,))
)


def request(tmp_path: Path, **options: Any) -> PlanRequest:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return PlanRequest.parse(str(tmp_path / "config.json"), Mesh(pp=2), "Et|tL", **options)


@pytest.mark.parametrize("is_planned", [True, False])
@pytest.mark.parametrize("kind", ["generate", "train", "verify"])
def test_a_rank_receives_what_was_sent(tmp_path: Path, kind: str, is_planned: bool) -> None:
    asked = request(tmp_path, rules=RULES, dtype="float64", placement="loop")
    given: dict[str, Any] = {"request": asked, "plan": make_plan(asked) if is_planned else None, "device": "cpu"}
    jobs = {
        "generate": lambda: GenerateJob(
            **given, texts=["a", "ä\n"], sampling=SAMPLING, adapters=tmp_path, verify=True, stream=False, as_json=True
        ),
        "train": lambda: TrainJob(
            **given, new=True, data=DataSources(["x", "y"], [0.5, 2.0], "text", []),
            notes={"data": ["x"], "layout": {"tp": 1}, "keep": None},
            options={"steps": 3, "seed": 0},
            out=tmp_path, resume=False, verify=True, lora_rank=None, lora={}, as_json=False, picture=None,
            trace=tmp_path / "t.json", profile=None,
        ),
        "verify": lambda: VerifyJob(
            **given, training={"microbatches": 2, "schedule": None}, steps=1, zero=3, dtypes=["float64"], all_rows=False,
            as_json=True,
        ),
    }  # fmt: skip
    sent = jobs[kind]()
    received, debug = from_json(to_json(sent, debug=True), JOBS)
    assert debug
    assert type(received) is type(sent)
    assert {**vars(received)} == {**vars(sent)}


def test_sampling_travels_whole(tmp_path: Path) -> None:
    job = GenerateJob(
        request=request(tmp_path),
        texts=["a"],
        sampling=SAMPLING,
        adapters=None,
        verify=True,
        stream=True,
        as_json=False,
    )
    received, _ = from_json(to_json(job, debug=False), JOBS)
    assert isinstance(received, GenerateJob)
    assert asdict(received.sampling) == asdict(SAMPLING)
