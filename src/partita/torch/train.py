"""Training over tensor, pipeline and data parallel ranks: the same loss curve whatever the mesh."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from partita.core.plan import Plan
from partita.errors import ModelError, PlanError
from partita.schedule import Schedule, Timeline, build, check_kind, placement_of, vpp_of
from partita.torch.apply import plan_of
from partita.torch.copies import summed_copies
from partita.torch.data import batch
from partita.torch.groups import ParallelGroups
from partita.torch.head import local_logits
from partita.torch.load import as_dtype
from partita.torch.objective import IGNORED, check_trainable, examples, loss_of
from partita.torch.pipeline import Pipeline
from partita.torch.replicas import clip_gradients, sum_over_replicas

_NOT_NEGATIVE = (
    "learning_rate", "min_learning_rate", "warmup_steps", "weight_decay", "epsilon", "clip_norm", "mtp_weight",
)  # fmt: skip


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
        epsilon: AdamW adds it to what it divides by.
        clip_norm: Gradients of a larger global norm are scaled down to it; 0 for none.
        accumulate: Into how many micro-batches a replica cuts its part of the batch.
        schedule: The kind of pipeline schedule (see `partita.schedule.KINDS`); by default `1f1b`, with several stages a rank
            `interleaved-1f1b`, or `zb-v` where they are placed in a V.
        group_size: Of `interleaved-1f1b`: micro-batches that pass a virtual stage in a row; by default pp.
        zero: Whether each replica keeps the optimizer's state of its share of the parameters only (ZeRO-1: Rajbhandari et
            al. 2020, 1910.02054).
        mtp_weight: How much multi-token prediction counts beside the next token (2412.19437: 0.3, at the end 0.1).
        mask_token: What masked language models see in place of what they have to guess; by default the last id.
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
    epsilon: float = 1e-8
    clip_norm: float = 1.0
    accumulate: int = 1
    seed: int = 0
    autocast: str | None = None
    checkpointing: bool = False
    schedule: str | None = None
    group_size: int | None = None
    zero: bool = False
    mtp_weight: float = 0.3
    mask_token: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "sequence_length", "accumulate"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise PlanError(f"{name} must be a whole number of at least 1, but is {value!r}.")
        for name in (
            "learning_rate",
            "min_learning_rate",
            "warmup_steps",
            "weight_decay",
            "epsilon",
            "clip_norm",
            "mtp_weight",
        ):
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
    on_timeline: Callable[[Timeline], None] | None = None,
) -> list[StepReport]:
    """Train a split causal language model in place; every rank calls it with the same tokens and settings.

    Args:
        model: What `load`, `shard` or `fresh` made.
        tokens: The text, int64 `[tokens]`.
        settings: How.
        on_step: Told of every step, on every rank.
        on_timeline: Told, on every rank, when each action of the last step began and ended.

    Returns:
        A report a step, the same on every rank but for the seconds.

    Raises:
        PlanError: The batch cannot be dealt out to the replicas and micro-batches.
        ModelError: The model is no causal language model, or the loss is not finite.
    """
    plan, groups = plan_of(model)
    schedule = schedule_of(plan, settings)
    check_trainable(model)
    if settings.checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})  # type: ignore[operator]
    optimizer = make_optimizer(model, settings, groups)
    pipeline = Pipeline(model, schedule)
    model.zero_grad(set_to_none=True)
    model.train()
    torch.manual_seed(settings.seed * groups.dp.world_size + groups.dp.rank)
    reports = []
    for step in range(settings.steps):
        begin = time.perf_counter()
        rows = batch(tokens, step, settings.batch_size, settings.sequence_length, settings.seed)
        timed = on_timeline if step == settings.steps - 1 else None
        loss = accumulate_gradients(pipeline, rows, step, settings, on_timeline=timed)
        norm = clip_gradients(model, plan, groups, settings.clip_norm)
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise ModelError(
                f"step {step + 1}: the loss is {loss} and the gradient's norm {norm}. Lower the learning rate "
                f"({settings.learning_rate}) or clip_norm ({settings.clip_norm}), or train in a wider dtype."
            )
        rate = settings.learning_rate_at(step)
        if optimizer is not None:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        model.zero_grad(set_to_none=True)
        count = settings.batch_size * settings.sequence_length
        report = StepReport(step + 1, loss, rate, norm, count, time.perf_counter() - begin)
        reports.append(report)
        if on_step is not None:
            on_step(report)
    model.eval()
    return reports


def schedule_of(plan: Plan, settings: TrainSettings) -> Schedule:
    """The schedule of one step.

    Raises:
        PlanError: The batch cannot be dealt out to the replicas and micro-batches, or the schedule is not for the plan's
            stages.
    """
    replicas, pp, vpp = plan.mesh.dp, plan.mesh.pp, plan.vpp
    check_batch(settings.batch_size, replicas, settings.accumulate)
    kind = settings.schedule or default_schedule(plan)
    check_kind(kind, pp, settings.accumulate, vpp, settings.group_size)
    if placement_of(kind) != plan.placement and pp > 1:
        raise PlanError(
            f"schedule {kind} needs its stages placed as `{placement_of(kind)}`, but the plan has `{plan.placement}`. Make the "
            f"plan with placement={placement_of(kind)!r} and vpp={vpp_of(kind, None)}."
        )
    return build(kind, pp, settings.accumulate, vpp, group_size=settings.group_size)


def default_schedule(plan: Plan) -> str:
    """The kind of schedule for a plan when none is asked for."""
    if plan.placement == "v":
        return "zb-v"
    return "1f1b" if plan.vpp == 1 else "interleaved-1f1b"


def check_batch(batch_size: int, replicas: int, microbatches: int) -> None:
    """Raise `PlanError` unless a batch can be dealt out."""
    if batch_size % (replicas * microbatches):
        raise PlanError(
            f"batch_size must be a multiple of dp x micro-batches ({replicas} x {microbatches}), but is {batch_size}."
        )


def make_optimizer(model: nn.Module, settings: TrainSettings, groups: ParallelGroups) -> torch.optim.Optimizer | None:
    """AdamW over what this rank has to train, None where that is nothing; norms and biases do not decay.

    Raises:
        ModelError: No rank has anything to train.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not any(groups.pp.comm.all_gather_object(bool(parameters))):
        raise ModelError("no parameter of the model is to be trained: all have requires_grad=False.")
    if not parameters:
        return None
    split: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    split = [group for group in split if group["params"]]
    given: dict[str, Any] = {"lr": settings.learning_rate, "betas": (0.9, 0.95), "eps": settings.epsilon}
    if not settings.zero or groups.dp.world_size == 1:
        return torch.optim.AdamW(split, **given)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(split, torch.optim.AdamW, process_group=groups.dp.group, **given)


