"""The training objective of a model: its targets and its loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from partita.core.plan import Plan
from partita.core.sharding.split import Split
from partita.errors import ModelError
from partita.torch.collectives.comm import Communicator
from partita.torch.layers.loss import vocab_parallel_cross_entropy
from partita.torch.model.balance import coefficient_of
from partita.torch.model.context import Context
from partita.torch.model.head import local_logits
from partita.training.data.rows import IGNORED, Rows
from partita.training.settings import TrainSettings

MASKED_SHARE = 0.15
"""Fraction of tokens that a masked language model predicts (Devlin et al. 2019, 1810.04805, section 3.1)."""


def check_trainable(model: nn.Module) -> None:
    """Raise `ModelError` for a model that predicts no tokens."""
    if not (_is_causal(model) or _is_masked(model)):
        raise ModelError(
            f"{type(model).__name__} is neither a causal nor a masked language model. Only these can be trained."
        )


def _is_causal(model: nn.Module) -> bool:
    name = type(model).__name__
    return "CausalLM" in name or "LMHead" in name


def _is_masked(model: nn.Module) -> bool:
    return "MaskedLM" in type(model).__name__


@dataclass(frozen=True)
class Example:
    """A micro-batch: the model's inputs, and the targets `[n, length]`, -100 where there is none."""

    inputs: dict[str, Any]
    targets: Tensor

    def to(self, device: torch.device) -> Example:
        """The same on a device."""
        inputs = {name: one.to(device) if isinstance(one, Tensor) else one for name, one in self.inputs.items()}
        return Example(inputs, self.targets.to(device))

    def own(self, comm: Communicator) -> Example:
        """The positions of this context parallel rank."""
        if comm.size == 1:
            return self
        context = Context.of(self.inputs, comm)
        return Example(context.split(self.inputs), context.own(self.targets))


def examples(
    model: nn.Module, rows: Sequence[Rows], step: int, settings: TrainSettings, mask_token: int, dp: Communicator
) -> list[Example]:
    """The inputs and targets of a replica's micro-batches, each of rows `[n, length + 1]`, on the CPU.

    A causal model predicts the next token; a masked one the tokens that `mask_token` replaces, which are sampled from
    seed and step alone.
    """
    if _is_causal(model):
        return [
            Example(_inputs(one, torch.from_numpy(one.ids[:, :-1])), torch.from_numpy(one.labels[:, 1:]))
            for one in rows
        ]
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    count = sum(len(one.ids) for one in rows)
    width = max(settings.sequence_length, *(one.ids.shape[1] - 1 for one in rows))
    drawn = torch.rand((dp.size * count, width), generator=generator)
    first = dp.rank * count
    made = []
    for one in rows:
        made.append(_masked(one, drawn[first : first + len(one.ids)], mask_token))
        first += len(one.ids)
    return made


def _masked(rows: Rows, drawn: Tensor, mask_token: int) -> Example:
    """A micro-batch of a masked language model; `drawn` are random numbers for its inputs."""
    ids, labels = torch.from_numpy(rows.ids), torch.from_numpy(rows.labels)
    if rows.is_masked:
        return Example(_inputs(rows, ids), labels)
    ids, labels = ids[:, :-1], labels[:, :-1]
    counts = labels != IGNORED
    hidden = (drawn[:, : ids.shape[1]] < MASKED_SHARE) & counts
    first = counts & (counts.cumsum(1) == 1)
    hidden |= first & ~hidden.any(1, keepdim=True)
    return Example(_inputs(rows, ids.masked_fill(hidden, mask_token)), labels.masked_fill(~hidden, IGNORED))


def _inputs(rows: Rows, ids: Tensor) -> dict[str, Any]:
    given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    length = ids.shape[1]
    if rows.mask is not None and not rows.mask[:, :length].all():
        given["attention_mask"] = torch.from_numpy(rows.mask[:, :length].astype("int64"))
    if rows.positions is not None:
        given["position_ids"] = torch.from_numpy(rows.positions[:, :length])
    return given


