"""Verifying on MLX: a user's model, split over the ranks of the run, against itself unsplit."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from partita.checkpoint.find import find_model
from partita.core.plan import Plan
from partita.core.request import SplitArguments, SplitRequest
from partita.errors import CheckpointError, ModelError
from partita.mlx.collectives.collective_errors import collective_errors
from partita.mlx.collectives.groups import ParallelGroups, make_groups, single_groups
from partita.mlx.generate import generate
from partita.mlx.load import choose_plan, load, refuse_device, shard
from partita.mlx.model.config import read_mlx_config
from partita.mlx.model.mlx_lm_models import build, describe
from partita.mlx.model.modes import random_state_kept
from partita.mlx.model.parts import main_output, plan_of
from partita.mlx.model.sliding_window import refuse_beyond_window
from partita.mlx.proof.compare import compare, compare_parameters, gradients
from partita.mlx.proof.family import fill, runs, sample_inputs
from partita.mlx.proof.reference import reference_of, unchecked
from partita.mlx.proof.rounding import (
    compare_rounding,
    in_wide_dtype,
    is_quantized,
    is_tie,
    moved_by_rounding,
    trained_rounding,
    unit_roundoff,
)
from partita.mlx.proof.stages import refuse_undecodable
from partita.mlx.train import refuse_settings, train
from partita.mlx.weights.fill import as_dtype
from partita.proof.report import (
    Collected,
    IsTie,
    Report,
    Row,
    Skip,
    dtype_rows,
    first_line,
    loss_rounding,
    loss_rows,
    no_tie,
    rounding_rows,
)
from partita.proof.rounding import Rounding, judge_trained
from partita.proof.verify import (
    NEW_TOKENS,
    compare_tokens,
    expect_all,
    level_of,
    unsplit_settings,
    verification_settings,
)
from partita.ranks.liveness import doing
from partita.training import TrainSettings, schedule_of

TOLERANCES = {mx.float64: 1e-6, mx.float32: 1e-4, mx.bfloat16: 0.05, mx.float16: 0.02}
"""The largest errors of outputs and gradients by dtype: mlx-lm's models narrow to float32 inside, whatever their dtype.

