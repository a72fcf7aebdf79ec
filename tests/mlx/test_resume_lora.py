"""Adapters trained on MLX, stopped and gone on with: bit for bit on the same layout, equal on any other, and on torch."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from partita.errors import CheckpointError, ModelError
from partita.mlx.collectives.groups import single_groups
from partita.mlx.load import load
from partita.mlx.model.parts import parameter_homes
from partita.mlx.train import train
from partita.mlx.weights.adapter_places import adapter_places
from partita.mlx.weights.adapters import add_lora
from partita.mlx.weights.named_adapters import merge_lora
from partita.mlx.weights.peft_format import load_adapters, save_adapters
from partita.mlx.weights.save import save
from partita.training import StepReport, TrainSettings
from partita.training.saving import Saves
from tests.mlx.test_load import written  # noqa: F401
from tests.mlx.test_resume import ALONE, TEXT, Mesh, numbers, without_dropout, write_restored
from tests.mlx.test_save import digest, tensors
from tests.support.mlx_ranks import on_mlx

SETTINGS = TrainSettings(
    steps=6, batch_size=8, sequence_length=12, learning_rate=1e-2, warmup_steps=2, clip_norm=0.5, microbatches=2
)
STOPPED, LAST = "step-000004", "step-000006"
RANK, ALPHA = 3, 6.0


def base_of(base: str, mesh: Mesh) -> Any:
    dp, pp, tp = mesh
    return load(base, dp=dp, pp=pp, tp=tp, groups=single_groups() if mesh == ALONE else None)


def run(base: str, mesh: Mesh, folder: str, resume: str | None) -> tuple[list[StepReport], dict[str, Any]]:
    """Train adapters to the end, from the beginning or from a checkpoint: the reports, and this rank's adapters."""
    model = base_of(base, mesh)
    paths = add_lora(model, RANK, alpha=ALPHA, seed=5) if resume is None else load_adapters(model, resume)
    assert paths
    reports = train(model, TEXT, SETTINGS, saves=Saves(Path(folder), every=2, base=base), resume=resume)
    return reports, {name: np.array(home[key]) for name, (home, key) in adapter_places(model).homes.items()}


