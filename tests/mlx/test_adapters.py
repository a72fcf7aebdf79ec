"""Dropout, DoRA, patterns and names of adapters on MLX: any mesh computes what one rank alone and peft compute."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from partita.errors import CheckpointError, ModelError
from partita.mlx.collectives.groups import single_groups
from partita.mlx.layers.dropout import AdapterDropout
from partita.mlx.load import load, shard
from partita.mlx.model.mlx_lm_models import quantize
from partita.mlx.model.modes import mode_set
from partita.mlx.model.parts import plan_of
from partita.mlx.stages.pipeline import Pipeline
from partita.mlx.train import gradients_of, train
from partita.mlx.weights.adapter_places import adapter_places, adapters
from partita.mlx.weights.adapters import add_lora
from partita.mlx.weights.named_adapters import merge_lora, set_adapter, unload_lora
from partita.mlx.weights.peft_format import load_adapters, save_adapters
from partita.training import TrainSettings
from partita.training.saving import Saves
from partita.training.settings import schedule_of
from tests.mlx.compare import EXACT, SINGLE, assert_equal
from tests.mlx.test_load import written  # noqa: F401
from tests.mlx.test_save import digest
from tests.mlx.test_stage import whole
from tests.support.mlx_ranks import on_mlx

Mesh = tuple[int, int, int]
ALONE: Mesh = (1, 1, 1)
MESHES: list[Mesh] = [(1, 1, 2), (1, 2, 1), (2, 1, 1), (1, 2, 2)]
RANK, LENGTH = 4, 8
IDS = [[1, 2, 3, 4, 5, 6], [9, 8, 7, 6, 5, 4]]
ROWS = [[(5 * i * i + 3 * i + 7 * row) % 101 for i in range(LENGTH + 1)] for row in range(8)]
SETTINGS = TrainSettings(
    steps=4, batch_size=8, sequence_length=LENGTH, learning_rate=1e-2, warmup_steps=1, microbatches=2, seed=3
)


def stir(model: Any) -> None:
    """Change what the adapters compute: as they begin, `lora_b` is zero. The unsplit numbers are the same on every mesh."""
    places = adapter_places(model)
    for name, (home, key) in places.homes.items():
        if key != "lora_a":
            shape, held = places.shapes[name], places.held[name]
            mean = 0.0 if key == "lora_b" else 1.0
            drawn = np.random.default_rng(len(name) + shape[-1]).normal(mean, 0.1, shape)
            part = drawn[np.ix_(*([i for a, b in ranges for i in range(a, b)] for ranges in held))]
            old = home[key]
            home[key] = mx.array(part).astype(old.dtype) if key == "lora_b" else old * mx.array(part).astype(old.dtype)


def found_on(family: str, mesh: Mesh, options: dict[str, Any], changes: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Loss and adapters' gradients of a step in float64, with the ranges that this rank holds."""
    dp, pp, tp = mesh
    model = shard(
        whole(family, mx.float64, **changes), dp=dp, pp=pp, tp=tp, groups=single_groups() if mesh == ALONE else None
    )
    add_lora(model, RANK, seed=1, **options)
    stir(model)
    plan, _ = plan_of(model)
    # One rank alone has all micro-batches of two replicas.
    settings = TrainSettings(batch_size=8, sequence_length=LENGTH, microbatches=4 // dp, seed=3)
    with mode_set(model, training=True):
        loss, gradients = gradients_of(Pipeline(model, schedule_of(plan, settings)), np.array(ROWS), settings, step=2)
    held = adapter_places(model).held
    assert gradients.keys() == held.keys()
    return loss, {name: (np.array(gradient), held[name]) for name, gradient in gradients.items()}


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dropout": ("llama", {"dropout": 0.3}, {}),
    "dropout-copies": ("llama", {"dropout": 0.3}, {"num_key_value_heads": 1}),
    "dropout-fused": ("gpt2", {"dropout": 0.5}, {}),
    "dropout-latents": ("minicpm3", {"dropout": 0.3}, {}),
    "dora": ("llama", {"dora": True}, {}),
    "dora-copies": ("llama", {"dora": True}, {"num_key_value_heads": 1}),
    "dora-biases": ("qwen2", {"dora": True}, {}),
    "dora-fused-dropout": ("gpt2", {"dora": True, "dropout": 0.2}, {}),
    "dora-latents": ("minicpm3", {"dora": True}, {}),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7}, "alpha_pattern": {"v_proj": 9.0},
                           "rslora": True}, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_every_mesh_are_those_of_one_rank(case: str) -> None:
    family, options, changes = CASES[case]
    expected_loss, whole_ones = found_on(family, ALONE, options, changes)
    plain_loss, _ = found_on(family, ALONE, {}, changes)
    assert abs(expected_loss - plain_loss) > 1e-6 * plain_loss, "the options change something"
    for mesh in MESHES:
        named = set()
        for loss, found in on_mlx(int(np.prod(mesh)), found_on, family, mesh, options, changes):
            assert loss == pytest.approx(expected_loss, rel=1e-12), mesh
            for name, (gradient, held) in found.items():
                expected = whole_ones[name][0][np.ix_(*([i for a, b in r for i in range(a, b)] for r in held))]
                assert_equal(mx.array(gradient), mx.array(expected), EXACT, f"{mesh} {name}")
                named.add(name)
        assert named == whole_ones.keys()


