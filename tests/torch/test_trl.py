"""TRL's trainers on split models: the losses of one process, though TRL multiplies by the head's weight itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOTrainer, RLOOTrainer, SFTConfig, SFTTrainer

import partita.torch as pt
from partita.errors import ModelError
from tests.support.ranks import on

# TRL 1.16 sets an option that transformers 5.24 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

TOLERANCE = 2e-6
"""TRL's own head computes in float32, in tiles; ours computes in the model's float64. Four steps apart, that is 2e-7."""


def tokenizer() -> Any:
    characters = {chr(code): code - 29 for code in range(32, 127)} | {"<unk>": 0, "<eos>": 1, "<pad>": 2}
    inner = Tokenizer(models.BPE(vocab=characters, merges=[], unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def new_model(mesh: dict[str, int], size: int) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=98, hidden_size=24, intermediate_size=37, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).double()
    return pt.shard(model, **mesh) if size > 1 else model


def trained(kind: str, mesh: dict[str, int], folder: str) -> list[float]:
    """The loss of each step on this rank."""
    size = mesh.get("tp", 1) * mesh.get("pp", 1) * mesh.get("dp", 1)
    options: dict[str, Any] = {
        "output_dir": folder, "per_device_train_batch_size": 4 // mesh.get("dp", 1), "max_steps": 4, "report_to": [],
        "use_cpu": True, "seed": 0, "learning_rate": 1e-2, "disable_tqdm": True, "save_steps": 4, "bf16": False,
        "max_length": 64, "gradient_checkpointing": False,
    }  # fmt: skip
    answers = [
        {"prompt": "say " + "ab" * (n % 3 + 1), "yes": " yes" * (n % 4 + 1), "no": " no" * (n % 3)} for n in range(18)
    ]
    trainer_class: Any = SFTTrainer if kind == "sft" else DPOTrainer
    if size > 1:
        trainer_class = pt.split_trainer(trainer_class)
    losses: list[float] = []

    class Recording(trainer_class):  # type: ignore[misc]
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            return loss

    with pt.Float64Everywhere():
        if kind == "sft":
            rows = [{"prompt": one["prompt"], "completion": one["yes"]} for one in answers]
            trainer = Recording(new_model(mesh, size), args=SFTConfig(**options), train_dataset=Dataset.from_list(rows),
                                processing_class=tokenizer())  # fmt: skip
        else:
            rows = [{"prompt": one["prompt"], "chosen": one["yes"], "rejected": one["no"]} for one in answers]
            trainer = Recording(
                new_model(mesh, size), new_model(mesh, size), args=DPOConfig(**options),
                train_dataset=Dataset.from_list(rows), processing_class=tokenizer(),
            )  # fmt: skip
        trainer.train()
    return losses


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"dp": 2}, {"pp": 2}], ids=["tp", "dp", "pp"])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_the_losses_are_those_of_one_process(kind: str, mesh: dict[str, int], tmp_path: Any) -> None:
    expected = trained(kind, {}, str(tmp_path / "whole"))
    assert len(expected) == 4
    assert expected[0] != expected[-1]
    for found in on(2, trained, kind, mesh, str(tmp_path / "split")):
        assert found == pytest.approx(expected, rel=TOLERANCE)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "split" / "checkpoint-4")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-4")
    for one, other in zip(saved.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("trainer", [GRPOTrainer, RLOOTrainer])
def test_trainers_that_generate_are_refused(trainer: type[Any]) -> None:
    class Own(trainer):  # type: ignore[misc]
        pass

    for one in (trainer, Own):
        with pytest.raises(ModelError, match=f"{one.__name__} generates what it trains on: .*Generate with partita"):
            pt.split_trainer(one)