The values of bfloat16 and float16 apply to quantized models; `partita.proof.rounding` judges others."""

STEPS_TOLERANCES = {mx.float64: 1e-12, mx.float32: 1e-5, mx.bfloat16: 0.1, mx.float16: 0.1}
"""The largest errors of losses and parameters after some steps; as `TOLERANCES`."""

NO_GRADIENTS = "MLX does not compute all gradients of the unsplit model"


@doing("verifying")
def verify(
    model: str | os.PathLike[str],
    plan: Plan | None = None,
    *,
    schedule: str | None = None,
    group_size: int | None = None,
    microbatches: int = 1,
    steps: int = 3,
    zero: int | None = None,
    dtype: str | Sequence[str] | None = None,
    device: None = None,
    trust_remote_code: bool = False,
    **split: Unpack[SplitArguments],
) -> Report:
    """Compare the split model with the unsplit one: every module's output, every gradient, generated tokens, and training.

    Every rank of the run must call it. A config without weights gets random ones. What MLX has no gradient of is not trained.

    Args:
        model: A folder, a config file or a hub id.
        plan: The plan (default: created from `tp`, `pp`, `dp` and `layout`).
        tp: Tensor parallel ranks.
        pp: Pipeline parallel ranks.
        dp: Replicas.
        layout: Layers of each stage.
        vpp: Stages on each pipeline rank.
        placement: Assignment of stages to ranks.
        schedule: The pipeline schedule of the training steps.
        group_size: Group size of interleaved schedules.
        microbatches: Micro-batches per training step.
        steps: Training steps; 0 for none.
        zero: Must be 0 or None: on MLX every replica keeps the complete states.
        dtype: The dtype of the weights that are not quantized, or several to compare in turn (default: float32).
        device: Must be None: MLX runs on its default device (`mx.set_default_device`).
        trust_remote_code: Has no effect: a model's own code is for transformers, and models with such code raise here.

    Returns:
        The report, the same on every rank.

    Raises:
        PartitaError: The model cannot be split this way, or is one that mlx-lm runs without its sliding window and this is too
            small for what is compared.
    """
    how = SplitRequest.of(plan, split)
    mesh = how.mesh
    groups = make_groups(mesh)
    settings = verification_settings(steps, microbatches, mesh.dp, schedule, group_size, level_of(zero, plan, mesh))
    refuse_settings(settings)
    names = list(dict.fromkeys([dtype] if isinstance(dtype, str) else dtype or ["float32"]))
    with collective_errors(groups):
        refuse_device(device)
        folder = find_model(model)
        # Build and run it first: a model that mlx-lm cannot run has no reference.
        build(read_mlx_config(folder))
        reference = reference_of(read_mlx_config(folder)).text if groups.rank == 0 else ""
    for comm in (groups.tp, groups.pp, groups.dp):
        reference = next((text for text in comm.all_gather_object(reference) if text), "")
    rows: list[Row] = []
    skipped: list[Skip] = []
    for name in names:
        found = Collected(name)
        with collective_errors(groups), unchecked():
            unsplit, inputs, config = _unsplit(folder, as_dtype(name) or mx.float32)
            made = choose_plan(unsplit, plan, how, config)
            refuse_beyond_window(made.spec, inputs.shape[1] + NEW_TOKENS, "what is compared")
        _compare(unsplit, made, groups, inputs, settings, found, trains=steps > 0)
        expect_all(found, steps)
        rows += found.rows
        skipped += found.skipped
    size = f"{made.spec.parameters:,} parameters"
    what = f"{type(unsplit).__name__} ({made.spec.family}), {size}, {', '.join(names)}, {mesh}, MLX"
    return Report(tuple(rows), what, tuple(skipped), reference=reference)


def _unsplit(folder: Path, dtype: mx.Dtype) -> tuple[nn.Module, mx.array, dict[str, Any]]:
    """The unsplit model, inputs that it runs, and its config without a quantization.

    Raises:
        ModelError: mlx-lm itself does not run it.
    """
    unsplit = _with_weights(folder, dtype)
    inputs = sample_inputs(unsplit)
    try:
        mx.eval(main_output(unsplit(inputs)))
    except Exception as error:
        raise ModelError(f"mlx-lm itself does not run this model: {describe(error)}") from error
    # The model determines whether it is quantized: random weights are not.
    return unsplit, inputs, {key: value for key, value in read_mlx_config(folder).items() if key != "quantization"}


def _compare(
    unsplit: nn.Module,
    plan: Plan,
    groups: ParallelGroups,
    inputs: mx.array,
    settings: TrainSettings,
    found: Collected,
    *,
    trains: bool,
) -> None:
    """Compare everything in one dtype; `unsplit` is left as it is."""
    wanted = as_dtype(found.dtype) or mx.float32
    with collective_errors(groups), unchecked():
        whole = shard(copy.deepcopy(unsplit), groups=single_groups())
        can_learn = runs(gradients, unsplit, inputs)
    split = shard(copy.deepcopy(unsplit), plan, groups=groups)
    exact = in_wide_dtype(unsplit) if wanted.size == 2 and not is_quantized(unsplit) else None
    _compare_forward(exact, unsplit, split, inputs, settings, can_learn, TOLERANCES[wanted], found)
    is_close = no_tie if exact is None else partial(is_tie, copy.deepcopy(exact), unsplit)
    _compare_tokens(whole, split, inputs, is_close, found)
    if trains and can_learn:
        exact = None if exact is None else shard(exact, groups=single_groups())
        _compare_training(unsplit, exact, whole, split, groups, settings, STEPS_TOLERANCES[wanted], found)
    elif trains:
        found.skip("loss", "parameter", why=NO_GRADIENTS)


def _compare_forward(
    exact: nn.Module | None,
    unsplit: nn.Module,
    split: nn.Module,
    inputs: mx.array,
    settings: TrainSettings,
    can_learn: bool,
    tolerance: float,
    found: Collected,
) -> None:
    """Compare every module's output and every gradient, over stages by the schedule of the training steps."""
    plan, groups = plan_of(split)
    if bool(mx.isnan(main_output(unsplit(inputs))).any().item()):
        why = "the unsplit model's output contains NaN, so nothing can be compared with it"
        found.skip("module", "output", "gradient", why=why)
        return
    schedule = schedule_of(plan, settings) if plan.num_stages > 1 else None
    if exact is not None:
        measured = compare_rounding(exact, unsplit, split, inputs, backward=can_learn, schedule=schedule)
        found.add(rounding_rows(measured.judged))
        found.add(dtype_rows(measured.outputs, measured.dtypes))
        if not can_learn:
            found.skip("gradient", why=NO_GRADIENTS)
        return
    differences = compare(unsplit, split, plan, groups, inputs, backward=can_learn, schedule=schedule)
    found.add(Row(d.kind, d.name, d.error, tolerance) for d in differences)
    if not can_learn:
        found.skip("gradient", why=NO_GRADIENTS)


