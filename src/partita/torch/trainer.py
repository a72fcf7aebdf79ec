"""Hugging Face's `Trainer`, and trainers derived from it, for split models."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from partita.core.sharding.split import deal
from partita.errors import ModelError
from partita.torch.collectives.groups import ParallelGroups
from partita.torch.loops.watch import refuse_sent_experts
from partita.torch.model.parts import plan_of
from partita.torch.training.fused_head import give_fused_head
from partita.torch.training.replicas import sum_gradients
from partita.torch.weights.adapter_parts import adapter_name, is_peft, unwrapped
from partita.torch.weights.adapters import adapters
from partita.torch.weights.optimizer_state import load_optimizer, save_optimizer
from partita.torch.weights.peft_format import read_adapter, save_adapters
from partita.torch.weights.pretrained import load_into, replacing
from partita.torch.weights.save import save

OPTIMIZER_FOLDER = "optimizer"
"""The folder inside a trainer's checkpoint that has the optimizer's unsplit state."""


def split_trainer(trainer: type[Any]) -> type[Any]:
    """The subclass of a trainer class that trains split models, on every rank of the run.

    It computes what `trainer` computes on the unsplit model in one process: the same batches in the same order, the same
    losses and gradient norms. `per_device_train_batch_size` counts the sequences of one replica. Checkpoints hold the
    unsplit model and the unsplit state of the optimizer, so a run can resume in another layout.

    Args:
        trainer: `transformers.Trainer`, or a class derived from it, such as TRL's `SFTTrainer`. Its model must be the result of
            `load`, `shard` or `fresh`, and may have adapters.

    Raises:
        ModelError: The trainer generates what it trains on, as `GRPOTrainer` and `RLOOTrainer` do. When a trainer is created:
            the model was not split by Partita, or the arguments ask for float16.

    Examples:
        >>> from transformers import Trainer, TrainingArguments
        >>> pt.split_trainer(Trainer).__name__
        'SplitTrainer'
    """
    _refuse_generating(trainer)
    return type(f"Split{trainer.__name__}", (_SplitTraining, trainer), {"__doc__": trainer.__doc__})


def _refuse_generating(trainer: type[Any]) -> None:
    """Raise for a trainer that generates with the model, which its module then unwraps for it (TRL)."""
    modules = (sys.modules.get(cls.__module__) for cls in trainer.__mro__)
    if any(hasattr(module, "unwrap_model_for_generation") for module in modules):
        raise ModelError(
            f"{trainer.__name__} generates what it trains on: it distributes prompts, completions and rewards over processes "
            "by their number, but the ranks of a split model are one process, and a reward function that each rank calls may "
            "return another reward on each. Generate with partita.torch.generate on every rank, compute the rewards on one, "
            "and train on them with SFTTrainer, DPOTrainer or a loop of your own."
        )


def _be_alone(rank: int) -> None:
    """Make accelerate treat this process as the only one, since the split model is one model; rank 0 writes files and logs."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    state = PartialState()
    state.distributed_type, state.num_processes, state.process_index = DistributedType.NO, 1, rank
    AcceleratorState._reset_state()


class _Rows:
    """A data collator that gives each replica its own rows of a batch."""

    def __init__(self, collate: Any, groups: ParallelGroups) -> None:
        self.collate, self.dp = collate, groups.dp

    def __call__(self, features: list[Any]) -> Any:
        counts = deal(len(features), self.dp.size, allow_empty=True)
        first = sum(counts[: self.dp.rank])
        rows = features[first : first + counts[self.dp.rank]]
        return {**(self.collate(rows) if rows else {}), _COUNT: (len(rows), len(features))}


_COUNT = "partita_rows"


