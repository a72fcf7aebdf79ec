"""A run that is stopped and goes on: bit for bit the same on the same layout, equal on any other, and any layout's bytes."""

from __future__ import annotations

import hashlib
import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from partita.errors import CheckpointError, ModelError
from partita.torch.collectives.groups import single_groups
from partita.torch.load import load
from partita.torch.model.parts import local_tensors, plan_of
from partita.torch.new import fresh
from partita.torch.train import TrainSettings, make_optimizer, make_saver, train
from partita.torch.weights.moments import restore_optimizer
from partita.training import StepReport
from partita.training.saving import Saves
from partita.training.state import read_state
from tests.support.models import CONFIGS
from tests.support.ranks import RankError, on, ranks

SETTINGS = TrainSettings(
    steps=6, batch_size=8, sequence_length=12, learning_rate=3e-3, warmup_steps=2, clip_norm=0.5, microbatches=2
)
STOPPED = 4
LLAMA: dict[str, Any] = {**CONFIGS["llama-biases-tied"], "num_hidden_layers": 4}
"""Four layers, so that there can be four stages; its head is tied to its embedding, 14 heads share 2 KV heads."""
DROPPING: dict[str, Any] = {**CONFIGS["gpt2"], "attn_pdrop": 0.2, "resid_pdrop": 0.2, "embd_pdrop": 0.2}

Layout = dict[str, Any]
"""Arguments of `load`, and settings of training."""
ALONE: Layout = {}


def tokens() -> Tensor:
    return torch.arange(2000) ** 2 % 23


def size_of(layout: Layout) -> int:
    return int(layout.get("tp", 1) * layout.get("pp", 1) * layout.get("dp", 1))


def run(
    config: dict[str, Any], layout: Layout, folder: str, resume: str | None, dtype: str
) -> tuple[list[StepReport], dict[str, Tensor]]:
    """Train to the end, from the beginning or from a checkpoint: the reports, and this rank's weights."""
    where = {name: value for name, value in layout.items() if name not in ("zero", "schedule")}
    if size_of(layout) == 1:
        where["groups"] = single_groups()
    settings = replace(SETTINGS, zero=layout.get("zero", False), schedule=layout.get("schedule"))
    model = load(resume, **where) if resume is not None else fresh(config, seed=3, dtype=dtype, **where)
    saves = Saves(Path(folder), every=2, max_shard_bytes=60_000)
    reports = train(model, tokens(), settings, saves=saves, resume=resume)
    return reports, {name: t.detach().clone() for name, t in local_tensors(model, plan_of(model)[0]).items()}


def digest(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def stopped(folder: Path) -> str:
    return str(folder / f"step-{STOPPED:06d}")


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("dropping", ALONE),
        ("dropping", {"tp": 2}),
        ("dropping", {"pp": 2, "schedule": "zb-h1"}),
        ("llama", {"dp": 2, "tp": 2, "zero": True}),
        pytest.param("dropping", {"dp": 2, "zero": True}, marks=pytest.mark.slow),
        pytest.param("dropping", {"dp": 2, "zero": 2}, marks=pytest.mark.slow),
        pytest.param("llama", {"dp": 2, "pp": 2, "zero": 3}, marks=pytest.mark.slow),
        pytest.param("llama", {"tp": 2, "pp": 2}, marks=pytest.mark.slow),
        pytest.param("llama", {"pp": 2, "vpp": 2}, marks=pytest.mark.slow),
        pytest.param("qwen3-moe", {"tp": 3}, marks=pytest.mark.slow),
    ],
)
def test_on_the_same_layout_bit_for_bit(name: str, layout: Layout, tmp_path: Path) -> None:
    config = {"dropping": DROPPING, "llama": LLAMA, **CONFIGS}[name]
    size = size_of(layout)
    whole = on(size, run, config, layout, str(tmp_path / "whole"), None, "float32")
    again = on(size, run, config, layout, str(tmp_path / "again"), stopped(tmp_path / "whole"), "float32")
    for (expected, weights), (found, their_weights) in zip(whole, again, strict=True):
        assert [r.step for r in found] == [5, 6]
        assert [(r.loss, r.grad_norm, r.learning_rate) for r in found] == [
            (r.loss, r.grad_norm, r.learning_rate) for r in expected[STOPPED:]
        ]
        assert weights
        assert all(torch.equal(tensor, their_weights[name]) for name, tensor in weights.items())
    last = f"step-{SETTINGS.steps:06d}"
    assert digest(tmp_path / "whole" / last) == digest(tmp_path / "again" / last)