@random_state_kept()
def _with_weights(folder: Path, dtype: mx.Dtype) -> nn.Module:
    """The unsplit model with its own weights, or with random ones if there are none."""
    try:
        if folder.is_dir():
            return load(folder, dtype=dtype, groups=single_groups())
    except CheckpointError:
        if any(folder.glob("*.safetensors*")):
            raise
    mx.random.seed(0)
    return fill(build(read_mlx_config(folder)), dtype)


def _compare_tokens(whole: nn.Module, split: nn.Module, ids: mx.array, is_close: IsTie, found: Collected) -> None:
    """Whether both continue two prompts of different lengths, taken from `ids`, with the same tokens."""
    rows: Any = ids.tolist()
    compare_tokens(
        found, lambda: rows, partial(generate, whole), partial(generate, split),
        lambda: refuse_undecodable(split, plan_of(split)[0]), is_close,
    )  # fmt: skip


def _compare_training(
    initial: nn.Module,
    exact: nn.Module | None,
    whole: nn.Module,
    split: nn.Module,
    groups: ParallelGroups,
    settings: TrainSettings,
    tolerance: float,
    found: Collected,
) -> None:
    """The loss of each step, and every parameter after the last, of both models trained on the same random tokens.

    `initial` is the unsplit model before it was trained.
    """
    plan, _ = plan_of(split)
    tokens = np.random.default_rng(0).integers(0, plan.spec.vocab_size, 512)
    for model in (whole, split) if exact is None else (exact, whole, split):
        _without_dropout(model)
    alone = unsplit_settings(settings)
    try:
        wide = train(exact, tokens, alone) if exact is not None else []
        expected = train(whole, tokens, alone)
    except Exception as error:
        found.skip("loss", "parameter", why=f"the unsplit model does not train: {first_line(error)}")
        return
    if exact is not None:
        steps, reference = train(split, tokens, settings), exact

        def again(seed: int) -> list[Rounding]:
            other, moved = moved_by_rounding(initial, seed)
            _without_dropout(other)
            reports = train(shard(other, groups=single_groups()), tokens, alone)
            return [*loss_rounding(wide, reports, steps), *trained_rounding(reference, other, split, moved)]

        dtype = as_dtype(found.dtype)
        assert dtype is not None
        measured = [*loss_rounding(wide, expected, steps), *trained_rounding(exact, whole, split)]
        found.add(rounding_rows(judge_trained(measured, again, unit_roundoff(dtype))))
        return
    found.add(loss_rows(expected, train(split, tokens, settings), tolerance))
    parameters = compare_parameters(whole, split, plan, groups)
    found.add(Row(d.kind, d.name, d.error, tolerance) for d in parameters)


def _without_dropout(model: nn.Module) -> None:
    """Disable dropout in every module: several ranks drop other elements than one rank."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module._p_1 = 1.0