def masks_on(mesh: Mesh) -> dict[str, list[Any]]:
    """What dropout gives for ones, of each adapter in each step, as gradients of it."""
    dp, pp, tp = mesh
    model = shard(whole("llama"), dp=dp, pp=pp, tp=tp, groups=single_groups() if mesh == ALONE else None)
    add_lora(model, RANK, dropout=0.5)
    kept: dict[str, list[Any]] = {}

    class Noted(AdapterDropout):
        def __call__(self, x: mx.array) -> mx.array:
            mask = super().__call__(mx.ones(x.shape))
            kept.setdefault(self.name, []).append(np.array(mask))
            return mask * x

    for _, _, adapter in adapters(model):
        one: Any = adapter["dropout"]
        adapter["dropout"] = Noted(one.p, one.name, one.split, one.rank)
    train(model, [token for row in ROWS for token in row], SETTINGS)
    return kept


def test_elements_differ_between_layers_steps_and_microbatches_but_not_between_meshes() -> None:
    alone = masks_on(ALONE)
    every = [mask.tobytes() for masks in alone.values() for mask in masks]
    assert len(set(every)) == len(every) == len(alone) * 4 * 2
    assert np.mean([mask.mean() for masks in alone.values() for mask in masks]) == pytest.approx(1, abs=0.02)
    tp = on_mlx(2, masks_on, (1, 1, 2))
    for name, masks in alone.items():
        parts = [rank[name] for rank in tp]
        is_split = parts[0][0].shape != masks[0].shape
        for place, mask in enumerate(masks):
            mine = np.concatenate([p[place] for p in parts], -1) if is_split else parts[1][place]
            assert np.array_equal(mine, mask), name


def test_nothing_is_dropped_outside_of_training() -> None:
    model = shard(whole("llama"), groups=single_groups())
    add_lora(model, RANK, dropout=0.5)
    stir(model)
    ids = mx.array([[1, 2, 3]])
    assert mx.array_equal(model(ids), model(ids)).item()
    model.train()
    assert not mx.array_equal(model(ids), model(ids)).item()


def on_three_bits(mesh: Mesh) -> Any:
    model = whole("llama", hidden_size=128, intermediate_size=128)
    quantize(model, {"quantization": {"group_size": 32, "bits": 3}})
    dp, pp, tp = mesh
    split = shard(model, dp=dp, pp=pp, tp=tp, groups=single_groups() if mesh == ALONE else None)
    before = split(mx.array(IDS))
    add_lora(split, RANK, dora=True)
    assert_equal(split(mx.array(IDS)), before, SINGLE, "at first nothing changes")
    stir(split)
    return np.array(split(mx.array(IDS)))


def test_dora_on_words_that_hold_parts_of_entries() -> None:
    """mlx-lm's own `DoRALinear.from_base` counts too few inputs where 32 is no multiple of the bits."""
    alone = on_three_bits(ALONE)
    for logits in on_mlx(2, on_three_bits, (1, 1, 2)):
        assert_equal(mx.array(logits), mx.array(alone), SINGLE)