LAYOUTS: list[Layout] = [
    {"tp": 2},
    {"tp": 3},
    {"dp": 2},
    {"dp": 2, "zero": True},
    {"pp": 2},
    {"pp": 2, "vpp": 2},
    {"pp": 2, "vpp": 2, "placement": "v", "schedule": "zb-v"},
    {"tp": 2, "pp": 2},
    {"tp": 2, "dp": 2, "zero": True},
    {"tp": 2, "dp": 2, "zero": 3},
    {"pp": 2, "dp": 2, "zero": 2},
]
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}


@pytest.fixture(scope="module", params=["float64", "float32"])
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, list[float]]:
    """A run of one rank: its dtype, folder and losses."""
    folder = tmp_path_factory.mktemp("alone")
    reports, _ = run(LLAMA, ALONE, str(folder), None, request.param)
    return request.param, folder, [r.loss for r in reports]


def weights(folder: Path) -> dict[str, Tensor]:
    """Weights and moments on disk, in float64."""
    return {n: t.double() for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}


def assert_close(found: Path, expected: Path, tolerance: float) -> None:
    theirs = weights(expected)
    mine = weights(found)
    assert mine.keys() == theirs.keys()
    assert any(name.startswith("exp_avg_sq.") for name in mine)
    for name, tensor in theirs.items():
        error = (mine[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-30)
        # Softmax does not see what a bias of the keys adds to all scores: its gradient is rounding, which AdamW magnifies.
        assert error <= tolerance * (1 if not name.endswith("k_proj.bias") else 100), f"{name}: {error}"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_on_another_layout_equal(layout: Layout, alone: tuple[str, Path, list[float]], tmp_path: Path) -> None:
    dtype, folder, losses = alone
    for reports, _ in on(size_of(layout), run, LLAMA, layout, str(tmp_path), stopped(folder), dtype):
        assert [r.loss for r in reports] == pytest.approx(losses[STOPPED:], rel=TOLERANCE[dtype])
    last = f"step-{SETTINGS.steps:06d}"
    assert_close(tmp_path / last, folder / last, TOLERANCE[dtype])


def test_there_and_back(tmp_path: Path) -> None:
    """Begun by two stages of two tensor ranks, gone on with by two replicas with ZeRO, ended alone."""
    one, two, three, last = (tmp_path / name for name in ("one", "two", "three", "step-000006"))
    split = ranks(4).run(run, LLAMA, {"tp": 2, "pp": 2}, str(one), None, "float64")
    expected = [r.loss for r in split[0][0]]
    for layout, source, target in (({"dp": 2, "zero": True}, one, two), (ALONE, two, three)):
        step = "step-000002" if source is one else "step-000004"
        for reports, _ in on(size_of(layout), run, LLAMA, layout, str(target), str(source / step), "float64"):
            assert [r.loss for r in reports] == pytest.approx(expected[-len(reports) :], rel=1e-12)
    assert_close(three / last.name, one / last.name, 1e-12)


def write_again(layout: Layout, source: str, folder: str) -> None:
    """Load a checkpoint, moments too, and write it without a step between."""
    where = {name: value for name, value in layout.items() if name not in ("zero", "schedule")}
    model = load(source, **({"groups": single_groups()} if size_of(layout) == 1 else where))
    _, groups = plan_of(model)
    settings = replace(SETTINGS, zero=layout.get("zero", False))
    optimizer = make_optimizer(model, settings, groups)
    state = read_state(Path(source))
    restore_optimizer(model, optimizer, Path(source))
    saves = Saves(Path(folder), every=1, max_shard_bytes=60_000)
    with make_saver(model, optimizer, saves, state) as saver:
        saver.after(state.step)
        saver.wait()


@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2", "qwen3-moe"))])
def test_bytes_do_not_depend_on_the_layout(name: str, tmp_path: Path) -> None:
    config = {**CONFIGS, "llama": LLAMA}[name]
    run(config, ALONE, str(tmp_path / "source"), None, "float32")
    source = stopped(tmp_path / "source")
    expected = digest(Path(source))
    assert len(expected) > 6
    for place, layout in enumerate([ALONE, *LAYOUTS] if name == "llama" else [{"tp": 2, "pp": 2}, {"dp": 2, "tp": 2}]):
        on(size_of(layout), write_again, layout, source, str(tmp_path / str(place)))
        assert digest(Path(stopped(tmp_path / str(place)))) == expected, layout


def test_any_reader_of_hugging_face_reads_a_checkpoint(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ranks(2).run(run, LLAMA, {"tp": 2}, str(tmp_path), None, "float32")
    mine = load(tmp_path, groups=single_groups())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "latest")
    ids = torch.arange(6).view(1, 6)
    with torch.no_grad():
        assert torch.equal(mine(input_ids=ids).logits, theirs(input_ids=ids).logits)


# --- what goes wrong ----------------------------------------------------------------------------------------------------


def refused(folder: str, source: str, change: dict[str, Any]) -> None:
    model = load(source, groups=single_groups())
    train(model, tokens(), replace(SETTINGS, **change), saves=Saves(Path(folder)), resume=source)


def test_another_run_is_refused(tmp_path: Path) -> None:
    run(LLAMA, ALONE, str(tmp_path / "one"), None, "float32")
    with pytest.raises(CheckpointError, match=r"differs in learning_rate \(0\.003 then, 0\.001 now\)"):
        refused(str(tmp_path / "two"), stopped(tmp_path / "one"), {"learning_rate": 1e-3})
    (tmp_path / "one" / "step-000004" / "training_state.json").unlink()
    with pytest.raises(CheckpointError, match=r"training_state\.json: is in the manifest, but cannot be found"):
        refused(str(tmp_path / "two"), stopped(tmp_path / "one"), {})
    assert not (tmp_path / "two").exists()


def loses_its_number(folder: str, size: int) -> None:
    """Train until a weight becomes no number in the third step."""
    model = fresh(LLAMA, seed=3, **({"groups": single_groups()} if size == 1 else {"tp": size}))

    def spoil(report: StepReport) -> None:
        if report.step == 2:
            with torch.no_grad():
                model.model.norm.weight.fill_(float("nan"))

    with pytest.raises(ModelError, match="step 3: the loss is nan"):
        train(model, tokens(), SETTINGS, saves=Saves(Path(folder), every=1), on_step=spoil)


@pytest.mark.parametrize("size", [1, 2])
def test_a_loss_that_is_no_number_leaves_what_was_saved_before(size: int, tmp_path: Path) -> None:
    on(size, loses_its_number, str(tmp_path), size)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "latest", "step-000001", "step-000002"]
    load(tmp_path / "step-000001", groups=single_groups())


