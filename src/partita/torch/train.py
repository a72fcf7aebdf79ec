"""Training over tensor, pipeline and data parallel ranks: the same loss curve whatever the mesh."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from partita.errors import ModelError
from partita.schedule import Timeline
from partita.torch.collectives.collective_errors import collective_errors
from partita.torch.collectives.groups import ParallelGroups
from partita.torch.model.head import local_logits
from partita.torch.model.modes import checkpointing_set, mode_set, random_state_kept
from partita.torch.model.parts import plan_of
from partita.torch.proof.balance_probe import balance_of
from partita.torch.stages.copies import summed_copies
from partita.torch.stages.cut import refuse_layer_drop
from partita.torch.stages.pipeline import Pipeline
from partita.torch.training.batches import batch
from partita.torch.training.objective import IGNORED, check_trainable, examples, loss_of
from partita.torch.training.optimizer import MasterAdamW, state_dtype
from partita.torch.training.replicas import clip_gradients, start_alike, sum_gradients
from partita.torch.weights.fill import as_dtype
from partita.torch.weights.moments import restore_optimizer
from partita.torch.weights.rank_shard import RankShard
from partita.training import StepReport, TrainSettings, schedule_of
from partita.training.ids import check_ids
from partita.training.loop import StepHooks, begin_run, run_steps
from partita.training.random import step_seed
from partita.training.saving import Saver, SaveReport, Saves
from partita.training.settings import FLOAT16
from partita.training.state import TrainingState

__all__ = ["StepReport", "TrainSettings", "accumulate_gradients", "make_optimizer", "schedule_of", "train"]


def train(
    model: nn.Module,
    tokens: Tensor | np.ndarray[Any, Any],
    settings: TrainSettings,
    *,
    on_step: Callable[[StepReport], None] | None = None,
    on_timeline: Callable[[Timeline], None] | None = None,
    saves: Saves | None = None,
    on_save: Callable[[SaveReport], None] | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> list[StepReport]:
    """Train a split causal language model in place; every rank calls it with the same tokens and settings.

    With `saves`, checkpoints are written during training; each holds everything needed to resume. A run
    resumed on the same layout matches the uninterrupted run bit for bit; on another layout it differs by rounding. The
    same micro-batches have the same dropout on every mesh, except inside layers that tensor ranks split. For a model
    with adapters, only the adapters are saved; resume with `load_adapters(model, checkpoint)` on their base model.

    The modules' training flags, torch's random state and the checkpointing of activations are afterwards as before, also after
    an error; the parameters have no `grad`.

    Args:
        model: A result of `load`, `shard` or `fresh`.
        tokens: The text, int64 `[tokens]`.
        settings: The training settings.
        on_step: Called after every step, on every rank.
        on_timeline: Called on every rank with the start and end of each action of the last step.
        saves: Folder and interval of checkpoints.
        on_save: Called on every rank for each complete checkpoint, between two steps.
        resume: The run's checkpoint (`.../step-000100`) to resume from, from which `model` or its adapters were
            loaded.

    Returns:
        One report per step, the same on every rank except for the times.

    Raises:
        PlanError: The batch cannot be distributed over the replicas and micro-batches.
        ModelError: The model is not a causal language model, or has float16 weights; the loss is not finite, or its config
            requests an auxiliary loss that cannot be computed with stages or per sequence.
        CheckpointError: A checkpoint cannot be written, or the one to resume from belongs to another run; on every rank.

    Examples:
        >>> model = pt.load("./model", tp=2)
        >>> reports = pt.train(model, tokens, pt.TrainSettings(steps=2, batch_size=2, sequence_length=8))
        >>> [report.step for report in reports]
        [1, 2]
    """
    plan, groups = plan_of(model)
    tokens = torch.as_tensor(tokens)
    schedule = schedule_of(plan, settings)
    plan.spec.refuse_beyond_positions(settings.sequence_length, "a sequence")
    check_ids(tokens.numpy(force=True), plan.spec.vocab_size)
    check_trainable(model)
    with collective_errors(groups):
        _refuse_float16(model)
    balance_of(model, plan, settings.aux_loss_scope)  # which raises before anything is done
    if plan.num_stages > 1:
        refuse_layer_drop(model)
    start_alike([p for p in model.parameters() if p.requires_grad], groups.dp)
    optimizer = make_optimizer(model, settings, groups)
    pipeline = Pipeline(model, schedule)
    model.zero_grad(set_to_none=True)
    run = begin_run(
        settings, tokens.cpu().numpy(), saves, resume,
        collective=lambda: collective_errors(groups), restore=lambda folder: restore_optimizer(model, optimizer, folder),
    )  # fmt: skip
    saver = make_saver(model, optimizer, saves, run, on_save) if saves is not None else None

    def backward(step: int, on_timeline: Callable[[Timeline], None] | None) -> float:
        rows = batch(tokens, step, settings.batch_size, settings.sequence_length, settings.seed)
        return accumulate_gradients(pipeline, rows, step, settings, on_timeline=on_timeline)

    def update(rate: float) -> None:
        if optimizer is not None:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        model.zero_grad(set_to_none=True)

    hooks = StepHooks(backward, lambda: clip_gradients(model, plan, groups, settings.clip_norm), update)
    recomputed = checkpointing_set(model) if settings.checkpointing else nullcontext()
    try:
        with mode_set(model, training=True), random_state_kept(model), recomputed:
            return run_steps(run, settings, hooks, saver, on_step=on_step, on_timeline=on_timeline)
    finally:
        model.zero_grad(set_to_none=True)


def _refuse_float16(model: nn.Module) -> None:
    narrow = next((name for name, p in model.named_parameters() if p.dtype == torch.float16), None)
    if narrow is not None:
        raise ModelError(FLOAT16.format(narrow))


def make_saver(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
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
    share = RankShard(model, optimizer, saves, run.settings.master_dtype)
    return Saver(saves, share, run, groups, on_save=on_save)


def make_optimizer(model: nn.Module, settings: TrainSettings, groups: ParallelGroups) -> torch.optim.Optimizer | None:
    """AdamW over this rank's trainable parameters, None if there are none; norms and biases do not decay.

    Parameters narrower than float32 have float32 master weights and moments, unless `settings.master_dtype` is `model`.

    Raises:
        ModelError: No rank has trainable parameters.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not any(groups.pp.all_gather_object(bool(parameters))):
        raise ModelError("no parameter of the model is trainable: all have requires_grad=False.")
    if not parameters:
        return None
    split: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    split = [group for group in split if group["params"]]
    given: dict[str, Any] = {"lr": settings.learning_rate, "betas": (0.9, 0.95), "eps": settings.epsilon}
    has_masters = any(state_dtype(p.dtype, settings.master_dtype) != p.dtype for p in parameters)
    kind = MasterAdamW if has_masters else torch.optim.AdamW
    if not settings.zero or groups.dp.size == 1:
        return kind(split, **given)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    class MixedOptimizer(ZeroRedundancyOptimizer):
        """Takes parameters of mixed dtypes (a router in float32); only ZeRO's shared buckets, unused here, need one dtype."""

        def _verify_same_dense_param_type(self) -> None:
            pass

    return MixedOptimizer(split, kind, process_group=groups.dp.group, **given)


