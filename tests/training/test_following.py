"""What is recorded of a run, without an engine: learning rates, model FLOPs, reports, the error of divergence, the progress."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from partita.cli.arguments.command import completed
from partita.cli.terminal.progress import Recent
from partita.core.model.families import spec_from_config
from partita.cost.flops import flops_per_token, peak_flops
from partita.errors import DependencyError, ModelError, PlanError
from partita.training import Profile, StepReport, TrainSettings
from partita.training.finite import Fault, diverged
from partita.training.reporting import JsonLines, TensorBoard, open_reporters, recording

CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
}  # fmt: skip


def report(step: int, **changes: Any) -> StepReport:
    return StepReport(**{
        "step": step, "loss": 4.0 / step, "learning_rate": 1e-3, "grad_norm": 1.5, "tokens": 100, "seconds": 0.5,
        "memory_bytes": 1 << 20, "mfu": 0.25, **changes,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({"lr_schedule": "cosine"}, [0.5, 1, 1, 0.8681981, 0.55, 0.2318019]),
        ({"lr_schedule": "linear"}, [0.5, 1, 1, 0.775, 0.55, 0.325]),
        ({"lr_schedule": "constant"}, [0.5, 1, 1, 1, 1, 1]),
        ({"lr_schedule": "wsd", "decay_steps": 2}, [0.5, 1, 1, 1, 1, 0.55]),
        ({"lr_schedule": "wsd", "decay_steps": 2, "min_learning_rate": 0.0}, [0.5, 1, 1, 1, 1, 0.5]),
    ],
)
def test_learning_rates(changes: dict[str, Any], rates: list[float]) -> None:
    settings = TrainSettings(steps=6, warmup_steps=2, learning_rate=2.0, **changes)
    assert [settings.learning_rate_at(step) / 2 for step in range(6)] == pytest.approx(rates, rel=1e-6)


def test_flops_of_a_token() -> None:
    spec = spec_from_config(CONFIG)
    attention = 12 * 4 * 32 * 64
    assert flops_per_token(spec, 64) == 6 * spec.parameters + attention
    assert flops_per_token(spec, 64, is_frozen=True) == 4 * spec.parameters + attention
    experts = {**CONFIG, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4}
    two, four = (spec_from_config({**experts, "num_experts_per_tok": n}) for n in (2, 4))
    routed = sum(t.numel for t in four.tensors.values() if ".experts." in t.name)
    assert flops_per_token(four, 64) - flops_per_token(two, 64) == 6 * routed / 2


def test_peaks_by_the_name_of_a_device() -> None:
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("Radeon") is None


def test_lines_continue_without_duplicates_after_a_crash(tmp_path: Path) -> None:
    first = JsonLines(tmp_path)
    first.begin(0, {})
    for step in (1, 2, 3):
        first.step(report(step))
        assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == step  # flushed
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    first.close()
    again = JsonLines(tmp_path)
    again.begin(2, {})
    again.step(report(3, eval_loss=0.5))
    again.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[2] == {
        "step": 3, "loss": 4 / 3, "grad_norm": 1.5, "learning_rate": 1e-3, "tokens_per_s": 200.0, "memory_bytes": 1 << 20,
        "mfu": 0.25, "eval_loss": 0.5,
    }  # fmt: skip


def events_in(folder: Path) -> list[Any]:
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for file in sorted(folder.iterdir()):
        data, place = file.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            events.append(Event.FromString(data[place + 12 : place + 12 + length]))
            place += 16 + length
    return events


def test_tensorboard_drops_the_steps_that_a_resumed_run_repeats(tmp_path: Path) -> None:
    for done, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        with recording([board := TensorBoard(tmp_path)], done, {}):
            for step in steps:
                board.step(report(step))
    events = events_in(tmp_path / "tensorboard")
    losses = [(e.step, value.simple_value) for e in events for value in e.summary.value if value.tag == "loss"]
    assert losses == [(s, pytest.approx(4.0 / s)) for s in (1, 2, 3, 3, 4)]
    starts = [e for e in events if e.HasField("session_log")]
    # A reader drops what it has of the steps from here on.
    assert [(e.step, e.session_log.status) for e in starts] == [(3, 1)]


def test_a_missing_package_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        DependencyError, match=r"needs the package wandb, which is not installed\. Install it with `pip install"
    ):
        open_reporters(["jsonl", "wandb"], tmp_path)
    with pytest.raises(ModelError, match=r"must be one of jsonl, tensorboard, wandb, but is 'csv'"):
        open_reporters(["csv"], tmp_path)


def test_wandb_offline_continues_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from partita.training.reporting import Wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for done in (0, 2):
        with recording([run := Wandb(tmp_path)], done, {"steps": 4}):
            run.step(report(done + 1))
        ids.append((tmp_path / "wandb-run-id").read_text())
    assert ids[0] == ids[1]
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) >= 1


def test_the_error_names_replica_ranks_and_samples() -> None:
    settings = TrainSettings(batch_size=8, microbatches=2)
    faults = [Fault(0, 0), Fault(1, 0, (), "a"), Fault(2, 1), Fault(3, 1, (1,), "a")]
    said = str(diverged(4, float("nan"), float("nan"), settings, 2, faults))
    assert said.startswith(
        "step 5: the loss is nan, on replica 1 (rank 3), in the run's samples 38-39 (counted from 0)."
    )
    said = str(diverged(4, 2.0, float("inf"), settings, 2, [Fault(0, 0), Fault(1, 1, (), "x.weight")]))
    assert "the loss is 2.0 and the gradient's norm inf, on replica 1 (rank 1), in the run's samples 36-39" in said
    assert "the gradient of x.weight on rank 1 is not finite" in said


def test_speed_is_averaged_without_the_first_step() -> None:
    recent = Recent()
    assert "10 tokens/s MFU 25.0% 1.00 MiB" in recent.describe(report(1, seconds=10.0))
    assert "200 tokens/s" in recent.describe(report(2))
    line = recent.describe(report(3, seconds=1.5, mfu=0.05, eval_loss=1.0))
    assert "evaluation 1.0000" in line
    assert "100 tokens/s MFU 10.0%" in line
    assert "MFU" not in Recent().describe(report(1, mfu=None))


def test_an_option_without_its_value() -> None:
    assert completed(["--checkpointing", "--tp", "2"]) == ["--checkpointing=full", "--tp", "2"]
    assert completed(["--checkpointing"]) == ["--checkpointing=full"]
    assert completed(["--checkpointing", "2", "--no-checkpointing"]) == ["--checkpointing", "2", "--checkpointing=none"]


@pytest.mark.parametrize("steps", [(0, 1), (3, 2)])
def test_a_profile_needs_steps(steps: tuple[int, int]) -> None:
    with pytest.raises(PlanError, match="a profile needs steps"):
        Profile(*steps, Path("traces"))
