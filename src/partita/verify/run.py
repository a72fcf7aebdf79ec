"""Verifying: a user's model, split over the ranks of the run, against itself unsplit."""

from __future__ import annotations

import copy
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from partita.checkpoint.find import find_model
from partita.core.mesh import Mesh
from partita.core.placement import Placement
from partita.core.plan import Plan
from partita.errors import CheckpointError, ModelError
from partita.peers import doing
from partita.text import Sampling
from partita.torch.apply import apply_plan, plan_of
from partita.torch.compare import compare, compare_parameters
from partita.torch.finish import finish
from partita.torch.float64 import Float64Everywhere
from partita.torch.generate import generate
from partita.torch.groups import ParallelGroups, init_process_group, make_groups, single_groups
from partita.torch.hub import build_on_meta, read_hf_config, spec_of
from partita.torch.load import as_dtype, choose_plan, load
from partita.torch.probe import fill_unsplit, sample_inputs, small_model
from partita.torch.together import together
from partita.torch.train import TrainSettings, train
from partita.verify.report import Report, Row, loss_rows, token_rows

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Of outputs and gradients by dtype, relative to the largest magnitude."""

MEMORY_SHARE = 0.5
"""The part of the free memory that whole models on all ranks may take."""

STEPS_TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Of losses and parameters after some steps."""

EPSILON = 1e-4
"""AdamW divides a gradient by its own size and this: were it much smaller, rounding of small gradients would be blown up."""

NEW_TOKENS = 12


@doing("verifying")
def verify(
    model: str | os.PathLike[str],
    *,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    layout: str | None = None,
    vpp: int | None = None,
    placement: Placement = "loop",
    schedule: str | None = None,
    group_size: int | None = None,
    accumulate: int = 1,
    steps: int = 3,
    dtype: str = "float64",
    trust_remote_code: bool = False,
) -> Report:
    """Compare the split model with the unsplit one: every module's output, every gradient, generated tokens, and training.

    Every rank of the run calls it. Where the whole model, once a rank, does not fit into half the free memory, a small one
    of the same family with the same heads stands for it. A config without weights gets random ones.

    Args:
        model: A folder, a config file or a hub id.
        tp: Tensor parallel ranks.
        pp: Pipeline stages' ranks.
        dp: Replicas.
        layout: Which layers each stage runs.
        vpp: Stages on each pipeline rank.
        placement: Which rank runs which stage.
        schedule: The kind of pipeline schedule that the training steps run.
        group_size: Of interleaved schedules.
        accumulate: Micro-batches of a training step.
        steps: Training steps; 0 for none.
        dtype: In which it is computed; in float64 nothing is narrowed to float32, so that equality can be told to 1e-12.
        trust_remote_code: Whether to run code that comes with the model.

    Returns:
        The report, the same on every rank.

    Raises:
        PartitaError: The model cannot be split so.
    """
    init_process_group()
    mesh = Mesh(dp, pp, tp)
    groups = make_groups(mesh)
    with together(groups):
        wanted = as_dtype(dtype) or torch.float64
        folder = find_model(model)
        built = build_on_meta(read_hf_config(folder, trust_remote_code=trust_remote_code), wanted)
        parameters = sum(p.numel() for p in built.parameters())
        shrunk = parameters * wanted.itemsize * 3 * mesh.size > _free_bytes() * MEMORY_SHARE
    if shrunk:
        with together(groups):
            unsplit = small_model(built, spec_of(built).num_heads).to(wanted)
    else:
        unsplit = _whole(folder, built, wanted)
    for parameter in unsplit.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    with together(groups):
        plan = choose_plan(unsplit, None, mesh, layout if not shrunk else None, vpp, placement)
        split = finish(apply_plan(copy.deepcopy(unsplit), plan, groups), plan, groups)
        inputs = sample_inputs(unsplit)
    tolerance = TOLERANCES[wanted]
    with Float64Everywhere() if wanted == torch.float64 else nullcontext():
        differences = compare(unsplit, split, plan, groups, inputs)
        rows = [Row(d.kind, d.name, d.error, tolerance) for d in differences]
        rows += _tokens(unsplit, split, inputs["input_ids"])
        settings = TrainSettings(
            steps=steps or 1, batch_size=accumulate * dp, sequence_length=8, accumulate=accumulate, warmup_steps=1,
            learning_rate=1e-3, epsilon=EPSILON, schedule=schedule, group_size=group_size,
        )  # fmt: skip
        rows += _training(unsplit, split, groups, settings, STEPS_TOLERANCES[wanted]) if steps else []
    size = sum(p.numel() for p in unsplit.parameters())
    what = f"{type(unsplit).__name__} ({plan.spec.family}), {size:,} parameters, {dtype}, {mesh}"
    return Report(tuple(rows), what, shrunk)


def _whole(folder: Path, built: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The unsplit model with its own weights, or with random ones where there are none."""
    try:
        if folder.is_dir():
            return load(folder, dtype=dtype, groups=single_groups())
    except CheckpointError:
        if any(folder.glob("*.safetensors*")) or any(folder.glob("*.bin")):
            raise
    return fill_unsplit(built)


def _tokens(unsplit: nn.Module, split: nn.Module, ids: Tensor) -> list[Row]:
    """Whether both continue two prompts of different lengths, taken from `ids`, with the same tokens."""
    prompts = [ids[0, :6].tolist(), ids[1].tolist()]
    sampling = Sampling(NEW_TOKENS, temperature=0.0, ignore_eos=True, use_generation_config=False)
    try:
        finish(unsplit, Plan.make(spec_of(unsplit), Mesh()), single_groups())
        expected = generate(unsplit, prompts, sampling)
    except ModelError:
        return []
    found = generate(split, prompts, sampling)
    return token_rows(prompts, expected, found, NEW_TOKENS)


def _training(
    unsplit: nn.Module, split: nn.Module, groups: ParallelGroups, settings: TrainSettings, tolerance: float
) -> list[Row]:
    """The loss of each step, and every parameter after the last, of both models trained on the same random tokens."""
    plan, _ = plan_of(split)
    tokens = torch.randint(0, plan.spec.vocab_size, (512,), generator=torch.Generator().manual_seed(0))
    try:
        finish(unsplit, Plan.make(spec_of(unsplit), Mesh()), single_groups())
        for model in (unsplit, split):
            _without_dropout(model)
        expected = train(unsplit, tokens, replace(settings, schedule=None, group_size=None))
    except ModelError:
        return []
    found = train(split, tokens, settings)
    rows = loss_rows(expected, found, tolerance)
    return rows + [Row(d.kind, d.name, d.error, tolerance) for d in compare_parameters(unsplit, split, plan, groups)]


def _without_dropout(model: nn.Module) -> None:
    """Let every module drop nothing: ranks draw other elements than one rank does."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _free_bytes() -> int:
    """Memory that is free on this machine; without an answer, 4 GiB."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (ValueError, OSError):
        return 4 << 30