# --- on disk --------------------------------------------------------------------------------------------------------------


def put_on(base: str, mesh: Mesh) -> Any:
    dp, pp, tp = mesh
    return load(base, dp=dp, pp=pp, tp=tp, groups=single_groups() if mesh == ALONE else None)


PEFT: dict[str, dict[str, Any]] = {
    "dora": {"r": 4, "lora_alpha": 6, "use_dora": True},
    "patterns": {"r": 4, "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"down_proj": 20},
                 "use_rslora": True},
    "dora-patterns": {"r": 3, "use_dora": True, "rank_pattern": {"v_proj": 5}, "lora_dropout": 0.25},
}  # fmt: skip


def peft_logits(base: str, place: str | None, kind: dict[str, Any] | None = None, merged: bool = False) -> Any:
    """The logits of transformers' model with adapters at a place, which are made first if there is a kind."""
    import peft
    import torch
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if kind is not None:
            torch.manual_seed(1)
            model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", **kind))
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1)
                elif "magnitude" in name:
                    parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            model.save_pretrained(place)
        elif place is not None:
            model = peft.PeftModel.from_pretrained(model, place)
        return model.eval()(input_ids=torch.tensor(IDS)).logits.numpy()


def loaded(base: str, place: str, mesh: Mesh, again: str, merged: str) -> tuple[Any, Any]:
    """Logits with adapters from disk, beside and merged; they are written again, and the merged model too."""
    from partita.mlx.weights.save import save

    model = put_on(base, mesh)
    assert load_adapters(model, place)
    beside = np.array(model(mx.array(IDS)))
    save_adapters(model, again)
    merge_lora(model)
    save(model, merged)
    return beside, np.array(model(mx.array(IDS)))


