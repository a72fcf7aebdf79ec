"""Training over tensor and data parallel ranks: the same loss curve whatever the mesh."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from partita.core.plan import Plan
from partita.errors import ModelError, PlanError
from partita.torch.apply import local_tensors, plan_of
from partita.torch.comm import Communicator
from partita.torch.data import batch
from partita.torch.grads import owned_square
from partita.torch.groups import ParallelGroups
from partita.torch.head import local_logits
from partita.torch.load import as_dtype
from partita.torch.loss import vocab_parallel_cross_entropy

BUCKET_BYTES = 25 << 20
"""Gradients travel between replicas in buffers of about this size."""


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        steps: Optimizer steps.
        batch_size: Sequences a step, over all replicas.
        sequence_length: Tokens a sequence.
        learning_rate: The highest, reached after the warm-up.
        min_learning_rate: The last, as a fraction of the highest.
        warmup_steps: Steps over which it rises from zero; then it falls as a cosine.
        weight_decay: Of tensors of two dimensions or more (AdamW: Loshchilov and Hutter 2019, 1711.05101).
        clip_norm: Gradients of a larger global norm are scaled down to it; 0 for none.
        accumulate: Into how many micro-batches a replica cuts its part of the batch.
        seed: Of the order of the data and of dropout.
        autocast: `bfloat16` to compute in it, with weights, reductions of the loss and the optimizer in the model's dtype.
        checkpointing: Whether activations are computed again in backward instead of kept.
    """

    steps: int = 100
    batch_size: int = 8
    sequence_length: int = 128
    learning_rate: float = 3e-4
    min_learning_rate: float = 0.1
    warmup_steps: int = 10
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    accumulate: int = 1
    seed: int = 0
    autocast: str | None = None
    checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "sequence_length", "accumulate"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise PlanError(f"{name} must be a whole number of at least 1, but is {value!r}.")
        for name in ("learning_rate", "min_learning_rate", "warmup_steps", "weight_decay", "clip_norm"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise PlanError(f"{name} must be a number of at least 0, but is {value!r}.")
        if self.autocast not in (None, "bfloat16", "float16"):
            raise PlanError(f"autocast must be bfloat16, float16 or none, but is {self.autocast!r}.")

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        low = self.learning_rate * self.min_learning_rate
        return low + (self.learning_rate - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@dataclass(frozen=True)
class StepReport:
    """One step: its number (from 1), mean loss a token, learning rate, gradient norm before clipping, tokens and seconds."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float


def train(
    model: nn.Module,
    tokens: Tensor,
    settings: TrainSettings,
    *,
    on_step: Callable[[StepReport], None] | None = None,
) -> list[StepReport]:
    """Train a split causal language model in place; every rank calls it with the same tokens and settings.

    Args:
        model: What `load`, `shard` or `fresh` made.
        tokens: The text, int64 `[tokens]`.
        settings: How.
        on_step: Told of every step, on every rank.

    Returns:
        A report a step, the same on every rank but for the seconds.

    Raises:
        PlanError: The batch cannot be dealt out to the replicas and micro-batches.
        ModelError: The model is no causal language model, or the loss is not finite.
    """
    plan, groups = plan_of(model)
    replicas = groups.dp.world_size
    if settings.batch_size % (replicas * settings.accumulate):
        raise PlanError(
            f"batch_size must be a multiple of dp x accumulate ({replicas} x {settings.accumulate}), but is "
            f"{settings.batch_size}."
        )
    if "CausalLM" not in type(model).__name__ and "LMHead" not in type(model).__name__:
        raise ModelError(f"{type(model).__name__} is no causal language model, which is what can be trained.")
    if settings.checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})  # type: ignore[operator]
    optimizer = make_optimizer(model, settings)
    device = next(model.parameters()).device
    model.train()
    torch.manual_seed(settings.seed * replicas + groups.dp.rank)
    reports = []
    for step in range(settings.steps):
        begin = time.perf_counter()
        rows = batch(tokens, step, settings.batch_size, settings.sequence_length, settings.seed)
        mine = rows.chunk(replicas)[groups.dp.rank].to(device)
        loss = accumulate_gradients(model, plan, groups, mine, settings, settings.batch_size * settings.sequence_length)
        norm = clip_gradients(model, plan, groups.mp.comm, settings.clip_norm)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise ModelError(
                f"step {step + 1}: the loss is {loss} and the gradient's norm {norm}. Lower the learning rate "
                f"({settings.learning_rate}) or clip_norm ({settings.clip_norm}), or train in a wider dtype."
            )
        rate = settings.learning_rate_at(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        count = settings.batch_size * settings.sequence_length
        report = StepReport(step + 1, loss, rate, norm, count, time.perf_counter() - begin)
        reports.append(report)
        if on_step is not None:
            on_step(report)
    model.eval()
    return reports


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over what is to be trained; tensors of one dimension (norms, biases) do not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ModelError("no parameter of the model is to be trained: all have requires_grad=False.")
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.learning_rate, betas=(0.9, 0.95), eps=1e-8)


def accumulate_gradients(
    model: nn.Module, plan: Plan, groups: ParallelGroups, rows: Tensor, settings: TrainSettings, total_tokens: int
) -> float:
    """Backward of the mean loss over the whole batch: this replica's `rows` `[n, length + 1]`, then summed over replicas.

    Returns:
        The mean loss of the whole batch.
    """
    loss_sum = torch.zeros((), dtype=torch.float64, device=rows.device)
    for part in rows.chunk(settings.accumulate):
        with _autocast(settings, rows.device):
            summed, extra = token_losses(model, plan, groups.mp.comm, part[:, :-1], part[:, 1:])
        loss = summed / total_tokens
        if extra is not None:
            loss = loss + extra * (part.shape[0] / settings.batch_size)
        loss.backward()
        loss_sum += loss.detach().double()
    sum_over_replicas([p.grad for p in model.parameters() if p.grad is not None], groups.dp.comm)
    return float(groups.dp.comm.all_reduce_(loss_sum))


def token_losses(
    model: nn.Module, plan: Plan, comm: Communicator, inputs: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The summed cross-entropy of `targets` `[n, length]`, and the auxiliary loss of a router that the model asks for.

    The head's columns stay on their ranks: the whole logits are never put together.
    """
    with local_logits(model) as split:
        output = model(input_ids=inputs, use_cache=False)
    logits = output.logits
    auxiliary = getattr(output, "aux_loss", None)
    if auxiliary is not None:
        auxiliary = auxiliary * getattr(model.config, "router_aux_loss_coef", 0.0)
    flat, goal = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    if split is None:
        wide = flat if flat.dtype == torch.float64 else flat.float()
        return F.cross_entropy(wide, goal, reduction="sum"), auxiliary
    return vocab_parallel_cross_entropy(flat, goal, comm, split, reduction="sum"), auxiliary


def sum_over_replicas(grads: Iterable[Tensor | None], comm: Communicator) -> None:
    """Sum gradients over the data parallel ranks in place, many in one message."""
    if comm.size == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for grad in grads:
        if grad is not None:
            by_dtype.setdefault(grad.dtype, []).append(grad)
    for same in by_dtype.values():
        for bucket in _buckets(same):
            flat = comm.all_reduce_(torch.cat([grad.reshape(-1) for grad in bucket]))
            for grad, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                grad.copy_(summed.view_as(grad))


def _buckets(grads: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for grad in grads:
        bucket.append(grad)
        size += grad.numel() * grad.itemsize
        if size >= BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


@torch.no_grad()
def clip_gradients(model: nn.Module, plan: Plan, comm: Communicator, clip_norm: float) -> float:
    """Scale the gradients so that the norm of the unsplit model's gradient is at most `clip_norm`; returns it as it was.

    Each element counts once: of what several ranks hold only its owner's.
    """
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    whole = {id(t) for name, t in local_tensors(model, plan).items() if plan.tensor(name).split is None}
    for parameter in model.parameters():
        # What every rank holds whole counts on the first only.
        if parameter.grad is not None and (comm.rank == 0 or id(parameter) not in whole):
            total += owned_square(parameter, parameter.grad)
    norm = float(comm.all_reduce_(total).sqrt())
    if clip_norm and norm > clip_norm:
        scale = clip_norm / (norm + 1e-6)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(scale)
    return norm


def _autocast(settings: TrainSettings, device: torch.device) -> Any:
    dtype = as_dtype(settings.autocast)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
