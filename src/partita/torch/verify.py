"""Verifying: a user's model, split over the ranks of the run, against itself unsplit."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from partita.checkpoint.facts import stored_dtype
from partita.checkpoint.find import find_model
from partita.checkpoint.index import open_checkpoint
from partita.core.mesh import Mesh
from partita.core.plan import Plan
from partita.core.request import SplitArguments, SplitRequest
from partita.errors import CheckpointError
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
    norm_rows,
    rounding_rows,
)
from partita.proof.rounding import Rounding, judge_trained
from partita.proof.verify import compare_tokens, expect_all, level_of, unsplit_settings, verification_settings
from partita.quantized.find import parts_of, quantized_weights
from partita.ranks.liveness import doing
from partita.torch.collectives.collective_errors import collective_errors, gather_from_all
from partita.torch.collectives.groups import ParallelGroups, has_own_gpu, init_process_group, make_groups, single_groups
from partita.torch.generate import generate
from partita.torch.load import choose_plan, load, read_config
from partita.torch.model.float64 import Float64Everywhere
from partita.torch.model.parts import main_output, plan_of
from partita.torch.model.transformers_models import build_on_meta, read_hf_config, spec_of
from partita.torch.proof.compare import compare, compare_parameters
from partita.torch.proof.context import prove_context, prove_generation
from partita.torch.proof.family import fill_unsplit, sample_inputs, small_model
from partita.torch.proof.rounding import (
    Choices,
    compare_rounding,
    in_float64,
    is_tie,
    moved_by_rounding,
    name_of,
    trained_rounding,
)
from partita.torch.proof.shards import compare_shards
from partita.torch.proof.stages import refuse_undecodable
from partita.torch.quantized.tensor import QuantizedTensor, has_quantized
from partita.torch.split.apply import apply_plan
from partita.torch.split.finish import finish
from partita.torch.train import TrainSettings, accumulate_gradients, train
from partita.torch.weights.adapters import add_lora
from partita.torch.weights.fill import as_device, as_dtype
from partita.training import StepReport

TOLERANCE = 1e-12
"""The largest error in float64, relative to the largest magnitude; narrower dtypes are judged by `partita.proof.rounding`."""

ADAPTERS_RANK = 4
"""The rank of the adapters that are trained on quantized weights, which are frozen."""

MEMORY_SHARE = 0.5
"""Fraction of the free memory that unsplit models on all ranks may use."""


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
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    **split: Unpack[SplitArguments],
) -> Report:
    """Compare the split model with the unsplit one: every module's output, every gradient, generated tokens, and training.

    Every rank of the run must call it. Where the unsplit model, once a rank, does not fit into half the free memory, a small
    one of the same family with the same heads, layout and schedule is compared in its place. A config without weights gets
    random ones.

    Args:
        model: A folder, a config file or a hub id.
        plan: The plan (default: created from `tp`, `pp`, `dp` and `layout`).
        tp: Tensor parallel ranks.
        pp: Pipeline parallel ranks.
        dp: Replicas.
        cp: Context parallel ranks, over which sequences are split.
        ep: Ranks over which the experts of each layer are distributed.
        etp: Ranks over which each expert is split.
        layout: Layers of each stage.
        vpp: Stages on each pipeline rank.
        placement: Assignment of stages to ranks.
        schedule: The pipeline schedule of the training steps.
        group_size: Group size of interleaved schedules.
        microbatches: Micro-batches per training step.
        steps: Training steps; 0 for none.
        zero: What the replicas share in these steps: the optimizer's states (1), gradients too (2), parameters too (3). Then
            each replica's shares of the gradients of a batch are compared too (default: the plan's, else 0).
        dtype: One dtype or several to compare in turn. In float64 nothing is narrowed to float32, so that errors are
            at most 1e-12. In narrower dtypes the split model may round at most twice as much as the unsplit one. Default:
            float64 and the dtype of the weights.
        device: Device of both models (default: this rank's CUDA device, else the CPU).
        trust_remote_code: Whether to run code that comes with the model (its config's `auto_map`). Read it before you do.

    Returns:
        The report, the same on every rank.

    Raises:
        PartitaError: The model cannot be split this way.
    """
    init_process_group()
    how = SplitRequest.of(plan, split)
    mesh = how.mesh
    groups = make_groups(mesh)
    settings = verification_settings(
        steps, microbatches, mesh.dp, schedule, group_size, level_of(zero, plan, mesh)
    )  # fmt: skip
    with collective_errors(groups):
        place = as_device(device)
        folder = find_model(model, code=trust_remote_code)
        config = read_config(folder, groups, trust_remote_code=trust_remote_code)
        dtypes = _dtypes(dtype, folder, config)
    rows: list[Row] = []
    skipped: list[Skip] = []
    substituted: list[str] = []
    for wanted in dtypes:
        with collective_errors(groups):
            config = read_hf_config(folder, trust_remote_code=trust_remote_code)
            built = build_on_meta(config, wanted, trust_remote_code=trust_remote_code)
            required = _required_bytes(built, wanted) * _ranks_on(place, mesh)
        fits = all(gather_from_all(groups, required <= _free_bytes(place) * MEMORY_SHARE))
        with collective_errors(groups):
            small, instead = (None, "") if fits else _small_instead(built, how, wanted)
        if small is not None:
            unsplit = small.to(place)
        else:
            unsplit = _whole(folder, built, wanted, place, trust_remote_code=trust_remote_code)
        for parameter in unsplit.parameters():
            parameter.requires_grad_(parameter.is_floating_point() and not isinstance(parameter, QuantizedTensor))
        with collective_errors(groups):
            made = choose_plan(unsplit, plan if small is None else None, how)
            part = finish(apply_plan(copy.deepcopy(unsplit), made, groups), made, groups)
            if mesh.cp > 1:
                prove_context(part, made)
        found = Collected(name_of(wanted))
        compare_in = _compare_in_float64 if wanted == torch.float64 else _compare_rounding
        compare_in(unsplit, part, settings if steps else None, found)
        expect_all(found, steps)
        rows += found.rows
        skipped += found.skipped
        substituted += [] if instead in (*substituted, "") else [instead]
    size = sum(p.numel() for p in unsplit.parameters())
    names = ", ".join(name_of(one) for one in dtypes)
    what = f"{type(unsplit).__name__} ({made.spec.family}), {size:,} parameters, {names}, {mesh}, {place.type}"
    return Report(tuple(rows), what, tuple(skipped), tuple(substituted))


def _dtypes(dtype: str | Sequence[str] | None, folder: Path, config: Any) -> list[torch.dtype]:
    """The dtypes to compare in, each once (default: float64 and that of the weights, or of a config without weights)."""
    if dtype is not None:
        names = [dtype] if isinstance(dtype, str) else list(dtype)
        return list(dict.fromkeys(as_dtype(name) or torch.float64 for name in names))
    stored: Any = None
    if folder.is_dir() and any(folder.glob("*.safetensors*")):
        checkpoint = open_checkpoint(folder)
        stored = stored_dtype(checkpoint, parts_of(quantized_weights(checkpoint, config.to_dict())))
    stored = stored or getattr(config, "dtype", None)
    return list(dict.fromkeys([torch.float64, as_dtype(stored) or torch.float64]))


def _required_bytes(built: nn.Module, dtype: torch.dtype) -> int:
    """Memory of a rank for the unsplit and the split model and their gradients; for narrower dtypes also a float64 model."""
    parameters = sum(p.numel() for p in built.parameters())
    narrow = 2 * torch.float64.itemsize + dtype.itemsize  # and the weights before they are trained
    return parameters * (3 * dtype.itemsize + (0 if dtype == torch.float64 else narrow))


def _ranks_on(device: torch.device, mesh: Mesh) -> int:
    """How many ranks share the memory of `device`."""
    return 1 if device.type == "cuda" and has_own_gpu() else mesh.size


def _small_instead(built: nn.Module, how: SplitRequest, dtype: torch.dtype) -> tuple[nn.Module, str]:
    """A small model on the CPU to compare in place of `built`, which is too large, and a note about it.

    It has as many layers as the layout, or as stages, so that its plan has the shape of the large model's.
    """
    spec = spec_of(built)
    mesh, stages = how.mesh, how.mesh.pp * (how.vpp or 1)
    layers = stages if how.layout is None else spec.num_layers
    small = small_model(built, spec.num_heads, layers=layers, experts=mesh.ep, dtype=dtype)
    layers = spec_of(small).num_layers
    return small, (
        f"A small model with {layers} of {spec.num_layers} layers, the same heads and random weights was compared: the "
        f"{sum(p.numel() for p in built.parameters()):,} parameters of {type(built).__name__} do not fit into "
        f"{MEMORY_SHARE:.0%} of the free memory on {mesh.size} rank{'s' if mesh.size > 1 else ''}."
    )


def _compare_in_float64(unsplit: nn.Module, split: nn.Module, settings: TrainSettings | None, found: Collected) -> None:
    """Compare everything in float64; the weights of both are left trained."""
    plan, groups = plan_of(split)
    with Float64Everywhere():
        inputs = _inputs(unsplit, groups, found)
        if inputs is not None:
            differences = compare(unsplit, split, plan, groups, inputs)
            found.add(Row(d.kind, d.name, d.error, TOLERANCE) for d in differences)
        finish(unsplit, Plan.make(spec_of(unsplit), Mesh()), single_groups())
        _compare_tokens(unsplit, split, found)
        if settings is None:
            return
        if has_quantized(unsplit):
            for model in (unsplit, split):
                add_lora(model, ADAPTERS_RANK, seed=0)
        tokens = _training_tokens(unsplit, split)
        initial = copy.deepcopy(unsplit) if settings.zero else unsplit
        expected = _trained(unsplit, tokens, settings, found)
        if expected is not None:
            if settings.zero:
                differences = compare_shards(initial, split, tokens, settings, accumulate_gradients)
                found.add(Row(d.kind, d.name, d.error, TOLERANCE) for d in differences)
            steps = train(split, tokens, settings)
            found.add([*loss_rows(expected, steps, TOLERANCE), *norm_rows(expected, steps, TOLERANCE)])
            parameters = compare_parameters(unsplit, split, plan, groups)
            found.add(Row(d.kind, d.name, d.error, TOLERANCE) for d in parameters)


def _compare_rounding(unsplit: nn.Module, split: nn.Module, settings: TrainSettings | None, found: Collected) -> None:
    """Compare everything in a narrower dtype; the weights of both are left trained."""
    plan, groups = plan_of(split)
    exact = in_float64(unsplit)
    inputs = None if groups.cp.size > 1 else _inputs(unsplit, groups, found)
    if groups.cp.size > 1:
        found.skip(
            "module", "output", "gradient", why="parts of sequences (cp) are compared module by module in float64"
        )
    if inputs is not None:
        measured = compare_rounding(exact, unsplit, split, plan, groups, inputs)
        found.add(rounding_rows(measured.judged))
        found.add(dtype_rows(measured.outputs, measured.dtypes))
    for model in (exact, unsplit):
        finish(model, Plan.make(spec_of(model), Mesh()), single_groups())
    _compare_tokens(unsplit, split, found, partial(is_tie, exact, unsplit))
    if settings is None:
        return
    if has_quantized(unsplit):
        found.skip(
            "loss", "parameter", why="quantized weights are frozen; adapters on them are trained in float64 only"
        )
        return
    tokens, choices = _training_tokens(exact, unsplit, split), Choices()
    initial = copy.deepcopy(unsplit)
    with Float64Everywhere(), choices.of(exact):
        wide = _trained(exact, tokens, settings, found)
    if wide is None:
        return
    with choices.of(unsplit):
        expected = _trained(unsplit, tokens, settings, found)
    if expected is None:
        return
    with choices.of(split):
        steps = train(split, tokens, settings)
    rounding = [*loss_rounding(wide, expected, steps), *trained_rounding(exact, unsplit, split, plan, groups)]

    def again(seed: int) -> list[Rounding]:
        other, moved = moved_by_rounding(initial, seed)
        with choices.of(other):
            reports = train(other, tokens, unsplit_settings(settings))
        return [*loss_rounding(wide, reports, steps), *trained_rounding(exact, other, split, plan, groups, moved)]

    found.add(rounding_rows(judge_trained(rounding, again, torch.finfo(getattr(torch, found.dtype)).eps / 2)))


def _inputs(unsplit: nn.Module, groups: ParallelGroups, found: Collected) -> dict[str, Tensor] | None:
    """Inputs of both models; None, with a note, if the unsplit model returns nothing to compare with."""
    kinds = ("module", "output", "gradient")
    with collective_errors(groups):
        try:
            inputs = sample_inputs(unsplit)
            with torch.no_grad():
                output = main_output(unsplit(**inputs))
        except Exception as error:
            found.skip(*kinds, why=f"the unsplit model does not run: {first_line(error)}")
            return None
        if bool(output.isnan().any()):
            found.skip(*kinds, why="the unsplit model's output contains NaN, so nothing can be compared with it")
            return None
        if not output.is_floating_point() or not any(p.requires_grad for p in unsplit.parameters()):
            found.skip("gradient", why="the unsplit model's output has no gradient")
    return inputs


def _whole(
    folder: Path, built: nn.Module, dtype: torch.dtype, device: torch.device, *, trust_remote_code: bool
) -> nn.Module:
    """The unsplit model with its own weights, or with random ones if there are none."""
    try:
        if folder.is_dir():
            groups = single_groups()
            return load(folder, dtype=dtype, device=device, groups=groups, trust_remote_code=trust_remote_code)
    except CheckpointError:
        if any(folder.glob("*.safetensors*")) or any(folder.glob("*.bin")):
            raise
    return fill_unsplit(built).to(device)


def _compare_tokens(unsplit: nn.Module, split: nn.Module, found: Collected, is_tie: IsTie = no_tie) -> None:
    """Whether both continue two prompts of different lengths with the same tokens."""
    plan = plan_of(split)[0]

    def refuse() -> None:
        refuse_undecodable(split, plan)
        prove_generation(split, plan)

    compare_tokens(
        found, lambda: sample_inputs(unsplit)["input_ids"].tolist(), partial(generate, unsplit), partial(generate, split),
        refuse, is_tie,
    )  # fmt: skip


def _training_tokens(*models: nn.Module) -> Tensor:
    """Random tokens to train `models` on; disables their dropout."""
    for model in models:
        _without_dropout(model)
    vocabulary = plan_of(models[-1])[0].spec.vocab_size
    return torch.randint(0, max(vocabulary, 1), (512,), generator=torch.Generator().manual_seed(0))


def _trained(unsplit: nn.Module, tokens: Tensor, settings: TrainSettings, found: Collected) -> list[StepReport] | None:
    """The reports of training the unsplit model; None, with a note, if it does not train."""
    try:
        return train(unsplit, tokens, unsplit_settings(settings))
    except Exception as error:
        found.skip("loss", "parameter", why=f"the unsplit model does not train: {first_line(error)}")
        return None


def _without_dropout(model: nn.Module) -> None:
    """Disable dropout in every module: several ranks drop other elements than one rank."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _free_bytes(device: torch.device) -> int:
    """Free memory of a GPU or of this machine; 4 GiB if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
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
