"""Training over tensor, pipeline and data parallel ranks: the same loss curve whatever the mesh."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from partita.errors import ModelError, PlanError
from partita.generation import Tokenizer
from partita.schedule import Timeline
from partita.schedule.fit import forward_only
from partita.torch.collectives.collective_errors import collective_errors
from partita.torch.collectives.groups import ParallelGroups
from partita.torch.loops.own_optimizer import check_own, own_names, scaled_step
from partita.torch.model.modes import checkpointing_set, mode_set, random_state_kept
from partita.torch.model.parts import plan_of
from partita.torch.proof.balance_probe import balance_of
from partita.torch.proof.context import prove_context, refuse_length
from partita.torch.proof.packing import prove_packing
from partita.torch.quantized.tensor import FROZEN, QuantizedTensor
from partita.torch.stages.copies import summed_copies
from partita.torch.stages.cut import refuse_layer_drop
from partita.torch.stages.pipeline import Pipeline
from partita.torch.training.kept_shards import shaped, shards_of
from partita.torch.training.local_step import LocalStep, device_peak_flops, peak_bytes, traced
from partita.torch.training.make_optimizer import make_optimizer
from partita.torch.training.objective import CROSS_ENTROPY, Example, Objective, check_trainable, examples, loss_of
from partita.torch.training.replicas import by_copies, clip_gradients, start_alike, sum_gradients
from partita.torch.training.sharded import ShardedOptimizer
from partita.torch.weights.adapters import adapters
from partita.torch.weights.fill import as_dtype
from partita.torch.weights.moments import AnyOptimizer, restore_optimizer
from partita.torch.weights.optimizer_state import load_optimizer
from partita.torch.weights.rank_shard import RankShard
from partita.training import StepReport, TrainSettings, schedule_of
from partita.training.data.given import Batches, Run, training_data
from partita.training.data.rows import Rows, plain_rows
from partita.training.data.samples import Samples
from partita.training.follow import Follow
from partita.training.loop import StepHooks, Watch, begin_run, mean_loss, run_steps
from partita.training.meter import Meter
from partita.training.random import step_seed
from partita.training.saving import Saver, SaveReport, Saves
from partita.training.settings import FLOAT16
from partita.training.state import TrainingState

__all__ = ["StepReport", "TrainSettings", "accumulate_gradients", "make_optimizer", "schedule_of", "train"]


@shaped
def train(
    model: nn.Module,
    tokens: Any,
    settings: TrainSettings,
    *,
    tokenizer: Tokenizer | None = None,
    eval_data: Any = None,
    on_step: Callable[[StepReport], None] | None = None,
    on_timeline: Callable[[Timeline], None] | None = None,
    saves: Saves | None = None,
    on_save: Callable[[SaveReport], None] | None = None,
    resume: str | os.PathLike[str] | None = None,
    follow: Follow | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    loss_weight: Callable[[Tensor], float | Tensor] | None = None,
) -> list[StepReport]:
    """Train a split language model in place; every rank calls it with the same data and settings.

    The loss is the mean over all labels of the complete batch, whatever micro-batch or replica they are in. With a `loss` of
    your own it is its sum over all micro-batches and replicas, divided by the sum of `loss_weight`, by default the number of
    labels. So a `loss` returns a sum, never a mean: for a mean over sequences give `loss_weight=len`.

    With `saves`, checkpoints are written during training; each holds everything needed to resume. A run
    resumed on the same layout matches the uninterrupted run bit for bit; on another layout it differs by rounding. The
    same micro-batches have the same dropout on every mesh, except inside layers that tensor ranks split. For a model
    with adapters, only the adapters are saved; resume with `load_adapters(model, checkpoint)` on their base model.

    The modules' training flags, torch's random state and the checkpointing of activations are afterwards as before, also after
    an error; the parameters have no `grad`.

    Args:
        model: A result of `load`, `shard` or `fresh`.
        tokens: The data. One row of ids `[tokens]` and a list of texts are divided into rows of equal length. A list of ids,
            rows with `input_ids` (and `labels`, `attention_mask`) and rows with the columns of files are documents with a
            row each: a list, an iterable or a `datasets.Dataset`. A `DataLoader` of dicts of `[batch, tokens]` has a
            complete batch in each.
        settings: The training settings.
        tokenizer: The tokenizer of texts; ids need none.
        eval_data: Data in one of these forms, on which the loss is computed as `settings.eval_every` says.
        on_step: Called after every step, on every rank.
        on_timeline: Called on every rank with the start and end of each action of the last step.
        saves: Folder and interval of checkpoints.
        on_save: Called on every rank for each complete checkpoint, between two steps.
        resume: The run's checkpoint (`.../step-000100`) to resume from, from which `model` or its adapters were
            loaded.
        follow: Reporters of the steps, and steps to profile.
        optimizer: An optimizer that you created over all trainable parameters of the split model, with your parameter groups.
            Each step multiplies the groups' learning rates by the schedule of `settings` (`lr_schedule="constant"` and
            `warmup_steps=0` keep them), and puts them back; no other option changes. It steps the parameters themselves, in
            their dtype. Checkpoints have its state, and options of the groups, which replace those given when a run resumes.
        loss: `loss(logits, labels)` returns a scalar, summed over the labels that are not -100. It gets a micro-batch's unsplit
            logits `[n, length, vocab]` in float32 or wider on every tensor rank of the last stage, and the label of each logit
            `[n, length]`; the logits of multi-token prediction too. Before the first step every rank calls it with two labels
            to check its result. Auxiliary losses of the model are added as usual. An evaluation uses it too.
        loss_weight: `loss_weight(labels)` returns what a micro-batch counts in the mean, a number that the parameters do not
            change: for a loss with class weights `weights[labels].sum()`.

    Returns:
        One report per step, the same on every rank except for the times.

    Raises:
        PlanError: The batch cannot be distributed over the replicas and micro-batches, the data has another form, or settings
            of the optimizer are given beside `optimizer`.
        ModelError: The model is not a causal language model, or has float16 weights; or its config requests an auxiliary loss
            that cannot be computed with stages or per sequence; or `optimizer` steps other parameters or needs unsplit
            tensors, or `loss` does not return a scalar.
        DivergedError: The loss or a gradient is not finite; on every rank, before the step changes a weight.
        CheckpointError: A checkpoint cannot be written, or the one to resume from belongs to another run; on every rank.

    Examples:
        >>> model = pt.load("./model", tp=2)
        >>> reports = pt.train(model, tokens, pt.TrainSettings(steps=2, batch_size=2, sequence_length=8))
        >>> [report.step for report in reports]
        [1, 2]
    """
    plan, groups = plan_of(model)
    schedule = schedule_of(plan, settings)
    plan.spec.refuse_beyond_positions(settings.sequence_length, "a sequence")
    with collective_errors(groups):
        data, evaluated, settings = training_data(tokens, eval_data, Run(settings, plan.spec, groups, tokenizer))
    objective = Objective(loss, loss_weight)
    _check(model, settings, objective)
    check_own(model, optimizer, settings)
    if shards_of(model) and settings.zero != 3:
        raise PlanError(
            f"the model was loaded with zero=3, so that each replica holds only its shard of every parameter, but the settings "
            f"have zero={settings.zero}. Use zero=3 in both, or in neither."
        )
    for copied, comm in by_copies(model):
        start_alike([one for one in copied if id(one) not in shards_of(model)], comm)
    steps = _Steps.of(model, settings, optimizer)
    memory = steps.memory
    pipeline = Pipeline(model, schedule, memory)
    model.zero_grad(set_to_none=True)
    run = begin_run(
        settings, data, saves, resume, collective=lambda: collective_errors(groups), restore=steps.restore,
        own=own_names(optimizer, loss),
    )  # fmt: skip
    saver = make_saver(model, steps.optimizer, saves, run, on_save) if saves is not None else None
    local = LocalStep(model, groups)

    def backward(step: int, on_timeline: Callable[[Timeline], None] | None) -> tuple[float, int]:
        nonlocal local
        local = LocalStep(model, groups)
        rows = data.rows(step, settings, groups.dp.size, groups.dp.rank)
        return backward_of(pipeline, rows, step, settings, objective=objective, on_timeline=on_timeline, local=local)

    follow = follow or Follow()
    hooks = StepHooks(
        backward, lambda: _clipped(pipeline, settings.clip_norm), steps.step, lambda: local.fault(),
        _meter(model, settings, follow), traced,
        partial(evaluate_loss, model, evaluated, settings, objective, memory) if evaluated is not None else None,
    )  # fmt: skip
    watch = Watch(groups, follow, on_step, on_timeline)
    recomputed = checkpointing_set(model, settings.checkpointing, plan)
    try:
        sharded = memory.training() if memory is not None else nullcontext()
        with mode_set(model, training=True), random_state_kept(model), recomputed, sharded:
            return run_steps(run, settings, hooks, saver, watch)
    finally:
        model.zero_grad(set_to_none=True)


@dataclass(frozen=True)
class _Steps:
    """The steps of an optimizer, the caller's (`is_own`) or that of the settings; None on a rank that trains nothing."""

    model: nn.Module
    settings: TrainSettings
    optimizer: AnyOptimizer | None
    is_own: bool

    @property
    def memory(self) -> ShardedOptimizer | None:
        """The optimizer, if replicas share its state."""
        return self.optimizer if isinstance(self.optimizer, ShardedOptimizer) else None

    @classmethod
    def of(cls, model: nn.Module, settings: TrainSettings, own: torch.optim.Optimizer | None) -> _Steps:
        _, groups = plan_of(model)
        return cls(model, settings, own or make_optimizer(model, settings, groups), own is not None)

    def step(self, step: int) -> float:
        """Step the parameters, drop their gradients, and return the learning rate."""
        rate = self.settings.learning_rate_at(step)
        if isinstance(self.optimizer, torch.optim.Optimizer) and self.is_own:
            rate = scaled_step(self.optimizer, self.settings.rate_factor_at(step))
        elif self.optimizer is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return rate

    def restore(self, folder: Path) -> None:
        """Load the optimizer's state from a checkpoint. Every rank must call it."""
        if isinstance(self.optimizer, torch.optim.Optimizer) and self.is_own:
            load_optimizer(self.model, self.optimizer, folder)
        else:
            restore_optimizer(self.model, self.optimizer, folder)