class _SplitTraining:
    """What differs from one process: a replica has some rows of each batch, and files are written by all ranks."""

    if TYPE_CHECKING:
        args: Any
        model: Any
        optimizer: Any
        _share: float
        _train_batch_size: int
        accelerator: Any
        processing_class: Any
        lr_scheduler: Any
        state: Any
        data_collator: Any
        push_to_hub: Any

    def __init__(self, *positional: Any, **named: Any) -> None:
        given = inspect.signature(super().__init__).bind_partial(*positional, **named).arguments
        model, args = given.get("model"), given.get("args")
        if not isinstance(model, nn.Module):
            raise ModelError(
                f"model must be a split model; got {model!r:.100}. Use partita.torch.load, and pass the result as model=."
            )
        self._split_model: Any = unwrapped(model)
        _, self._split_groups = plan_of(self._split_model)
        if getattr(args, "fp16", False):
            raise ModelError(
                "a split model cannot be trained in float16: a small gradient would be lost. Use bf16=True."
            )
        refuse_sent_experts(self._split_groups.mesh)
        _be_alone(self._split_groups.rank)
        split = [unwrapped(one) for one in (model, given.get("ref_model")) if isinstance(one, nn.Module)]
        forwards = [one.forward for one in split]
        super().__init__(*positional, **named)
        for one, forward in zip(split, forwards, strict=True):
            give_fused_head(one, forward, getattr(args, "temperature", 1.0))
        self._train_batch_size *= self._split_groups.dp.size

    def get_train_dataloader(self) -> Any:
        if self._split_groups.dp.size == 1:
            return super().get_train_dataloader()  # type: ignore[misc]
        collate = self.data_collator
        try:
            self.data_collator = _Rows(collate, self._split_groups)
            return super().get_train_dataloader()  # type: ignore[misc]
        finally:
            self.data_collator = collate

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """The number of label tokens in the training batches of all replicas; every replica evaluates whole batches."""
        if not all(_COUNT in batch for batch in batch_samples):
            return super()._get_num_items_in_batch(batch_samples, device)  # type: ignore[misc]
        own = [batch for batch in batch_samples if set(batch) != {_COUNT}]
        count = super()._get_num_items_in_batch(own, device)  # type: ignore[misc]
        known = torch.tensor([count is not None, int(count or 0)], device=device)
        anyone, total = self._split_groups.dp.all_reduce_(known).tolist()
        return torch.tensor(total, device=device) if anyone else None

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None, *rest: Any
    ) -> Tensor:
        """The loss of the whole batch. After its last micro-batch the gradients are summed over the replicas."""
        dp = self._split_groups.dp
        if dp.size == 1:
            return super().training_step(model, inputs, num_items_in_batch, *rest)  # type: ignore[misc, no-any-return]
        own, count = inputs.pop(_COUNT)
        # A loss that is not divided by the number of tokens is an average over the replica's rows.
        self._share = own / count if num_items_in_batch is None else 1.0
        loss = torch.zeros((), device=self.args.device)
        if inputs:
            loss = super().training_step(model, inputs, num_items_in_batch, *rest)  # type: ignore[misc]
        if self.accelerator.sync_gradients:
            sum_gradients([p for p in model.parameters() if p.requires_grad], dp)
        return dp.all_reduce_(loss.clone())

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
        result = super().compute_loss(model, inputs, return_outputs=return_outputs, **options)  # type: ignore[misc]
        share = getattr(self, "_share", 1.0) if model.training else 1.0
        if share == 1.0:
            return result
        return (result[0] * share, *result[1:]) if return_outputs else result * share

    @property
    def _adapted(self) -> bool:
        return is_peft(self.model) or bool(adapters(self._split_model))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the unsplit model, or its adapters. Every rank must call it."""
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        with replacing(folder, self._split_groups):
            if self._adapted:
                save_adapters(self.model, folder)
            else:
                save(self._split_model, folder)
        if self.args.should_save:
            tokenizer = getattr(self, "processing_class", None) or getattr(self.data_collator, "tokenizer", None)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            torch.save(self.args, folder / "training_args.bin")
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder = Path(output_dir)
        with replacing(folder / OPTIMIZER_FOLDER, self._split_groups):
            save_optimizer(self._split_model, _unwrapped(self.optimizer), folder / OPTIMIZER_FOLDER)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if (folder / OPTIMIZER_FOLDER).is_dir():
            load_optimizer(self._split_model, _unwrapped(self.optimizer), folder / OPTIMIZER_FOLDER)
            scheduler = torch.load(folder / "scheduler.pt", map_location="cpu", weights_only=True)
            self.lr_scheduler.load_state_dict(scheduler)
        elif (folder / "optimizer.pt").exists():
            raise ModelError(
                f"{folder} has an optimizer.pt, which one process wrote for the unsplit model, and a split model cannot read. "
                "Resume that run unsplit, or start a new run from its weights."
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._load_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load_weights(self.state.best_model_checkpoint)

    def _load_weights(self, folder: str) -> None:
        if self._adapted:
            read_adapter(self._split_model, Path(folder), adapter_name(self._split_model))
        else:
            load_into(self._split_model, folder)

    def _save_rng_state(self, output_dir: str) -> None:
        # The generators of all ranks are in the same state: all see the same batches.
        if self.args.should_save:
            super()._save_rng_state(output_dir)  # type: ignore[misc]


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner
