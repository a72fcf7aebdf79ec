"""Training over tensor, pipeline and data parallel ranks: the same loss curve whatever the mesh, and on either engine."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from partita.core.plan import Plan
from partita.core.sharding.split import Split
from partita.errors import ModelError, PlanError
from partita.generation import Tokenizer
from partita.mlx.collectives.collective_errors import collective_errors
from partita.mlx.collectives.comm import Communicator
from partita.mlx.collectives.groups import ParallelGroups
from partita.mlx.layers.loss import vocab_parallel_cross_entropy
from partita.mlx.model.head import local_logits
from partita.mlx.model.modes import mode_set, random_state_kept
from partita.mlx.model.packing import positions_by_token
from partita.mlx.model.parts import main_output, parameter_homes, plan_of
from partita.mlx.model.sliding_window import refuse_beyond_window
from partita.mlx.model.trainable import Trainable
from partita.mlx.proof.packing import packed_cache, prove_packing
from partita.mlx.proof.stages import prove_parts
from partita.mlx.stages.copies import sum_copies
from partita.mlx.stages.pipeline import Pipeline
from partita.mlx.training.local_step import LocalStep
from partita.mlx.training.optimizer import Optimizer, make_optimizer
from partita.mlx.training.replicas import clip_gradients, start_alike, sum_over_replicas
from partita.mlx.weights.moments import restore_optimizer
from partita.mlx.weights.rank_shard import RankShard
from partita.schedule import Timeline
from partita.schedule.fit import forward_only
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
from partita.training.traces import actions_traced


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
) -> list[StepReport]:
    """Train a split causal language model in place; every rank calls it with the same data and settings.

    The loss is the mean over all labels of the complete batch, whatever micro-batch or replica they are in. Rows of unequal
    length are padded behind, where causal models need no mask; rows with padding in front are refused. Packed rows
    (`settings.packing`) have masks and positions of their documents, which a small model of the family proves before use.

    Frozen arrays (`model.freeze()`, quantized weights) stay unchanged; so only LoRA on the split model, by `add_lora` or
    mlx-lm, is trained. The dropout of `add_lora` depends on `settings.seed`, the step, the micro-batch and the layer, so every
    mesh drops the same elements; other dropout samples from MLX's random state, which each stage seeds differently.

    With `saves`, checkpoints are written during training; each holds everything needed to resume, on
    either engine. A run resumed on the same layout matches the uninterrupted run bit for bit. For a model with
    adapters, only the adapters are saved; resume with `load_adapters(model, checkpoint)` on their base model.

    The modules' training flags and MLX's random state are afterwards as before, also after an error.

    Args:
        model: A result of `load` or `shard`.
        tokens: The data. One row of ids `[tokens]` and a list of texts are divided into rows of equal length. A list of ids,
            rows with `input_ids` (and `labels`, `attention_mask`) and rows with the columns of files are documents with a
            row each: a list, an iterable or a `datasets.Dataset`. A loader of dicts of `[batch, tokens]` has a complete
            batch in each.
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

    Returns:
        One report per step, the same on every rank except for the times.

    Raises:
        PlanError: The batch cannot be distributed over the replicas and micro-batches, the data has another form, or this
            engine does not support a setting.
        ModelError: Nothing is trainable, or the model has float16 arrays; a sequence is longer than a sliding window that
            mlx-lm ignores; MLX lacks a gradient; or the config requests the auxiliary loss of routers.
        DivergedError: The loss or a gradient is not finite; on every rank, before the step changes a weight.
        CheckpointError: A checkpoint cannot be written, or the one to resume from belongs to another run; on every rank.

    Examples:
        >>> model = pm.load("./model", tp=2)
        >>> reports = pm.train(model, tokens, pm.TrainSettings(steps=2, batch_size=2, sequence_length=8))
        >>> [report.step for report in reports]
        [1, 2]
    """
    plan, groups = plan_of(model)
    schedule = schedule_of(plan, settings)
    plan.spec.refuse_beyond_positions(settings.sequence_length, "a sequence")
    _check(settings, plan)
    refuse_beyond_window(plan.spec, settings.sequence_length, "a sequence")
    with collective_errors(groups):
        _refuse_float16(model)
        if settings.checkpointing:
            prove_parts(model, plan)
        if settings.packing:
            prove_packing(model, plan, settings.sequence_length)
        data, evaluated, settings = training_data(tokens, eval_data, Run(settings, plan.spec, groups, tokenizer))
    trainable = Trainable(model)
    if not any(groups.pp.all_gather_object(bool(trainable.names))):
        raise ModelError("no parameter of the model is trainable: all are frozen.")
    start_alike(trainable, groups.dp)
    pipeline = Pipeline(model, schedule, part_layers=_part_layers(settings))
    optimizer = make_optimizer(settings)
    run = begin_run(
        settings, data, saves, resume,
        collective=lambda: collective_errors(groups),
        restore=lambda folder: restore_optimizer(model, trainable, optimizer, folder),
    )  # fmt: skip
    saver = make_saver(model, trainable, optimizer, saves, run, on_save) if saves is not None else None
    gradients: dict[str, mx.array] = {}
    local = LocalStep(groups)

    def backward(step: int, on_timeline: Callable[[Timeline], None] | None) -> tuple[float, int]:
        nonlocal gradients, local
        local = LocalStep(groups)
        rows = data.rows(step, settings, groups.dp.size, groups.dp.rank)
        loss, tokens, gradients = backward_of(pipeline, rows, settings, step, on_timeline=on_timeline, local=local)
        return loss, tokens

    def update(step: int) -> float:
        nonlocal gradients
        rate = settings.learning_rate_at(step)
        optimizer.step(trainable, gradients, rate)
        gradients = {}
        return rate

    follow = follow or Follow()
    is_frozen = len(trainable.names) < len(parameter_homes(model))
    meter = Meter.of(plan, settings, groups.axes, mx.get_peak_memory, follow.peak_flops, is_frozen=is_frozen)
    hooks = StepHooks(
        backward, lambda: clip_gradients(gradients, model, plan, groups, settings.clip_norm), update,
        lambda: local.fault(), meter, actions_traced,
        partial(evaluate_loss, model, evaluated, settings) if evaluated is not None else None,
    )  # fmt: skip
    by_token = positions_by_token(model) if settings.packing else nullcontext()
    with mode_set(model, training=True), random_state_kept(), by_token:
        return run_steps(run, settings, hooks, saver, Watch(groups, follow, on_step, on_timeline))


def _refuse_float16(model: nn.Module) -> None:
    narrow = next((n for n, (home, key) in parameter_homes(model).items() if home[key].dtype == mx.float16), None)
    if narrow is not None:
        raise ModelError(FLOAT16.format(narrow))


def make_saver(
    model: nn.Module,
    trainable: Trainable,
    optimizer: Optimizer,
    saves: Saves,
    run: TrainingState,
    on_save: Callable[[SaveReport], None] | None = None,
) -> Saver:
    """Create the saver of a run's checkpoints. Every rank must call it.

    Raises:
        CheckpointError: The run's folder cannot be created.
        ModelError: The model has arrays that cannot be kept (see `RankShard`).
    """
    _, groups = plan_of(model)
    share = RankShard(model, trainable, optimizer, saves)
    return Saver(saves, share, run, groups, on_save=on_save)


def _check(settings: TrainSettings, plan: Plan) -> None:
    """Raise `PlanError` for settings, or `ModelError` for a model, that this engine does not support."""
    if settings.aux_loss_scope != "microbatch" or plan.spec.config.get("output_router_logits"):
        raise ModelError(
            "mlx-lm's models do not compute the auxiliary loss of their routers, which the config requests "
            "(output_router_logits) or aux_loss_scope is set. Set output_router_logits to False and leave aux_loss_scope out, "
            "or use the torch engine."
        )
    refuse_settings(settings)


def refuse_settings(settings: TrainSettings) -> None:
    """Raise `PlanError` for settings of memory and dtypes that this engine does not support."""
    if settings.checkpointing == "selective":
        raise PlanError(
            "the MLX engine does not support checkpointing='selective': MLX differentiates functions, so it recomputes whole "
            "layers. Use 'full', or a number of layers."
        )
    for name, instead in (
        ("autocast", "load the model in that dtype"),
        ("zero", "every replica keeps the full optimizer state"),
    ):
        if getattr(settings, name):
            raise PlanError(f"the MLX engine does not support {name}={getattr(settings, name)!r}: {instead}.")


def _part_layers(settings: TrainSettings) -> int:
    """Layers that are recomputed at once in backward; 0 for all."""
    return 1 if settings.checkpointing == "full" else int(settings.checkpointing)


def gradients_of(
    pipeline: Pipeline,
    rows: np.ndarray[Any, Any],
    settings: TrainSettings,
    step: int = 0,
    *,
    on_timeline: Callable[[Timeline], None] | None = None,
) -> tuple[float, dict[str, mx.array]]:
    """Backward of the mean loss over the full batch `rows` `[batch_size, length + 1]`; each replica takes its part.

    Returns:
        The mean loss of the full batch, and this rank's part of the gradients by name, summed over replicas and stages.
    """
    dp = pipeline.groups.dp
    mine = plain_rows(rows).split(dp.size)[dp.rank].split(settings.microbatches)
    loss, _, gradients = backward_of(pipeline, mine, settings, step, on_timeline=on_timeline)
    return loss, gradients


def backward_of(
    pipeline: Pipeline,
    rows: Sequence[Rows],
    settings: TrainSettings,
    step: int = 0,
    *,
    on_timeline: Callable[[Timeline], None] | None = None,
    local: LocalStep | None = None,
) -> tuple[float, int, dict[str, mx.array]]:
    """Backward of the mean loss over the labels of the full batch, of which this replica has the micro-batches `rows`.

    Returns:
        The mean loss of the full batch, the number of its input tokens, and this rank's part of the gradients by name,
        summed over replicas and stages.

    Raises:
        ModelError: No id of the batch is trained on.
        PlanError: A row has padding in front of ids.
    """
    model, plan, groups = pipeline.model, pipeline.plan, pipeline.groups
    parts, count, tokens = _batch(groups, rows)
    if not count:
        raise ModelError(f"step {step + 1}: no token of the batch is trained on. Use larger batches, or other data.")
    with local_logits(model, plan) as split:
        origin_s = _start_together(groups) if on_timeline is not None else 0.0
        pipeline.run(
            lambda microbatch: parts[microbatch].ids,
            lambda output, microbatch: (
                _summed_loss(main_output(output), parts[microbatch].targets, split, groups.tp) / count
            ),
            key=lambda microbatch: tuple(parts[microbatch].ids.shape),
            cache=lambda microbatch: parts[microbatch].cache(model),
            seed=lambda microbatch: step_seed(settings.seed, step, groups.dp.rank * settings.microbatches + microbatch),
        )
    if on_timeline is not None:
        on_timeline(pipeline.timeline(origin_s))
    gradients = pipeline.gradients
    sum_copies(gradients, model, plan, groups)
    if local is not None:
        local.before_sum(gradients, pipeline.losses)
    sum_over_replicas(gradients, groups.dp)
    return _summed(pipeline), tokens, gradients


@dataclass(frozen=True)
class _Microbatch:
    """The rows of a micro-batch: ids, targets and, for packed rows, positions, each int `[n, length]`."""

    ids: mx.array
    targets: mx.array
    positions: mx.array | None

    def cache(self, model: nn.Module) -> list[Any] | None:
        """What tells the documents of packed rows apart."""
        return None if self.positions is None else packed_cache(model, self.positions)


def _batch(groups: ParallelGroups, rows: Sequence[Rows]) -> tuple[list[_Microbatch], int, int]:
    """This replica's micro-batches, and the number of labels and of input tokens of the full batch."""
    for one in rows:
        if one.mask is not None and (np.diff(one.mask.astype(np.int8)) > 0).any():
            raise PlanError(
                "mlx-lm's models take no mask of padding, so padding must be behind the ids of a row. Pad on the right "
                "(padding_side='right')."
            )
    parts = [
        _Microbatch(
            mx.array(one.ids[:, :-1]), mx.array(one.labels[:, 1:]),
            mx.array(one.positions[:, :-1].astype(np.int32)) if one.positions is not None else None,
        )
        for one in rows
    ]  # fmt: skip
    counts = [[sum(one.targets for one in rows), sum(one.tokens for one in rows)]]
    if groups.dp.size > 1:
        counts = groups.dp.all_gather_object(counts[0])
    return parts, sum(count for count, _ in counts), sum(tokens for _, tokens in counts)