def _check(model: nn.Module, settings: TrainSettings, objective: Objective) -> None:
    """Raise what would end the run later."""
    plan, groups = plan_of(model)
    check_trainable(model)
    with collective_errors(groups):
        _refuse_quantized(model)
        _refuse_float16(model)
        objective.check(plan, _device(model))
        if settings.packing:
            prove_packing(model, plan)
        if plan.mesh.cp > 1:
            refuse_length(model, settings.sequence_length, groups.cp)
            prove_context(model, plan, packing=settings.packing)
    balance_of(model, plan, settings.aux_loss_scope)
    if plan.num_stages > 1:
        refuse_layer_drop(model)


def _meter(model: nn.Module, settings: TrainSettings, follow: Follow) -> Meter:
    plan, groups = plan_of(model)
    device = _device(model)
    is_frozen = any(not p.requires_grad for p in model.parameters())
    peak = follow.peak_flops or device_peak_flops(device)
    return Meter.of(plan, settings, groups.axes, lambda: peak_bytes(device), peak, is_frozen=is_frozen)


def _refuse_quantized(model: nn.Module) -> None:
    frozen = next((name for name, p in model.named_parameters() if isinstance(p, QuantizedTensor)), None)
    if frozen is not None and not adapters(model):
        raise ModelError(f"{frozen}: {FROZEN}")


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _refuse_float16(model: nn.Module) -> None:
    narrow = next((name for name, p in model.named_parameters() if p.dtype == torch.float16), None)
    if narrow is not None:
        raise ModelError(FLOAT16.format(narrow))