def runs_out_of_room(folder: str) -> str:
    """Train over two ranks, of which the second may no longer write from the third step on."""
    model = fresh(LLAMA, seed=3, tp=2)
    _, groups = plan_of(model)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(report: StepReport) -> None:
        if report.step == 3 and groups.tp.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))

    try:
        train(model, tokens(), replace(SETTINGS, steps=200), saves=Saves(Path(folder), every=2), on_step=limit)
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    return ""


def test_a_rank_that_cannot_write_ends_the_run_on_all(tmp_path: Path) -> None:
    said = ranks(2).run(runs_out_of_room, str(tmp_path))
    assert said[0] == said[1]
    assert said[0].startswith("the checkpoint of step 4 could not be written: ")
    assert "cannot be written: File too large; step-000002, from before, is unchanged." in said[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "latest", "step-000002"]


def cannot_begin(folder: str) -> None:
    train(fresh(LLAMA, tp=2), tokens(), SETTINGS, saves=Saves(Path(folder), every=2))


def test_a_folder_that_cannot_be_is_told_by_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RankError) as raised:
        ranks(2).run(cannot_begin, str(tmp_path / "file" / "run"))
    assert str(raised.value).count("errors.CheckpointError: ") == 2
    assert str(raised.value).count("run: cannot be created: Not a directory") == 2


def test_the_state_says_what_was_done(tmp_path: Path) -> None:
    run(LLAMA, ALONE, str(tmp_path), None, "float32")
    data = json.loads((tmp_path / "latest" / "training_state.json").read_text())
    assert (data["step"], data["data"]["sequences"], data["data"]["tokens"]) == (6, 48, 2000)