def accumulate_gradients(
    pipeline: Pipeline,
    rows: Tensor,
    step: int,
    settings: TrainSettings,
    *,
    on_timeline: Callable[[Timeline], None] | None = None,
) -> float:
    """Backward of the mean loss over the full batch `rows` `[batch_size, length + 1]`; each replica takes its part.

    The auxiliary loss of routers is the mean over micro-batches, or over sequences (`settings.aux_loss_scope`).

    Returns:
        The mean loss of the full batch.
    """
    model, plan, groups = pipeline.model, pipeline.plan, pipeline.groups
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    mask_token = settings.mask_token if settings.mask_token is not None else plan.spec.vocab_size - 1
    inputs, targets = examples(model, rows, step, settings.seed, mask_token)
    count = int((targets != IGNORED).sum())
    replicas, replica = groups.dp.size, groups.dp.rank
    parts = [
        mine.chunk(replicas)[replica].to(device).chunk(settings.microbatches) for mine in (inputs, targets)
    ]  # fmt: skip
    total = torch.zeros((), dtype=torch.float64, device=device)
    with local_logits(model) as split:

        def finish(output: Any, microbatch: int) -> Tensor:
            summed, extra = loss_of(model, output, parts[1][microbatch], split, groups.tp, settings.mtp_weight)
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
                balance=balance_of(model, plan, settings.aux_loss_scope),
                seed=lambda microbatch: step_seed(settings.seed, step, replica * settings.microbatches + microbatch),
                timed=on_timeline is not None,
            )
    if on_timeline is not None:
        on_timeline(pipeline.timeline(origin_s))
    sum_gradients([p for p in model.parameters() if p.requires_grad], groups.dp)
    total = groups.pp.broadcast_(total, plan.stage_rank(plan.loss_stage))
    return float(groups.dp.all_reduce_(total))


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