def make_saver(
    model: nn.Module,
    optimizer: AnyOptimizer | None,
    saves: Saves,
    run: TrainingState,
    on_save: Callable[[SaveReport], None] | None = None,
) -> Saver:
    """Create the saver of a run's checkpoints. Every rank must call it.

    Raises:
        CheckpointError: The run's folder cannot be created.
        ModelError: The model has adapters that cannot be saved (see `RankShard`).
    """
    _, groups = plan_of(model)
    share = RankShard(model, optimizer, saves, run.settings, is_own=run.has_own_optimizer)
    return Saver(saves, share, run, groups, on_save=on_save)


def accumulate_gradients(
    pipeline: Pipeline,
    rows: Tensor,
    step: int,
    settings: TrainSettings,
    *,
    on_timeline: Callable[[Timeline], None] | None = None,
) -> float:
    """Backward of the mean loss over the full batch `rows` `[batch_size, length + 1]`; each replica takes its part.

    Returns:
        The mean loss of the full batch.
    """
    dp = pipeline.groups.dp
    mine = plain_rows(rows.numpy(force=True)).split(dp.size)[dp.rank].split(settings.microbatches)
    return backward_of(pipeline, mine, step, settings, on_timeline=on_timeline)[0]


def backward_of(
    pipeline: Pipeline,
    rows: Sequence[Rows],
    step: int,
    settings: TrainSettings,
    *,
    objective: Objective = CROSS_ENTROPY,
    on_timeline: Callable[[Timeline], None] | None = None,
    local: LocalStep | None = None,
) -> tuple[float, int]:
    """Backward of the mean loss over the labels of the full batch, of which this replica has the micro-batches `rows`.

    The auxiliary loss of routers is the mean over micro-batches, or over sequences (`settings.aux_loss_scope`).

    Returns:
        The mean loss of the full batch, and the number of its input tokens.

    Raises:
        ModelError: No id of the batch is trained on.
    """
    model, plan, groups = pipeline.model, pipeline.plan, pipeline.groups
    batch = _Batch.of(pipeline, rows, step, settings, objective)
    weight, tokens = batch.counts
    share = 1 / (groups.dp.size * settings.microbatches)
    if not weight:
        raise ModelError(f"step {step + 1}: no token of the batch is trained on. Use larger batches, or other data.")
    total = torch.zeros((), dtype=torch.float64, device=batch.device)
    with objective.logits(model) as split:

        def finish(output: Any, microbatch: int) -> Tensor:
            targets = batch.examples[microbatch].targets
            summed, extra = loss_of(model, output, targets, split, groups.tp, settings.mtp_weight, objective)
            loss = summed / weight
            if extra is not None:
                loss = loss + extra * share
            total.add_(loss.detach().double())
            if extra is not None and groups.cp.rank > 0:
                total.sub_(extra.detach().double() * share)  # every context rank has all of it
            if local is not None:
                local.losses[microbatch] = loss.detach()
            return loss

        with pipeline.memory.opened(), summed_copies(model, plan, groups):
            origin_s = _start_together(groups) if on_timeline is not None else 0.0
            pipeline.run(
                batch.inputs,
                finish,
                key=batch.shape,
                around=lambda: _autocast(settings, batch.device),
                balance=balance_of(model, plan, settings.aux_loss_scope),
                seed=lambda microbatch: step_seed(
                    settings.seed, step, groups.replicas.rank * settings.microbatches + microbatch
                ),
                timed=on_timeline is not None,
            )
    if on_timeline is not None:
        on_timeline(pipeline.timeline(origin_s))
    _sum_gradients(pipeline, local)
    total = groups.pp.broadcast_(total, plan.stage_rank(plan.loss_stage))
    return float(groups.replicas.all_reduce_(total)), tokens