def accumulate_gradients(
    pipeline: Pipeline,
    rows: Tensor,
    step: int,
    settings: TrainSettings,
    *,
    on_timeline: Callable[[Timeline], None] | None = None,
) -> float:
    """Backward of the mean loss over the whole batch `rows` `[batch_size, length + 1]`, of which a replica takes its part.

    Returns:
        The mean loss of the whole batch.
    """
    model, plan, groups = pipeline.model, pipeline.plan, pipeline.groups
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    mask_token = settings.mask_token if settings.mask_token is not None else plan.spec.vocab_size - 1
    inputs, targets = examples(model, rows, step, settings.seed, mask_token)
    count = int((targets != IGNORED).sum())
    replicas, replica = groups.dp.world_size, groups.dp.rank
    parts = [
        mine.chunk(replicas)[replica].to(device).chunk(settings.accumulate) for mine in (inputs, targets)
    ]  # fmt: skip
    total = torch.zeros((), dtype=torch.float64, device=device)
    with local_logits(model) as split:

        def finish(output: Any, microbatch: int) -> Tensor:
            summed, extra = loss_of(model, output, parts[1][microbatch], split, groups.mp.comm, settings.mtp_weight)
            loss = summed / count
            if extra is not None:
                loss = loss + extra * (parts[0][microbatch].shape[0] / settings.batch_size)
            total.add_(loss.detach().double())
            return loss

        with summed_copies(model, plan, groups):
            origin_s = _start_together(groups) if on_timeline is not None else 0.0
            pipeline.run(
                lambda stage, microbatch: {"input_ids": parts[0][microbatch], "use_cache": False},
                finish,
                key=lambda microbatch: tuple(parts[0][microbatch].shape),
                around=lambda: _autocast(settings, device),
            )
    if on_timeline is not None:
        on_timeline(pipeline.timeline(origin_s))
    sum_over_replicas([p.grad for p in model.parameters() if p.grad is not None], groups.dp.comm)
    total = groups.pp.comm.broadcast_(total, plan.stage_rank(plan.loss_stage))
    return float(groups.dp.comm.all_reduce_(total))


def _start_together(groups: ParallelGroups) -> float:
    """Wait for all ranks of the pipeline, and give the time; of ranks on one machine, the same."""
    groups.pp.comm.barrier()
    now: list[Any] = groups.pp.comm.all_gather_object((socket.gethostname(), time.perf_counter()))
    hosts = {host for host, _ in now}
    return min(s for _, s in now) if len(hosts) == 1 else now[groups.pp.rank][1]  # type: ignore[no-any-return]


def _autocast(settings: TrainSettings, device: torch.device) -> Any:
    dtype = as_dtype(settings.autocast)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