@pytest.mark.parametrize("mesh", [ALONE, (1, 1, 2), (1, 2, 2)])
@pytest.mark.parametrize("kind", PEFT)
def test_adapters_of_peft_and_back(kind: str, mesh: Mesh, written: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("peft")
    base = str(written["llama"])
    expected = peft_logits(base, str(tmp_path / "peft"), PEFT[kind])
    assert np.abs(expected - peft_logits(base, None)).max() > 0.1
    places = [str(tmp_path / name) for name in ("peft", "again", "merged")]
    found = on_mlx(int(np.prod(mesh)), loaded, base, places[0], mesh, *places[1:])
    for beside, merged in found:
        for what, logits in (("beside", beside), ("merged", merged)):
            assert_equal(mx.array(logits), mx.array(expected), SINGLE * 10, what)
    assert np.abs(peft_logits(base, places[1]) - expected).max() <= 1e-4
    assert np.abs(peft_logits(places[2], None) - expected).max() <= 1e-4


def run(base: str, mesh: Mesh, folder: str, resume: str | None) -> list[float]:
    model = put_on(base, mesh)
    if resume is None:
        add_lora(model, RANK, alpha=6.0, seed=5, dropout=0.2, dora=True, rank_pattern={"q_proj": 2})
    else:
        load_adapters(model, resume)
    text = [token for row in ROWS for token in row]
    reports = train(model, text, SETTINGS, saves=Saves(Path(folder), every=2, base=base), resume=resume)
    return [report.loss for report in reports]


def test_a_run_of_dora_with_dropout_resumes_on_any_mesh(written: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    base = str(written["llama"])
    losses = run(base, ALONE, str(tmp_path / "alone"), None)
    assert losses[-1] < losses[0]
    half = str(tmp_path / "alone" / "step-000002")
    assert run(base, ALONE, str(tmp_path / "again"), half) == losses[2:]
    assert digest(tmp_path / "again" / "step-000004") == digest(tmp_path / "alone" / "step-000004")
    for mesh in [(1, 1, 2), (1, 2, 1)]:
        for found in on_mlx(2, run, base, mesh, str(tmp_path / str(mesh)), half):
            assert found == pytest.approx(losses[2:], rel=1e-5)


# --- names ----------------------------------------------------------------------------------------------------------------


def with_names(base: str, mesh: Mesh, folder: str) -> None:
    """Several adapters at once, each alone as if it were the only one."""
    _, groups = plan_of(put_on(base, mesh))
    ids, expected = mx.array(IDS), {}
    kinds: dict[str, dict[str, Any]] = {
        "a": {},
        "b": {"dora": True, "targets": ["q_proj", "down_proj"]},
        "c": {"alpha": 9.0},
    }
    for place, (name, options) in enumerate(kinds.items()):
        model = put_on(base, mesh)
        expected[None] = model(ids)
        add_lora(model, RANK + place, seed=place, **options)
        stir(model)
        expected[name] = model(ids)
        save_adapters(model, f"{folder}/{name}")
    model = put_on(base, mesh)
    for name in kinds:
        load_adapters(model, f"{folder}/{name}", name=name)
        assert_equal(model(ids), expected["a"], SINGLE, "the first is chosen")
    for name in ("b", "a", None, "c", "a", "b"):
        set_adapter(model, name)
        assert_equal(model(ids), expected[name], SINGLE, str(name))
    for call, why in (
        (lambda: set_adapter(model, "d"), "name must be one of the model's adapters, a, b, c; got 'd'"),
        (lambda: load_adapters(model, f"{folder}/a", name="a"), "has an adapter 'a' already"),
        (lambda: load_adapters(model, f"{folder}/a"), "has adapters already"),
        (lambda: save_adapters(model, f"{folder}/none", name="d"), "name must be one of the model's adapters"),
        (lambda: add_lora(model, 2), "has adapters already"),
    ):
        with pytest.raises(ModelError, match=why):
            call()
    assert_equal(model(ids), expected["b"], SINGLE, "still b")
    train(model, [token for row in ROWS for token in row], SETTINGS)
    assert mx.abs(model(ids) - expected["b"]).max().item() > 1e-3
    set_adapter(model, "c")
    assert_equal(model(ids), expected["c"], SINGLE, "only the chosen one is trained")
    save_adapters(model, f"{folder}/a-again", name="a")
    if groups.rank == 0:
        names = ("adapter_model.safetensors", "adapter_config.json")
        assert all((Path(folder) / "a" / n).read_bytes() == (Path(folder) / "a-again" / n).read_bytes() for n in names)
    groups.tp.barrier()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: cannot be read"):
        load_adapters(model, f"{folder}/nothing", name="d")
    assert_equal(model(ids), expected["c"], SINGLE, "as before the error")
    merge_lora(model)
    assert_equal(model(ids), expected["c"], SINGLE * 10, "merged")
    with pytest.raises(ModelError, match="no adapters with names"):
        set_adapter(model, "a")
    model = put_on(base, mesh)
    load_adapters(model, f"{folder}/a", name="a")
    unload_lora(model)
    assert_equal(model(ids), expected[None], SINGLE, "unloaded")
    assert not adapters(model)


@pytest.mark.parametrize("mesh", [ALONE, (1, 1, 2), (1, 2, 1)])
def test_several_adapters_and_one_chosen_for_a_call(mesh: Mesh, written: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    on_mlx(int(np.prod(mesh)), with_names, str(written["llama"]), mesh, str(tmp_path))


# --- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dropout": 1.0}, "dropout of LoRA must be at least 0 and less than 1; got 1.0"),
        ({"rank_pattern": {"q_proj": 0}}, "rank of LoRA must be an integer of at least 1; got 0"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "alpha of LoRA must be a finite number; got inf"),
        ({"rank_pattern": {"nope": 3}}, "the pattern 'nope' matches no adapted layer"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], why: str) -> None:
    model = shard(whole("llama"), groups=single_groups())
    with pytest.raises(ModelError, match=why):
        add_lora(model, 2, **options)
    assert not adapters(model)


def test_what_peft_has_beyond_is_refused(written: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("peft")
    base = str(written["llama"])
    peft_logits(base, str(tmp_path / "saved"), {"r": 2, "modules_to_save": ["lm_head"]})
    with pytest.raises(CheckpointError, match=r"only LoRA or DoRA of linear layers can be read, with modules_to_save"):
        load_adapters(put_on(base, ALONE), tmp_path / "saved")