def _sum_gradients(pipeline: Pipeline, local: LocalStep | None) -> None:
    """Sum the gradients over the replicas, or the shards' gradients that are left."""
    model, memory = pipeline.model, pipeline.memory
    if isinstance(memory, ShardedOptimizer) and memory.level > 1:
        memory.finish()
        if local is not None:
            local.norms = memory.norms()
        return
    if local is not None:
        local.before_sum()
    for copied, comm in by_copies(model):
        sum_gradients(copied, comm)


def _clipped(pipeline: Pipeline, clip_norm: float) -> float:
    """Clip the gradients of the parameters or of their shards, and return their norm before."""
    memory = pipeline.memory
    if isinstance(memory, ShardedOptimizer) and memory.level > 1:
        return memory.clip(clip_norm)
    return clip_gradients(pipeline.model, pipeline.plan, pipeline.groups, clip_norm)


def evaluate_loss(
    model: nn.Module,
    data: Samples | Batches,
    settings: TrainSettings,
    objective: Objective = CROSS_ENTROPY,
    memory: ShardedOptimizer | None = None,
) -> float:
    """The mean loss over all labels of `data`, without dropout, auxiliary losses and gradients; every rank must call it.

    Raises:
        ModelError: No id of the data is trained on.
    """
    plan, groups = plan_of(model)
    pipeline = Pipeline(model, forward_only(plan, settings.microbatches), memory)

    def summed(number: int, rows: list[Rows]) -> tuple[float, float]:
        batch = _Batch.of(pipeline, rows, number, settings, objective)
        return _summed_loss(pipeline, batch, settings, objective), batch.counts[0]

    with mode_set(model, training=False):
        return mean_loss(data.in_order(settings, groups.dp.size, groups.dp.rank), summed)


