"""Adapters trained, stopped and gone on with: bit for bit on the same layout, equal on any other, and any layout's bytes."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from partita.errors import CheckpointError, ModelError
from partita.torch.collectives.groups import single_groups
from partita.torch.load import load
from partita.torch.model.parts import plan_of
from partita.torch.new import fresh
from partita.torch.train import TrainSettings, make_optimizer, make_saver, train
from partita.torch.weights.adapter_parts import adapter_parts
from partita.torch.weights.adapters import add_lora, merge_lora
from partita.torch.weights.moments import restore_optimizer
from partita.torch.weights.peft_format import load_adapters, save_adapters
from partita.torch.weights.save import save
from partita.training import StepReport
from partita.training.base import Base
from partita.training.saving import Saves
from partita.training.state import read_state
from tests.support.models import CONFIGS
from tests.support.ranks import on

SETTINGS = TrainSettings(
    steps=6, batch_size=8, sequence_length=12, learning_rate=1e-2, warmup_steps=2, clip_norm=0.5, microbatches=2
)
STOPPED, LAST = "step-000004", "step-000006"
RANK, ALPHA = 3, 6.0
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**CONFIGS["llama-biases-tied"], "num_hidden_layers": 4},
    "dropping": {**CONFIGS["gpt2"], "attn_pdrop": 0.2, "resid_pdrop": 0.2, "embd_pdrop": 0.2},
    "qwen3-moe": CONFIGS["qwen3-moe"],
}
"""Four layers, so that there can be four stages, 14 heads that share 2 KV heads; one with dropout and `[in, out]` weights."""

Layout = dict[str, Any]
"""Arguments of `load`, and settings of training."""
ALONE: Layout = {}


def size_of(layout: Layout) -> int:
    return int(layout.get("tp", 1) * layout.get("pp", 1) * layout.get("dp", 1))


def base_of(layout: Layout, base: str, dtype: str) -> nn.Module:
    where = {name: value for name, value in layout.items() if name not in ("zero", "schedule")}
    if size_of(layout) == 1:
        where["groups"] = single_groups()
    return load(base, dtype=dtype, **where)


def settings_of(layout: Layout) -> TrainSettings:
    return replace(SETTINGS, zero=layout.get("zero", False), schedule=layout.get("schedule"))


def run(
    layout: Layout, base: str, dtype: str, folder: str, resume: str | None
) -> tuple[list[StepReport], dict[str, Tensor]]:
    """Train adapters to the end, from the beginning or from a checkpoint: the reports, and this rank's adapters."""
    model = base_of(layout, base, dtype)
    if resume is None:
        torch.manual_seed(5)
        add_lora(model, RANK, alpha=ALPHA)
    else:
        load_adapters(model, resume)
    text = torch.arange(2000) ** 2 % 23
    saves = Saves(Path(folder), every=2, base=base)
    reports = train(model, text, settings_of(layout), saves=saves, resume=resume)
    return reports, {name: part.tensor.detach().clone() for name, part in adapter_parts(model).items()}


