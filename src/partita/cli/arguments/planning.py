"""The options with which `partita plan` chooses a plan instead of showing the one that is given."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Annotated, Any

import typer

from partita.cli.arguments.inputs import parse_bytes
from partita.cli.arguments.options import Dtype, PlanOptions, WeightsDtype
from partita.core.layout.layout import LayerType, PipelineParallelLayerLayout
from partita.core.mesh import AXES
from partita.cost.hardware import Hardware, measured_file
from partita.cost.kernels import KERNELS, Kernels, kernels_of
from partita.cost.work import Purpose, Recompute, Work
from partita.errors import PlanError
from partita.planner import Fixed, Optimize
from partita.schedule import check_kind

SEARCH, WORK, FIXED = "Choose a plan", "Work to plan for", "Fix parts of the plan"


class WorkFor(StrEnum):
    """What a plan is for."""

    train = "train"
    serve = "serve"
    generate = "generate"


class Optimized(StrEnum):
    """What the best plan has least of."""

    time = "time"
    memory = "memory"
    cost = "cost"


class Recomputed(StrEnum):
    """What is computed again in backward."""

    none = "none"
    selective = "selective"
    full = "full"


@dataclass(frozen=True, kw_only=True)
class PlanningOptions(PlanOptions):
    """Options of the search, the work, and what of the plan is fixed. Any of them starts the search."""

    work_for: Annotated[
        WorkFor | None,
        typer.Option(
            "--for",
            metavar="WORK",
            help="Choose the best plan for this work: train (default), serve or generate.",
            show_default=False,
            rich_help_panel=SEARCH,
        ),
    ] = None
    ranks: Annotated[
        int | None,
        typer.Option(
            "--ranks",
            min=1,
            help="Number of ranks (default: those of --nodes, of the fixed sizes, or of the hardware).",
            show_default=False,
            rich_help_panel=SEARCH,
        ),
    ] = None
    nodes: Annotated[
        int | None,
        typer.Option(
            "--nodes",
            min=1,
            help="Number of machines. With --ranks it sets how many ranks one has.",
            show_default=False,
            rich_help_panel=SEARCH,
        ),
    ] = None
    hardware: Annotated[
        str | None,
        typer.Option(
            "--hardware",
            metavar="NAME",
            help="Devices and links: a name, such as h100, or a TOML file (default: this machine, as measured).",
            show_default=False,
            rich_help_panel=SEARCH,
        ),
    ] = None
    memory: Annotated[
        int | None,
        typer.Option(
            "--memory",
            metavar="BYTES",
            parser=parse_bytes,
            help="Memory of each device, as in 80GB (default: that of the hardware).",
            show_default=False,
            rich_help_panel=SEARCH,
        ),
    ] = None
    kernels: Annotated[
        str | None,
        typer.Option(
            "--kernels",
            metavar="NAME",
            help=f"Implementation of the layers to predict: {', '.join(KERNELS)} (default: the hardware file's).",
            show_default=False,
            rich_help_panel=SEARCH,
        ),
    ] = None
    optimize: Annotated[
        Optimized,
        typer.Option(
            "--optimize",
            metavar="WHAT",
            help="Minimize the `time`, the `memory` of the fullest rank, or the `cost`: the time multiplied by the ranks used.",
            rich_help_panel=SEARCH,
        ),
    ] = Optimized.time
    batch_size: Annotated[
        int,
        typer.Option(
            "--batch-size", min=1, help="Training: sequences per step, over all replicas.", rich_help_panel=WORK
        ),
    ] = 8
    sequence_length: Annotated[
        int,
        typer.Option("--sequence-length", min=1, help="Tokens per sequence, or per prompt.", rich_help_panel=WORK),
    ] = 1024
    context: Annotated[
        int,
        typer.Option(
            "--context", min=1, help="Serving: tokens of a prompt with its answer, at most.", rich_help_panel=WORK
        ),
    ] = 4096
    sequences: Annotated[
        int,
        typer.Option("--sequences", min=1, help="Serving: sequences that are decoded at once.", rich_help_panel=WORK),
    ] = 1
    dtype: WeightsDtype = None
    gradient_dtype: Annotated[
        Dtype | None,
        typer.Option(
            "--gradient-dtype",
            help="Training: dtype in which gradients are summed (default: the weights'; float32 for Megatron's kernels).",
            show_default=False,
            rich_help_panel=WORK,
        ),
    ] = None
    microbatches: Annotated[
        int | None,
        typer.Option(
            "--microbatches",
            min=1,
            help="Micro-batches of each replica.",
            show_default=False,
            rich_help_panel=FIXED,
        ),
    ] = None
    schedule: Annotated[
        str | None,
        typer.Option(
            "--schedule",
            metavar="KIND",
            help="Pipeline schedule; see `partita schedule --help`.",
            show_default=False,
            rich_help_panel=FIXED,
        ),
    ] = None
    zero: Annotated[
        int | None,
        typer.Option(
            "--zero",
            min=0,
            max=3,
            help="Stage of ZeRO: 1 distributes the optimizer's state, 2 also gradients, 3 also weights.",
            show_default=False,
            rich_help_panel=FIXED,
        ),
    ] = None
    recompute: Annotated[
        Recomputed | None,
        typer.Option(
            "--recompute",
            metavar="WHAT",
            help="Compute again in backward: `none`, the attention core (`selective`), or all of a layer (`full`).",
            show_default=False,
            rich_help_panel=FIXED,
        ),
    ] = None
    sequence_parallel: Annotated[
        bool | None,
        typer.Option(
            "--sequence-parallel/--no-sequence-parallel",
            help="Split activations between products over the tokens.",
            show_default=False,
            rich_help_panel=FIXED,
        ),
    ] = None


STARTS = frozenset(one.name for one in fields(PlanningOptions)) - frozenset(one.name for one in fields(PlanOptions))
"""Options of which any starts the search."""


@dataclass(frozen=True)
class Question:
    """What the options ask.

    Attributes:
        work: The work.
        ranks: The number of ranks.
        hardware: The machine.
        fixed: What is not to be chosen.
        optimize: What the best plan has least of.
    """

    work: Work
    ranks: int
    hardware: Hardware
    fixed: Fixed = field(default_factory=Fixed)
    optimize: Optimize = "time"


def question_of(options: PlanningOptions) -> Question:
    """The question of the options.

    Raises:
        PlanError: Options contradict each other, or there is no such hardware.
    """
    hardware = hardware_of(options.hardware)
    if options.kernels is not None:
        hardware = hardware.with_kernels(kernels_of(options.kernels).name)
    work = _work_of(options, kernels_of(hardware.kernels))
    if options.memory is not None:
        hardware = hardware.with_memory(options.memory)
    hardware, ranks = _ranks_of(options, hardware)
    return Question(work, ranks, hardware.for_ranks(ranks), _fixed_of(options), options.optimize.value)


def hardware_of(name: str | None) -> Hardware:
    """The hardware of a name or file; without one, this machine's.

    Raises:
        PlanError: There is no such hardware, or this machine was not measured.
    """
    if name is None and not measured_file().is_file():
        raise PlanError(
            "this machine was not measured yet. Run `partita measure`, or name other hardware with --hardware, such as h100."
        )
    return Hardware.read(name or "this")


def _work_of(options: PlanningOptions, kernels: Kernels) -> Work:
    purpose: Purpose = options.work_for.value if options.work_for is not None else "train"
    other = (
        ("context", "sequences")
        if purpose == "train"
        else ("batch_size", "microbatches", "zero", "recompute", "schedule", "gradient_dtype")
    )
    for name in other:
        if name in options.given:
            raise PlanError(
                f"--{name.replace('_', '-')} does not belong to --for {purpose}. Leave it out, or plan for "
                f"{'serve or generate' if purpose == 'train' else 'train'}."
            )
    if purpose != "train" and options.sequence_length >= options.context:
        raise PlanError(
            f"--sequence-length must be less than --context, which has the prompt and the answer, but is "
            f"{options.sequence_length} of {options.context}."
        )
    gradient_dtype = options.gradient_dtype.value if options.gradient_dtype is not None else kernels.gradient_dtype
    return Work(
        purpose=purpose, batch_size=options.batch_size, sequence_length=options.sequence_length, context=options.context,
        sequences=options.sequences, dtype=options.dtype.value if options.dtype is not None else None,
        gradient_dtype=gradient_dtype if purpose == "train" else None,
    )  # fmt: skip


def _ranks_of(options: PlanningOptions, hardware: Hardware) -> tuple[Hardware, int]:
    """The hardware with as many ranks on a machine as the options say, and the number of ranks."""
    fixed, nodes = (
        {name: getattr(options, name) for name in AXES if name in options.given},
        options.nodes,
    )
    ranks = options.ranks
    if ranks is not None and nodes is not None:
        if ranks % nodes:
            raise PlanError(f"--ranks must be a multiple of --nodes ({nodes}), but is {ranks}.")
        return replace(hardware, devices_per_node=ranks // nodes), ranks
    if ranks is None and nodes is not None:
        ranks = nodes * hardware.devices_per_node
    if ranks is None and {"tp", "pp", "dp"} <= fixed.keys():
        ranks = math.prod(fixed.values())
    if ranks is None and len(hardware.devices) > 1:
        ranks = len(hardware.devices)
    if ranks is None:
        raise PlanError(f"the number of ranks is missing: {hardware.name} has any. Give --ranks or --nodes.")
    return hardware, ranks


def fixed_sizes(options: PlanOptions) -> dict[str, Any]:
    """The sizes of the split that the options give, by the names that `Fixed` has."""
    names = (*AXES, "ep", "etp", "vpp")
    return {name: getattr(options, name) for name in names if name in options.given}


def _fixed_of(options: PlanningOptions) -> Fixed:
    sizes = fixed_sizes(options)
    layers = None
    if options.layout is not None:
        if "pp" not in options.given:
            raise PlanError(f"--layout {options.layout} needs the number of pipeline ranks. Give --pp.")
        layout = PipelineParallelLayerLayout(options.layout, options.pp)
        if LayerType.mtp in layout.flatten_layout:
            raise PlanError(f"--layout {options.layout} has multi-token-prediction layers, whose place is not planned.")
        layers = tuple(sum(kind == LayerType.decoder for kind in stage) for stage in layout.stages)
        sizes["vpp"] = layout.virtual_pipeline_model_parallel_size
    if options.schedule is not None:
        check_kind(options.schedule, options.pp, 1)
        if options.schedule == "forward-only":
            raise PlanError("--schedule forward-only has no backward, so it cannot train. Use 1f1b.")
    recompute: Recompute | None = options.recompute.value if options.recompute is not None else None
    return Fixed(
        **sizes, layers=layers, schedule=options.schedule, microbatches=options.microbatches, zero=options.zero,
        recompute=recompute, sequence_parallel=options.sequence_parallel,
    )  # fmt: skip