def _summed(pipeline: Pipeline) -> float:
    """The sum over the losses of the last run, on every rank."""
    plan, groups = pipeline.plan, pipeline.groups
    losses: list[Any] = [loss.item() for loss in pipeline.losses]
    loss: float = groups.pp.all_gather_object(sum(losses))[plan.stage_rank(plan.loss_stage)]
    return float(sum(groups.dp.all_gather_object(loss)))


def evaluate_loss(model: nn.Module, data: Samples | Batches, settings: TrainSettings) -> float:
    """The mean loss over all labels of `data`, without dropout and gradients; every rank must call it.

    Raises:
        ModelError: No id of the data is trained on.
    """
    plan, groups = plan_of(model)
    pipeline = Pipeline(model, forward_only(plan, settings.microbatches))

    def summed(_: int, rows: list[Rows]) -> tuple[float, int]:
        parts, count, _ = _batch(groups, rows)
        return _forward(pipeline, parts), count

    with mode_set(model, training=False):
        return mean_loss(data.in_order(settings, groups.dp.size, groups.dp.rank), summed)


def _forward(pipeline: Pipeline, parts: Sequence[_Microbatch]) -> float:
    """The cross-entropy of a full batch, summed over its labels."""
    with local_logits(pipeline.model, pipeline.plan) as split:
        pipeline.run(
            lambda microbatch: parts[microbatch].ids,
            lambda output, microbatch: _summed_loss(
                main_output(output), parts[microbatch].targets, split, pipeline.groups.tp
            ),
            key=lambda microbatch: tuple(parts[microbatch].ids.shape),
            cache=lambda microbatch: parts[microbatch].cache(pipeline.model),
        )
    return _summed(pipeline)


def _summed_loss(logits: mx.array, targets: mx.array, split: Split | None, tp: Communicator) -> mx.array:
    """The summed cross-entropy of `targets` `[n, length]` under `logits` `[n, length, vocab_r]`, in float32 or wider."""
    if split is None or logits.shape[-1] == split.size:
        split, tp = Split.even(logits.shape[-1], 1), Communicator.single()
    return vocab_parallel_cross_entropy(logits, targets, tp, split, reduction="sum")


def _start_together(groups: ParallelGroups) -> float:
    """Wait for all ranks of the pipeline, and return the time, which is equal for ranks on one machine."""
    groups.pp.barrier()
    now: list[Any] = groups.pp.all_gather_object((socket.gethostname(), time.perf_counter()))
    hosts = {host for host, _ in now}
    return min(s for _, s in now) if len(hosts) == 1 else now[groups.pp.rank][1]