def digest(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The models on disk, by name."""
    root = tmp_path_factory.mktemp("bases")
    for name, config in MODELS.items():
        save(fresh(config, seed=3, groups=single_groups()), root / name)
    return {name: str(root / name) for name in MODELS}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("dropping", ALONE),
        ("llama", {"tp": 2, "pp": 2}),
        ("llama", {"dp": 2, "zero": True}),
        pytest.param("dropping", {"tp": 2}, marks=pytest.mark.slow),
        pytest.param("llama", {"pp": 2, "layout": "E|ttttL"}, marks=pytest.mark.slow),
        pytest.param("qwen3-moe", {"tp": 3}, marks=pytest.mark.slow),
    ],
)
def test_on_the_same_layout_bit_for_bit(name: str, layout: Layout, bases: dict[str, str], tmp_path: Path) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    began = on(size_of(layout), run, layout, bases[name], "float32", str(whole), None)
    gone_on = on(size_of(layout), run, layout, bases[name], "float32", str(again), str(whole / STOPPED))
    for (expected, adapters), (found, their_adapters) in zip(began, gone_on, strict=True):
        assert [r.step for r in found] == [5, 6]
        assert [(r.loss, r.grad_norm) for r in found] == [(r.loss, r.grad_norm) for r in expected[4:]]
        assert adapters.keys() == their_adapters.keys()
        assert all(torch.equal(tensor, their_adapters[name]) for name, tensor in adapters.items())
    assert digest(whole / LAST) == digest(again / LAST)
    assert set(digest(whole / LAST)) == {
        "adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "training_state.json", "manifest.json",
    }  # fmt: skip


LAYOUTS: list[Layout] = [
    {"tp": 2},
    {"tp": 3},
    {"dp": 2, "zero": True},
    {"dp": 2, "zero": 3},
    {"pp": 2, "vpp": 2},
    {"tp": 2, "pp": 2},
    {"tp": 2, "dp": 2},
]
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}


@pytest.fixture(scope="module", params=["float64", "float32"])
def alone(
    request: pytest.FixtureRequest, bases: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, list[float]]:
    """A run of one rank: its dtype, folder and losses."""
    folder = tmp_path_factory.mktemp("alone")
    reports, _ = run(ALONE, bases["llama"], request.param, str(folder), None)
    return request.param, folder, [r.loss for r in reports]


def numbers(folder: Path) -> dict[str, Tensor]:
    """Adapters and moments on disk, in float64."""
    return {n: t.double() for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}


def assert_close(found: Path, expected: Path, tolerance: float) -> None:
    theirs, mine = numbers(expected), numbers(found)
    assert mine.keys() == theirs.keys()
    assert any(name.startswith("exp_avg_sq.base_model.model.model.layers.3.") for name in mine)
    for name, tensor in theirs.items():
        error = (mine[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-30)
        assert error <= tolerance, f"{name}: {error}"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_on_another_layout_equal(
    layout: Layout, alone: tuple[str, Path, list[float]], bases: dict[str, str], tmp_path: Path
) -> None:
    dtype, folder, losses = alone
    for reports, _ in on(size_of(layout), run, layout, bases["llama"], dtype, str(tmp_path), str(folder / STOPPED)):
        assert [r.loss for r in reports] == pytest.approx(losses[4:], rel=TOLERANCE[dtype])
    assert_close(tmp_path / LAST, folder / LAST, TOLERANCE[dtype])


def write_again(layout: Layout, base: str, source: str, folder: str) -> None:
    """Load a checkpoint, moments too, and write it without a step between."""
    model = base_of(layout, base, "float32")
    load_adapters(model, source)
    optimizer = make_optimizer(model, settings_of(layout), plan_of(model)[1])
    state = read_state(Path(source))
    restore_optimizer(model, optimizer, Path(source))
    with make_saver(model, optimizer, Saves(Path(folder), every=1, base=base), state) as saver:
        saver.after(state.step)
        saver.wait()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "llama" else pytest.mark.slow) for name in MODELS]
)
def test_bytes_do_not_depend_on_the_layout(name: str, bases: dict[str, str], tmp_path: Path) -> None:
    run(ALONE, bases[name], "float32", str(tmp_path / "source"), None)
    source = tmp_path / "source" / STOPPED
    expected = digest(source)
    assert len(expected) == 5
    for place, layout in enumerate([ALONE, *LAYOUTS] if name == "llama" else [{"tp": 2, "pp": 2}, {"dp": 2, "tp": 2}]):
        on(size_of(layout), write_again, layout, bases[name], str(source), str(tmp_path / str(place)))
        assert digest(tmp_path / str(place) / STOPPED) == expected, layout


def test_peft_reads_a_checkpoint(bases: dict[str, str], tmp_path: Path) -> None:
    """Both say the same with adapters apart, merged by peft, and merged here."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base, ids = bases["llama"], torch.arange(6).view(1, 6)
    on(4, run, {"tp": 2, "pp": 2}, base, "float64", str(tmp_path / "run"), None)
    step = tmp_path / "run" / LAST
    assert json.loads((step / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="float64")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)
        before = plain(input_ids=ids).logits
        theirs = peft.PeftModel.from_pretrained(plain, step, autocast_adapter_dtype=False).eval()
        apart = theirs(input_ids=ids).logits
        merged = theirs.merge_and_unload()(input_ids=ids).logits
    mine = base_of(ALONE, base, "float64")
    load_adapters(mine, step)
    with torch.no_grad():
        assert torch.allclose(mine(input_ids=ids).logits, apart, rtol=1e-12, atol=1e-13)
        merge_lora(mine)
        assert torch.allclose(mine(input_ids=ids).logits, merged, rtol=1e-12, atol=1e-13)
    assert (apart - before).abs().max() > 1e-3


def test_what_peft_wrote_is_read(bases: dict[str, str], tmp_path: Path) -> None:
    """Adapters on some of the layers, by peft's own hand, on tensor ranks and stages."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base, ids = bases["llama"], torch.arange(6).view(1, 6)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)
        plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="float64")
        config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=["k_proj", "down_proj"], init_lora_weights=False)
        theirs = peft.get_peft_model(plain, config, autocast_adapter_dtype=False).eval()
        theirs.save_pretrained(tmp_path)
        expected = theirs(input_ids=ids).logits.flatten().tolist()
    for layout in (ALONE, {"tp": 2, "pp": 2}):
        for paths, logits in on(size_of(layout), says, layout, base, str(tmp_path)):
            assert paths
            assert {path.rpartition(".")[2] for path in paths} == {"k_proj", "down_proj"}
            assert logits == pytest.approx(expected, rel=1e-10, abs=1e-12)


def says(layout: Layout, base: str, folder: str) -> tuple[list[str], list[float]]:
    model = base_of(layout, base, "float64")
    paths = load_adapters(model, folder)
    with torch.no_grad():
        return paths, model(input_ids=torch.arange(6).view(1, 6)).logits.flatten().tolist()


# --- what goes wrong ----------------------------------------------------------------------------------------------------


def test_the_base_is_told_from_others(bases: dict[str, str], tmp_path: Path) -> None:
    first = Base.of(bases["llama"])
    assert first.path == bases["llama"]
    shutil.copytree(bases["llama"], tmp_path / "copy")
    assert first.find(tmp_path / "copy") == tmp_path / "copy"
    save(load(bases["llama"], groups=single_groups()), tmp_path / "parts", max_shard_bytes=50_000)
    assert first.find(tmp_path / "parts") == tmp_path / "parts"

    weights = tmp_path / "copy" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"belong to .*llama as it was .*, but .*copy is another model"):
        first.find(tmp_path / "copy")
    config = tmp_path / "parts" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 0.5}))
    with pytest.raises(CheckpointError, match="parts is another model"):
        first.find(tmp_path / "parts")
    with pytest.raises(CheckpointError, match=r"but it cannot be read: .*gone does not exist\. .*with --model\.$"):
        replace(first, path=str(tmp_path / "gone")).find()


def test_another_base_is_refused(alone: tuple[str, Path, list[float]], bases: dict[str, str], tmp_path: Path) -> None:
    dtype, folder, _ = alone
    save(fresh(MODELS["llama"], seed=4, dtype=dtype, groups=single_groups()), tmp_path / "other")
    with pytest.raises(
        CheckpointError, match=r"differs in the base model \(.*llama then, .*other now, of other content\)"
    ):
        run(ALONE, str(tmp_path / "other"), dtype, str(tmp_path / "run"), str(folder / STOPPED))
    with pytest.raises(CheckpointError, match="which is not a linear layer inside the layers of gpt2"):
        run(ALONE, bases["dropping"], dtype, str(tmp_path / "run"), str(folder / STOPPED))
    assert not (tmp_path / "run").exists()


def test_what_is_not_kept_is_refused(bases: dict[str, str], tmp_path: Path) -> None:
    model = base_of(ALONE, bases["llama"], "float32")
    text = torch.arange(2000) ** 2 % 23
    with pytest.raises(ModelError, match="is for runs that train adapters, but the model has none"):
        train(model, text, SETTINGS, saves=Saves(tmp_path / "run", base=bases["llama"]))
    add_lora(model, 2)
    with pytest.raises(ModelError, match=r"resuming needs their model\. Name it on disk, with Saves\(base=\.\.\.\)"):
        train(model, text, SETTINGS, saves=Saves(tmp_path / "run"))
    model.model.norm.requires_grad_(True)
    with pytest.raises(ModelError, match=r"model\.norm\.weight is trained besides the adapters"):
        train(model, text, SETTINGS, saves=Saves(tmp_path / "run", base=bases["llama"]))
    assert not (tmp_path / "run").exists()


NOT_PLAIN: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "IA3"}, "peft_type must be LORA, but is 'IA3'"),
    ({"use_dora": True}, r"lora_magnitude_vector must be \[.*\] for this model; got no such tensor"),
    ({"rank_pattern": {"q_proj": 2}}, r"must be \[2, 112\] for this model; got \[3, 112\]"),
    ({"r": "3"}, "must have a whole r and a number lora_alpha, but has '3'"),
    ({"r": 2}, r"must be \[2, 112\] for this model; got \[3, 112\]"),
]


@pytest.mark.parametrize(("change", "message"), NOT_PLAIN)
def test_other_adapters_are_refused(
    change: dict[str, Any], message: str, bases: dict[str, str], tmp_path: Path
) -> None:
    model = base_of(ALONE, bases["llama"], "float32")
    add_lora(model, RANK)
    save_adapters(model, tmp_path / "made")
    file = tmp_path / "made" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        load_adapters(base_of(ALONE, bases["llama"], "float32"), tmp_path / "made")
    with pytest.raises(ModelError, match="has adapters already"):
        load_adapters(model, tmp_path / "made")