@dataclass(frozen=True)
class Objective:
    """What is minimized: the sum of `loss` over the micro-batches of all replicas, divided by the sum of `weight`.

    Attributes:
        loss: Maps logits `[n, length, vocab]` and their labels `[n, length]` to a scalar, summed over the labels that are not
            -100; None for the cross-entropy.
        weight: Maps labels `[n, length]` to what a micro-batch counts, a number; None for the number of labels.
    """

    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    weight: Callable[[Tensor], Any] | None = None

    def weight_of(self, targets: Tensor) -> float:
        """What a micro-batch of `targets` counts."""
        return float((targets != IGNORED).sum() if self.weight is None else self.weight(targets))

    def logits(self, model: nn.Module) -> AbstractContextManager[Split | None]:
        """A context in which the head's columns stay on their ranks, unless the caller's loss needs all of them."""
        return local_logits(model) if self.loss is None else nullcontext()

    def summed(self, logits: Tensor, targets: Tensor, split: Split | None, comm: Communicator) -> Tensor:
        """The summed loss of `targets` under `logits`, in float32 or wider."""
        if self.loss is None:
            return summed_cross_entropy(logits, targets, split, comm)
        return self.loss(logits if logits.dtype == torch.float64 else logits.float(), targets)

    def check(self, plan: Plan, device: torch.device) -> None:
        """Call the caller's functions once with two labels.

        Raises:
            ModelError: They do not return what training needs.
        """
        labels = torch.zeros((1, 2), dtype=torch.int64, device=device)
        if self.weight is not None and self.loss is None:
            raise ModelError("loss_weight is for the loss of your own. Give loss too, or leave loss_weight out.")
        if self.loss is None:
            return
        logits = torch.zeros((1, 2, plan.spec.vocab_size or 1), device=device, requires_grad=True)
        with torch.enable_grad():
            value = self.loss(logits, labels)
        if not isinstance(value, Tensor) or value.dim() or not value.requires_grad or not value.is_floating_point():
            raise ModelError(
                "loss must return a scalar tensor with a gradient, the sum over the labels of a micro-batch; for logits "
                f"{list(logits.shape)} and labels {list(labels.shape)} it returned {_said(value)}."
            )
        weight = self.weight_of(labels)
        if not 0 <= weight < math.inf:
            raise ModelError(f"loss_weight must return a finite number of at least 0; got {weight}.")


CROSS_ENTROPY = Objective()


def _said(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"{value!r:.100}"
    return f"{value.dtype} {list(value.shape)}{'' if value.requires_grad else ' without a gradient'}"


def loss_of(
    model: nn.Module,
    output: Any,
    targets: Tensor,
    split: Split | None,
    comm: Communicator,
    mtp_weight: float,
    objective: Objective,
) -> tuple[Tensor, Tensor | None]:
    """The summed loss of `targets` `[n, length]`, and the auxiliary loss of a router that the model asks for.

    The sum over the layers of multi-token prediction is weighted by `mtp_weight` / number of layers (2412.19437, equation 25).
    The head's columns stay on their ranks (`split`) unless the objective needs the unsplit logits.
    """
    auxiliary = getattr(output, "aux_loss", None)
    if auxiliary is not None:
        auxiliary = auxiliary * coefficient_of(model)
    summed = objective.summed(output.logits, targets, split, comm)
    ahead = getattr(output, "mtp_logits", [])
    for k, logits in enumerate(ahead, 1):
        summed = summed + mtp_weight / len(ahead) * objective.summed(logits, targets[:, k:], split, comm)
    return summed, auxiliary


def summed_cross_entropy(logits: Tensor, targets: Tensor, split: Split | None, comm: Communicator) -> Tensor:
    """The summed cross-entropy of `targets` `[n, length]` under `logits` `[n, length, vocab_r]`, in float32 or wider."""
    flat, goal = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    if split is None:
        wide = flat if flat.dtype == torch.float64 else flat.float()
        return F.cross_entropy(wide, goal, reduction="sum", ignore_index=IGNORED)
    return vocab_parallel_cross_entropy(flat, goal, comm, split, reduction="sum", ignore_index=IGNORED)
