"""The report of a generation: times from the arrival of each token, and what the command prints of it."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from partita.core.mesh import Mesh
from partita.generation import GenerationReport, Sampling, Sequence
from partita.generation.report import report_of
from partita.ranks.groups import AxisGroups
from tests.cli.conftest import Run, partita  # noqa: F401
from tests.cli.models import TINY, write
from tests.support.ranks import on


class Replica:
    """The first of two replicas, of which the other sends `report`."""

    rank, size = 0, 2

    def __init__(self, *report: float) -> None:
        self.report = list(report)

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value, self.report]


class Alone:
    rank, size = 0, 1


def arrived(prompt: int, *times_s: float) -> Sequence:
    sequence = Sequence(0, [1] * prompt, len(times_s))
    sequence.arrivals_s = list(times_s)
    return sequence


def test_prompts_end_with_the_first_token_of_the_last_sequence() -> None:
    """
    second  10        12     13        14   15   16
    call    | batch 1 a0     a1 b0     b1   b2 | batch 2 ... c0, c1
    """
    groups: Any = AxisGroups(Mesh(), *[Alone()] * 7)
    batches = [(10.5, [arrived(3, 12.0, 13.0), arrived(2, 13.0, 14.0, 15.0)]), (15.0, [arrived(4, 15.5, 16.0)])]
    found = report_of(10.0, batches, 7, groups)
    assert found == GenerationReport(2.0, 9, 2.5 + 0.5, 3, 2.0 + 0.5, 7)
    assert found.prefill_tokens_per_s == 3.0
    assert found.decode_tokens_per_s == 3 / 2.5


def test_replicas_add_their_tokens() -> None:
    groups: Any = AxisGroups(
        Mesh(dp=2), Alone(), Alone(), (both := Replica(1.5, 5, 2.0, 8, 3.0, 9)), Alone(), both, Alone(), both
    )
    found = report_of(0.0, [(0.0, [arrived(3, 1.0, 2.0)])], 7, groups)
    assert found == GenerationReport(1.0, 8, 2.0, 9, 3.0, 9)
    idle = report_of(0.0, [], 7, groups)
    assert idle == GenerationReport(1.5, 5, 2.0, 8, 3.0, 9)
    assert report_of(0.0, [(0.0, [arrived(3, 1.0)])], 0, AxisGroups(Mesh(), *[Alone()] * 7)).decode_tokens_per_s is None  # type: ignore[arg-type]


def reported(config: str, engine: str, mesh: dict[str, int]) -> tuple[list[float], float, int]:
    """A report as a list, the seconds that the call took, and how many reports there were."""
    if engine == "mlx":
        from partita.mlx import fresh, generate
    else:
        from partita.torch import fresh, generate  # type: ignore[assignment]
    reports: list[GenerationReport] = []
    model: Any = fresh(config, seed=0, **mesh)  # type: ignore[arg-type]
    start_s = time.perf_counter()
    sampling = Sampling(max_new_tokens=4, ignore_eos=True)
    generate(model, [[1, 2, 3], [4, 5], [6]], sampling, on_report=reports.append)
    (one,) = reports
    found = [
        one.first_token_s,
        one.prefill_tokens,
        one.prefill_s,
        one.decode_tokens,
        one.decode_s,
        one.peak_memory_bytes,
    ]
    return found, time.perf_counter() - start_s, len(reports)


@pytest.mark.parametrize("axis", ["tp", "pp", "dp"])
@pytest.mark.parametrize("engine", ["torch", "mlx"])
def test_every_rank_has_the_same_report(tmp_path: Path, engine: str, axis: str) -> None:
    config = write(tmp_path, TINY)
    if engine == "mlx":
        pytest.importorskip("mlx.core")
        from tests.support.mlx_ranks import on_mlx

        results = on_mlx(2, reported, config, engine, {axis: 2})
    else:
        results = on(2, reported, config, engine, {axis: 2})
    (one, total_s, _), (other, _, _) = results
    assert one == other
    first_s, prefill_tokens, prefill_s, decode_tokens, decode_s, peak_bytes = one
    assert prefill_tokens == 6
    # With stages or several batches a sequence may have a second token before the last one has its first.
    assert 0 < decode_tokens <= 9
    assert 0 < first_s <= total_s
    assert min(prefill_s, decode_s) > 0
    assert 50e6 < peak_bytes < 100e9


@pytest.mark.fresh
@pytest.mark.parametrize("engine", ["torch", "mlx"])
def test_the_command_prints_it(partita: Run, tmp_path: Path, engine: str) -> None:  # noqa: F811
    if engine == "mlx":
        pytest.importorskip("mlx_lm")
    from partita.torch.collectives.groups import single_groups
    from partita.torch.new import fresh
    from partita.torch.weights.save import save

    save(fresh(TINY, seed=3, groups=single_groups()), tmp_path / "m")
    line = ("generate", str(tmp_path / "m"), "import ", "--engine", engine, "--max-new-tokens", "5", "--ignore-eos")
    said = partita(*line)
    assert said.code == 0
    speeds, loaded = said.err.splitlines()[-2:]
    rate = r"\d+\.\d tokens/s"
    assert re.fullmatch(
        rf"5 tokens in \d+\.\d s on one rank, the first after \d+\.\d\d s, then {rate}, prompt {rate}", speeds
    )
    assert re.fullmatch(r"loaded in \d+\.\d s, peak memory \d+\.\d\d [MG]iB", loaded)
    assert "tokens/s" not in said.out
    found = json.loads(partita(*line, "--json").out)
    assert (found["prefill_tokens"], found["decode_tokens"]) == (7, 4)
    assert found["decode_tokens_per_s"] == pytest.approx(4 / found["decode_s"])
    assert found["prefill_tokens_per_s"] == pytest.approx(7 / found["prefill_s"])
    assert 0 < found["first_token_s"] <= found["generate_s"]
    assert found["peak_memory_bytes"] > 50e6