@pytest.mark.parametrize("mesh", [ALONE, (1, 1, 2), (1, 2, 1), (2, 1, 1)])
def test_on_the_same_layout_bit_for_bit(mesh: Mesh, written: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    size, base = int(np.prod(mesh)), str(written["llama"])
    whole = on_mlx(size, run, base, mesh, str(tmp_path / "whole"), None)
    again = on_mlx(size, run, base, mesh, str(tmp_path / "again"), str(tmp_path / "whole" / STOPPED))
    for (expected, adapters), (found, their_adapters) in zip(whole, again, strict=True):
        assert numbers(found) == numbers(expected[4:])
        assert adapters.keys() == their_adapters.keys()
        assert all(np.array_equal(array, their_adapters[name]) for name, array in adapters.items())
    assert digest(tmp_path / "whole" / LAST) == digest(tmp_path / "again" / LAST)


@pytest.fixture(scope="module")
def alone(written: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:  # noqa: F811
    folder = tmp_path_factory.mktemp("alone")
    reports, _ = run(str(written["llama"]), ALONE, str(folder), None)
    return folder, [r.loss for r in reports]


def assert_close(found: Path, expected: Path) -> None:
    theirs, mine = tensors(expected), tensors(found)
    assert theirs.keys() == mine.keys()
    assert any(name.startswith("exp_avg_sq.base_model.model.") for name in mine)
    for name, array in theirs.items():
        assert mine[name].shape == array.shape
        most = mx.abs(array).max().item()
        assert mx.abs(array - mine[name]).max().item() <= 1e-4 * most, name


@pytest.mark.parametrize("mesh", [(1, 1, 2), (2, 1, 1), (1, 2, 2)])
def test_on_another_layout_equal(
    mesh: Mesh,
    alone: tuple[Path, list[float]],
    written: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    folder, losses = alone
    begun = str(folder / STOPPED)
    for reports, _ in on_mlx(int(np.prod(mesh)), run, str(written["llama"]), mesh, str(tmp_path), begun):
        assert [r.loss for r in reports] == pytest.approx(losses[4:], rel=1e-5)
    assert_close(tmp_path / LAST, folder / LAST)


def begun(base: str, mesh: Mesh, folder: str) -> None:
    """Adapters as they begin."""
    model = base_of(base, mesh)
    add_lora(model, RANK, seed=5)
    save_adapters(model, folder)


def write_again(base: str, mesh: Mesh, source: str, folder: str) -> None:
    """Load a checkpoint, moments too, and write it without a step between."""
    model = base_of(base, mesh)
    load_adapters(model, source)
    write_restored(model, SETTINGS, source, Saves(Path(folder), every=1, base=base))


def test_bytes_do_not_depend_on_the_layout(
    alone: tuple[Path, list[float]],
    written: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    base, source = str(written["llama"]), alone[0] / STOPPED
    begun(base, ALONE, str(tmp_path / "begun"))
    for place, mesh in enumerate([ALONE, (1, 1, 2), (1, 2, 1), (2, 1, 1), (1, 2, 2)]):
        size = int(np.prod(mesh))
        on_mlx(size, write_again, base, mesh, str(source), str(tmp_path / str(place)))
        assert digest(tmp_path / str(place) / STOPPED) == digest(source), mesh
        on_mlx(size, begun, base, mesh, str(tmp_path / f"begun-{place}"))
        assert digest(tmp_path / f"begun-{place}") == digest(tmp_path / "begun"), mesh


# --- torch and peft -----------------------------------------------------------------------------------------------------


def by_torch(base: str, folder: Path, resume: Path | None) -> list[StepReport]:
    torch = pytest.importorskip("torch")
    from partita.torch.collectives.groups import single_groups
    from partita.torch.load import load
    from partita.torch.train import train
    from partita.torch.weights.adapters import add_lora
    from partita.torch.weights.peft_format import load_adapters

    model = load(base, groups=single_groups())
    if resume is None:
        torch.manual_seed(5)
        add_lora(model, RANK, alpha=ALPHA)
    else:
        load_adapters(model, resume)
    reports: list[StepReport] = train(
        model, torch.tensor(TEXT), SETTINGS, saves=Saves(folder, every=2, base=base), resume=resume
    )
    return reports


@pytest.mark.parametrize(
    ("family", "mesh"),
    [("llama", (1, 2, 2)), ("gpt2", ALONE), pytest.param("qwen3_moe", ALONE, marks=pytest.mark.slow)],
)
def test_what_torch_began_goes_on_here_and_ends_there(
    family: str,
    mesh: Mesh,
    written: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    base = str(without_dropout(written[family], tmp_path / "model"))
    reports = by_torch(base, tmp_path / "torch", None)
    losses = [r.loss for r in reports]
    second = str(tmp_path / "torch" / "step-000002")
    for found, _ in on_mlx(int(np.prod(mesh)), run, base, mesh, str(tmp_path / "mlx"), second):
        assert [r.loss for r in found] == pytest.approx(losses[2:], rel=1e-5)
        assert [r.grad_norm for r in found] == pytest.approx([r.grad_norm for r in reports[2:]], rel=1e-3)
    third = by_torch(base, tmp_path / "back", tmp_path / "mlx" / STOPPED)
    assert [r.loss for r in third] == pytest.approx(losses[4:], rel=1e-5)
    assert_close(tmp_path / "back" / LAST, tmp_path / "torch" / LAST)
    configs = [(tmp_path / one / LAST / "adapter_config.json").read_text() for one in ("torch", "mlx", "back")]
    assert configs[0] == configs[1] == configs[2]


def test_peft_reads_it(alone: tuple[Path, list[float]], written: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    """Apart and merged, by peft and here, and what is merged here is read by transformers."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    import torch

    base, step, ids = str(written["llama"]), alone[0] / LAST, [[1, 2, 3, 4, 5, 6]]
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)
        before = plain(input_ids=torch.tensor(ids)).logits.numpy().copy()
        theirs = peft.PeftModel.from_pretrained(plain, step).eval()
        apart = theirs(input_ids=torch.tensor(ids)).logits.numpy()
    model = base_of(base, ALONE)
    load_adapters(model, step)
    assert np.allclose(np.array(model(mx.array(ids))), apart, rtol=1e-4, atol=1e-5)
    merge_lora(model)
    assert np.allclose(np.array(model(mx.array(ids))), apart, rtol=1e-4, atol=1e-5)
    save(model, tmp_path / "merged")
    with torch.no_grad():
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=torch.tensor(ids))
    assert np.allclose(merged.logits.numpy(), apart, rtol=1e-4, atol=1e-5)
    assert np.abs(apart - before).max() > 1e-2


# --- what goes wrong ----------------------------------------------------------------------------------------------------


def test_what_is_not_kept_is_refused(alone: tuple[Path, list[float]], written: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    base, step = str(written["llama"]), alone[0] / STOPPED
    model = base_of(base, ALONE)
    with pytest.raises(ModelError, match="is for runs that train adapters, but the model has none"):
        train(model, TEXT, SETTINGS, saves=Saves(tmp_path / "run", base=base))
    load_adapters(model, step)
    with pytest.raises(ModelError, match="has adapters already"):
        load_adapters(model, step)
    with pytest.raises(ModelError, match="resuming needs their model"):
        train(model, TEXT, SETTINGS, saves=Saves(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="differs in seed"):
        train(model, TEXT, replace(SETTINGS, seed=1), saves=Saves(tmp_path / "run", base=base), resume=step)
    home, _ = parameter_homes(model)["model.norm.weight"]
    home.unfreeze()
    with pytest.raises(ModelError, match=r"model\.norm\.weight is trained besides the adapters"):
        train(model, TEXT, SETTINGS, saves=Saves(tmp_path / "run", base=base))
    with pytest.raises(CheckpointError, match="which is not a linear layer inside the layers of gpt2"):
        load_adapters(base_of(str(written["gpt2"]), ALONE), step)
    assert not (tmp_path / "run").exists()
