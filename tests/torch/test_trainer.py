"""Hugging Face's `Trainer` on split models: it computes what it computes in one process, and resumes in any layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

import partita.torch as pt
from partita.errors import ModelError, PartitaError
from partita.torch.collectives.groups import single_groups
from tests.support.models import CONFIGS
from tests.support.ranks import on

Mesh = dict[str, int]
TOLERANCES = {"loss": 1e-9, "eval_loss": 1e-9, "grad_norm": 1e-6}
"""Rounding of other orders of sums over eight optimizer steps in float64; the unsplit Trainer's norm is a float32 number."""


def built(name: str) -> Any:
    torch.manual_seed(0)
    dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if name == "gpt2" else {}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIGS[name], **dropout))


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    """Sequences of unequal numbers of labels, so that an average of averages would be wrong."""
    made = torch.Generator().manual_seed(1)
    found = []
    for index in range(count):
        ids = torch.randint(0, 23, (8,), generator=made)
        labels = ids.clone()
        labels[: index % 5] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def trained(name: str, mesh: Mesh, folder: str, resume: str | None = None, **options: Any) -> dict[str, Any]:
    """Train on this rank; losses, gradient norms and evaluations by step."""
    size = mesh.get("tp", 1) * mesh.get("pp", 1) * mesh.get("dp", 1)
    model = built(name).double()
    kind: Any = Trainer
    if size > 1:
        model, kind = pt.shard(model, **mesh), pt.split_trainer(Trainer)
    args = TrainingArguments(
        folder, use_cpu=True, per_device_train_batch_size=4 // mesh.get("dp", 1), num_train_epochs=2, logging_steps=1,
        eval_strategy="steps", report_to=[], seed=0, learning_rate=1e-2, disable_tqdm=True,
        **{"max_grad_norm": 0.5, "save_steps": 6, "eval_steps": 4, **options},
    )  # fmt: skip
    exact: list[float] = []

    class Recording(kind):  # type: ignore[misc]
        """Records losses before Trainer rounds them to float32."""

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            exact.append(float(loss))
            return loss

    with pt.Float64Everywhere():
        trainer = Recording(model=model, args=args, train_dataset=rows(14), eval_dataset=rows(6))
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(str(Path(folder) / "final"))
    logs = trainer.state.log_history
    return {"loss": exact} | {kind: [log[kind] for log in logs if kind in log] for kind in ("grad_norm", "eval_loss")}


def final(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t.detach() for name, t in AutoModelForCausalLM.from_pretrained(folder / "final").named_parameters()}


def assert_alike(expected: dict[str, Any], found: dict[str, Any], steps: int = 8) -> None:
    assert len(found["loss"]) == steps
    for kind, values in expected.items():
        assert found[kind], kind
        assert found[kind] == pytest.approx(values[-len(found[kind]) :], rel=TOLERANCES[kind]), kind


MESHES = [
    ("llama-7-heads-1-kv", {"tp": 2}),
    ("llama-7-heads-1-kv", {"dp": 2}),
    ("llama-biases-tied", {"pp": 2}),
    ("gpt2", {"tp": 2, "dp": 2}),
]


@pytest.mark.parametrize(("name", "mesh"), MESHES)
def test_every_mesh_trains_like_one_process_and_resumes(name: str, mesh: Mesh, tmp_path: Path) -> None:
    whole = trained(name, {}, str(tmp_path / "whole"))
    size = mesh.get("tp", 1) * mesh.get("pp", 1) * mesh.get("dp", 1)
    for found in on(size, trained, name, mesh, str(tmp_path / "split")):
        assert_alike(whole, found)
    assert len(whole["loss"]) == 8
    for expected, got in zip(final(tmp_path / "whole").values(), final(tmp_path / "split").values(), strict=True):
        assert torch.allclose(got, expected, rtol=0, atol=1e-9)
    # Resume in the middle of the second epoch, in another layout of as many ranks.
    other = {"pp": 2, "tp": 2} if size == 4 else {"dp": 2} if "tp" in mesh else {"tp": 2}
    shutil.rmtree(tmp_path / "split" / "final")
    for found in on(size, trained, name, other, str(tmp_path / "split"), str(tmp_path / "split" / "checkpoint-6")):
        assert_alike(whole, found, steps=2)
    for expected, got in zip(final(tmp_path / "whole").values(), final(tmp_path / "split").values(), strict=True):
        assert torch.allclose(got, expected, rtol=0, atol=1e-9)


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    options = {
        "load_best_model_at_end": True,
        "save_total_limit": 1,
        "save_steps": 2,
        "eval_steps": 2,
        "gradient_accumulation_steps": 2,
    }
    whole = trained("llama-7-heads-1-kv", {}, str(tmp_path / "whole"), **options)
    for found in on(2, _best, str(tmp_path / "split"), options):
        assert_alike(whole, found)
    for expected, got in zip(final(tmp_path / "whole").values(), final(tmp_path / "split").values(), strict=True):
        assert torch.allclose(got, expected, rtol=0, atol=1e-9)


def _best(folder: str, options: dict[str, Any]) -> dict[str, Any]:
    return trained("llama-7-heads-1-kv", {"dp": 2}, folder, **options)


def _save_pretrained(folder: str) -> None:
    pt.shard(built("gpt2"), tp=2).save_pretrained(folder, max_shard_size="100KB")


def test_save_pretrained_writes_the_unsplit_model(tmp_path: Path) -> None:
    whole = built("gpt2")
    on(2, _save_pretrained, str(tmp_path / "split"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "split")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 1
    for expected, got in zip(whole.parameters(), saved.parameters(), strict=True):
        assert torch.equal(expected, got)


def test_other_models_and_float16_are_refused(tmp_path: Path) -> None:
    model = pt.shard(built("gpt2"), groups=single_groups())
    with pytest.raises(PartitaError, match="not split by Partita"):
        pt.split_trainer(Trainer)(nn.Linear(2, 2))
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    args.fp16 = True
    with pytest.raises(ModelError, match="float16"):
        pt.split_trainer(Trainer)(model, args)