def _summed_loss(pipeline: Pipeline, batch: _Batch, settings: TrainSettings, objective: Objective) -> float:
    """The loss of a full batch, summed over its labels."""
    model, plan, groups = pipeline.model, pipeline.plan, pipeline.groups
    total = torch.zeros((), dtype=torch.float64, device=batch.device)
    with objective.logits(model) as split:

        def finish(output: Any, microbatch: int) -> None:
            targets = batch.examples[microbatch].targets
            total.add_(objective.summed(output.logits, targets, split, groups.tp).double())

        with pipeline.memory.opened():
            pipeline.run(batch.inputs, finish, key=batch.shape, around=lambda: _autocast(settings, batch.device))
            pipeline.flush()
    total = groups.pp.broadcast_(total, plan.stage_rank(plan.loss_stage))
    return float(groups.replicas.all_reduce_(total))


@dataclass(frozen=True)
class _Batch:
    """The micro-batches of this replica in a batch, on their device; and weight and tokens of the full batch."""

    examples: tuple[Example, ...]
    counts: tuple[float, int]
    device: torch.device

    @classmethod
    def of(
        cls, pipeline: Pipeline, rows: Sequence[Rows], step: int, settings: TrainSettings, objective: Objective
    ) -> _Batch:
        model, plan, groups = pipeline.model, pipeline.plan, pipeline.groups
        device = _device(model)
        mask_token = settings.mask_token if settings.mask_token is not None else plan.spec.vocab_size - 1
        made = examples(model, rows, step, settings, mask_token, groups.dp)
        for example in made:
            refuse_length(model, example.inputs["input_ids"].shape[1], groups.cp)
        placed = tuple(example.to(device).own(groups.cp) for example in made)
        weight = sum(objective.weight_of(example.targets) for example in placed)
        tokens = sum(one.tokens for one in rows) if groups.cp.rank == 0 else 0
        counts = torch.tensor([weight, tokens], dtype=torch.float64)
        weight, tokens = groups.replicas.all_reduce_(counts.to(device)).tolist()
        return cls(placed, (weight, int(tokens)), device)

    def inputs(self, stage: int, microbatch: int) -> dict[str, Any]:
        """The model's inputs, the same for all stages."""
        return self.examples[microbatch].inputs

    def shape(self, microbatch: int) -> tuple[int, ...]:
        """The shape of the ids, which determines those of all messages."""
        return tuple(self.examples[microbatch].inputs["input_ids"].shape)


def _start_together(groups: ParallelGroups) -> float:
    """Wait for all ranks of the pipeline, and return the time, which is equal for ranks on one machine."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    groups.pp.barrier()
    now: list[Any] = groups.pp.all_gather_object((socket.gethostname(), time.perf_counter()))
    hosts = {host for host, _ in now}
    return min(s for _, s in now) if len(hosts) == 1 else now[groups.pp.rank][1]  # type: ignore[no-any-return]


def _autocast(settings: TrainSettings, device: torch.device) -> Any:
    dtype = as_dtype(settings.autocast)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
