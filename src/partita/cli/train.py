"""`partita train`: train a model split over ranks, from a checkpoint or from a config with new weights."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from partita.checkpoint.run_folder import RunFolder
from partita.cli import launch
from partita.cli.arguments import elastic
from partita.cli.arguments.auto import auto_plan, recompute_of, refuse_too_large
from partita.cli.arguments.data import DataOptions, read_sources
from partita.cli.arguments.engine import EngineChoice, choose_engine
from partita.cli.arguments.follow import FollowOptions, check_follow
from partita.cli.arguments.memory import zero_level
from partita.cli.arguments.model import plan_early, refuse_compile, refuse_device, request_of
from partita.cli.arguments.optimizer import OptimizerOptions
from partita.cli.arguments.options import (
    OUTPUT,
    PIPELINE,
    SPLIT_OPTIONS,
    WEIGHTS,
    Auto,
    Microbatches,
    PlanOptions,
    RunOptions,
    ScheduleKind,
    WeightsDtype,
)
from partita.cli.arguments.planned import use_settings
from partita.cli.arguments.resume import (
    LAYOUT,
    LORA,
    NOTED,
    TORCH_ONLY,
    changes,
    kept_engine,
    newest_state,
    resumed_layout,
    resumed_options,
)
from partita.cli.arguments.stages import choose
from partita.cli.terminal.console import err
from partita.cli.terminal.timeline import check_file
from partita.cli.train_job import TrainJob
from partita.core.plan import Plan
from partita.core.request import PlanRequest
from partita.cost.work import Work
from partita.errors import CheckpointError, ModelError
from partita.ranks import environment
from partita.training import TrainSettings
from partita.training.settings import default_schedule

if TYPE_CHECKING:
    from partita.training.state import TrainingState


class Autocast(StrEnum):
    """The dtypes of autocast."""

    bfloat16 = "bfloat16"


class MasterDtype(StrEnum):
    """The dtype of the weights that the optimizer updates."""

    float32 = "float32"
    model = "model"


DATA, MEMORY, CHECKPOINTS = "Data and steps", "Memory and precision", "Checkpoints"
ADAPTERS = "LoRA"


ALL_LINEAR = "all-linear"
"""The value of `--lora-targets` for every linear layer inside the layers."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(FollowOptions, OptimizerOptions, DataOptions, PlanOptions):
    """Options for the model, the data and the settings of training."""

    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="Train new, random weights for this config.",
            show_default=False,
            rich_help_panel=WEIGHTS,
        ),
    ] = None
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="Train the weights of this checkpoint.",
            show_default=False,
            rich_help_panel=WEIGHTS,
        ),
    ] = None
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.", rich_help_panel=DATA)] = 100
    batch_size: Annotated[
        int, typer.Option(min=1, help="Sequences per step, over all replicas.", rich_help_panel=DATA)
    ] = 8
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens per sequence.", rich_help_panel=DATA)] = 128
    auto: Auto = False
    microbatches: Microbatches = None
    seed: Annotated[
        int, typer.Option(help="Random seed of new weights and of the data order.", rich_help_panel=DATA)
    ] = 0
    out_folder: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Save the trained model in this folder.",
            show_default=False,
            rich_help_panel=CHECKPOINTS,
        ),
    ] = None
    save_every: Annotated[
        int | None,
        typer.Option(
            "--save-every",
            min=1,
            metavar="STEPS",
            help="Save a resumable checkpoint in --out every N steps.",
            rich_help_panel=CHECKPOINTS,
            show_default=False,
        ),
    ] = None
    keep: Annotated[
        int | None,
        typer.Option(
            "--keep",
            min=1,
            help="Keep only the newest N of these checkpoints (default: all).",
            rich_help_panel=CHECKPOINTS,
            show_default=False,
        ),
    ] = None
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Resume from the newest complete checkpoint in --out, with the options of the run. Any layout and engine can "
            "continue it: with --tp, --pp, --dp, --cp, --ep, --etp, --layout, --vpp, --schedule, --microbatches or "
            "--group-size, these specify the layout, else the run keeps its own. A line is printed for each "
            "option that differs from the run's.",
            rich_help_panel=CHECKPOINTS,
        ),
    ] = False
    no_verify: Annotated[
        bool,
        typer.Option(
            "--no-verify",
            help="With --resume: check only the sizes of the checkpoint's files, not their contents.",
            rich_help_panel=CHECKPOINTS,
        ),
    ] = False
    schedule: ScheduleKind = None
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size",
            min=1,
            help="For interleaved-1f1b: run this many micro-batches on a stage before the rank's next stage (default: --pp).",
            rich_help_panel=PIPELINE,
            show_default=False,
        ),
    ] = None
    picture: Annotated[
        Path | None,
        typer.Option(
            "--picture",
            metavar="FILE",
            help="Draw the last step as measured and as simulated from its costs, as .svg or .png.",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            metavar="FILE.json",
            help="Write the last step as a trace for ui.perfetto.dev.",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None
    lora_rank: Annotated[
        int | None,
        typer.Option(
            "--lora-rank", min=1, help="Train adapters of this rank only.", rich_help_panel=ADAPTERS, show_default=False
        ),
    ] = None
    lora_alpha: Annotated[
        float | None,
        typer.Option(
            "--lora-alpha",
            metavar="A",
            min=0.0,
            help="Scale adapters by this value over their rank (default: the rank, so that the scale is 1).",
            rich_help_panel=ADAPTERS,
            show_default=False,
        ),
    ] = None
    lora_dropout: Annotated[
        float,
        typer.Option(
            "--lora-dropout",
            metavar="P",
            min=0.0,
            max=0.99,
            help="Drop inputs of adapters with this probability.",
            rich_help_panel=ADAPTERS,
        ),
    ] = 0.0
    lora_targets: Annotated[
        str,
        typer.Option(
            "--lora-targets",
            metavar="NAMES",
            help="Adapt the linear layers of these names, separated by commas, such as `q_proj,v_proj`; `all-linear` adapts "
            "every linear layer inside the layers.",
            rich_help_panel=ADAPTERS,
        ),
    ] = ALL_LINEAR
    lora_rslora: Annotated[
        bool,
        typer.Option(
            "--lora-rslora",
            help="Scale adapters by alpha over the square root of their rank (rsLoRA).",
            rich_help_panel=ADAPTERS,
        ),
    ] = False
    lora_dora: Annotated[
        bool,
        typer.Option(
            "--lora-dora",
            help="Train the norms of the adapted weights as well (DoRA). On torch it needs peft.",
            rich_help_panel=ADAPTERS,
        ),
    ] = False
    autocast: Annotated[
        Autocast | None,
        typer.Option(
            "--autocast",
            help="Multiply float32 weights in this dtype. bfloat16 weights (--dtype) do not need it.",
            rich_help_panel=MEMORY,
            show_default=False,
        ),
    ] = None
    master_dtype: Annotated[
        MasterDtype,
        typer.Option(
            "--master-dtype",
            help="`float32`: update float32 copies of narrower weights, with float32 moments. `model`: update the weights in "
            "their own dtype, which saves 8 bytes a weight but rounds small steps away.",
            rich_help_panel=MEMORY,
        ),
    ] = MasterDtype.float32
    checkpointing: Annotated[
        str | None,
        typer.Option(
            "--checkpointing",
            metavar="WHICH",
            help="Recompute activations instead of keeping them: of every layer (`full`, also without a value), of every Nth "
            "(`N`), or of the attention only (`selective`). `none` keeps them all.",
            show_default=False,
            rich_help_panel=MEMORY,
        ),
    ] = None
    zero: Annotated[
        str | None,
        typer.Option(
            "--zero",
            metavar="LEVEL",
            help="Distribute over the replicas: `1` (also without a value) the optimizer's state, `2` gradients too, `3` "
            "weights too. `0` distributes nothing.",
            show_default=False,
            rich_help_panel=MEMORY,
        ),
    ] = None
    compile: Annotated[
        bool,
        typer.Option(
            "--compile/--no-compile",
            help="Compile each layer with torch.compile when it first runs. Needs a C++ compiler.",
            rich_help_panel=MEMORY,
        ),
    ] = False
    dtype: WeightsDtype = None


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RunOptions, TrainingOptions):
    """The options of `partita train`."""


def train(options: TrainOptions) -> None:
    """Train a model split over ranks, and save it unsplit in Hugging Face's format."""
    is_restarted = elastic.resumes(options.out_folder)
    if options.resume or is_restarted:
        run = _resumed(options)
    else:
        run = _asked(options, _source(options.config, options.model))
    if "epochs" in options.given and "steps" in options.given:
        raise ModelError(
            f"--epochs {options.epochs} decides the number of steps, so --steps {options.steps} must be left out."
        )
    if not any(run.notes["data"] or ()):
        raise ModelError("there is no training data. Give --data: a text file, a folder of text files, or `stdlib`.")
    request, given = _request(options, run, is_restarted=is_restarted)
    run.notes |= {"layout": {**run.places, "dp": request.mesh.dp}, "engine": request.engine}
    stages = choose(
        request, run.places["schedule"], batch_size=run.settings["batch_size"], microbatches=run.places["microbatches"],
        group_size=run.places["group_size"], is_planned=given is not None,
    )  # fmt: skip
    plan = plan_early(stages.request, given)
    if plan is not None and options.plan is not None:
        how = {"schedule": stages.schedule or default_schedule(plan), "microbatches": stages.microbatches}
        how |= {"zero": int(run.notes["zero"]), "recompute": recompute_of(run.notes["checkpointing"])}
        refuse_too_large(plan, request, _work_of(run), how)
    refuse_device(request.engine, options.device)
    if run.notes["compile"]:
        refuse_compile(request.engine)
    data = replace(read_sources(run.notes, run.settings["eval_every"]), shown=options.show_sample)
    if run.state is None:
        _check_saving(options)
        _check_lora(options)
    if options.picture is not None:
        check_file("--picture", options.picture, ".svg", ".png")
    if options.trace is not None:
        check_file("--trace", options.trace, ".json")
    check_follow(run.notes["report_to"], options.profile, options.out_folder)
    if options.profile is not None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "3")  # or torch's profiler prints lines of its own
    settings = {
        **run.settings, "checkpointing": run.notes["checkpointing"], "zero": run.notes["zero"], **stages.training,
    }  # fmt: skip
    TrainSettings(**settings)
    if run.state is not None and environment.is_first():
        now = {**run.notes, **run.notes["layout"], "steps": run.settings["steps"]}
        for line in changes(run.state, now, options.given):
            err().print(line, style="dim", soft_wrap=True)
    launch.run(
        TrainJob(
            request=stages.request, plan=plan, backend=options.backend, device=options.device,
            new=run.notes["config"] is not None and run.state is None, data=data, notes=run.notes, options=settings,
            out=options.out_folder, resume=run.state is not None, verify=not options.no_verify,
            lora_rank=run.notes["lora_rank"], lora=_lora_of(options), compile=run.notes["compile"],
            as_json=options.as_json, picture=options.picture, trace=options.trace, profile=options.profile,
        )
    )  # fmt: skip


@dataclass
class _Run:
    """A run, new or resumed.

    Attributes:
        source: The config or checkpoint of the model.
        places: The options of `resume.LAYOUT`: how the work is distributed.
        settings: The fields of `TrainSettings` that do not depend on the layout.
        notes: The options that are kept with checkpoints for the next command.
        state: The state of the checkpoint that the run resumes from; None for a new run.
    """

    source: str
    places: dict[str, Any]
    settings: dict[str, Any]
    notes: dict[str, Any]
    state: TrainingState | None = None


def _asked(options: TrainOptions, source: str) -> _Run:
    """The run that the command line specifies, with a model from `source`."""
    places = {name: getattr(options, name) for name in LAYOUT}
    settings: dict[str, Any] = {
        name: getattr(options, name)
        for name in (
            "steps", "batch_size", "sequence_length", "seed", "packing", "epochs", "eval_every",
        )
    }  # fmt: skip
    settings |= {
        "autocast": options.autocast and options.autocast.value, "master_dtype": options.master_dtype.value,
        **options.optimizer_settings,
    }  # fmt: skip
    notes = {
        "data": options.data, "text_column": options.text_column, "eval_data": options.eval_data,
        "eval_every": options.eval_every, "config": options.config, "model": options.model,
        "dtype": options.dtype and options.dtype.value, "lora_rank": options.lora_rank,
        **{name: getattr(options, name) for name in LORA}, "save_every": options.save_every,
        "keep": options.keep, "run_id": elastic.run_id(), "engine": options.engine and options.engine.value,
        "zero": zero_level(options.zero), "checkpointing": _recomputed(options.checkpointing), "compile": options.compile,
        "report_to": options.report_to, "peak_flops": options.peak_flops,
    }  # fmt: skip
    return _Run(source, places, settings, notes)


def _recomputed(given: str | None) -> bool | int | str:
    """`TrainSettings.checkpointing` from the option."""
    if given in (None, "none"):
        return False
    if given == "full":
        return True
    assert given is not None
    value = int(given) if given.isdecimal() else given
    if value != "selective" and not (isinstance(value, int) and value >= 1):
        raise ModelError(f"--checkpointing must be full, selective, none or a number of at least 1, but is {given!r}.")
    return value


def _resumed(options: TrainOptions) -> _Run:
    """The run in --out, with the changes of the command line."""
    from partita.training.state import kept_settings

    found, state = newest_state(options.out_folder)
    asked = _asked(options, str(found))
    made = resumed_options(found, state, {**asked.settings, **asked.notes}, options.given)
    places = asked.places if options.plan is not None else resumed_layout(state, asked.places, options.given)
    settings = {**kept_settings(state.settings), **{name: made[name] for name in asked.settings}}
    notes = {**{name: made[name] for name in asked.notes}, **{name: state.notes.get(name) for name in NOTED}}
    source = asked.source
    if state.base is not None:
        from partita.training.adapter_files import read_adapters

        state.base.find(options.model)
        source = options.model or state.base.path
        notes["lora_rank"] = notes["lora_rank"] or read_adapters(found).rank
    if options.engine is None:
        notes["engine"] = kept_engine(state)
    if notes["engine"] == "mlx":
        notes |= {
            name: False for name, values in TORCH_ONLY.items() if name not in options.given and notes[name] in values
        }
    return _Run(source, places, settings, notes, state)


def _request(options: TrainOptions, run: _Run, *, is_restarted: bool) -> tuple[PlanRequest, Plan | None]:
    """The plan request, and the plan of `--plan FILE`."""
    where = replace(options, **{name: run.places[name] for name in SPLIT_OPTIONS})
    request, given = request_of(
        run.source, where, engine=choose_engine(run.notes["engine"] and EngineChoice(run.notes["engine"])),
        trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    if options.auto:
        given = auto_plan(request, options, _work_of(run), _fixed_of(options, run))
        request = replace(request, mesh=given.mesh, layout=given.layout, vpp=None, placement=given.placement)
    if is_restarted:
        request = replace(request, mesh=elastic.fitted(request.mesh))
        if given is not None and given.mesh != request.mesh:
            given = None
    resumes_unsplit = run.state is not None and run.notes["lora_rank"] is None
    run.places.update({name: getattr(request.mesh, name) for name in ("tp", "pp", "cp", "ep")})
    run.places["etp"] = request.mesh.etp if request.mesh.ep > 1 else None
    if given is not None:
        if given.settings is not None:
            use_settings(given.settings, request.engine, options.given, run.places, run.settings, run.notes)
        # A resumed run has no plan file: its layout comes from the checkpoint.
        run.places["layout"] = str(given.layout)
        if given.placement == "v":
            run.places["schedule"] = run.places["schedule"] or "zb-v"
    return replace(request, dtype=None if resumes_unsplit else run.notes["dtype"]), given


def _work_of(run: _Run) -> Work:
    """What the run does, for predictions."""
    settings = run.settings
    return Work(
        batch_size=settings["batch_size"], sequence_length=settings["sequence_length"], dtype=run.notes["dtype"],
        optimizer=settings["optimizer"], master_dtype=settings["master_dtype"], lora_rank=run.notes["lora_rank"] or 0,
    )  # fmt: skip


def _fixed_of(options: TrainOptions, run: _Run) -> dict[str, Any]:
    """The settings that are given, and that the planner leaves as they are."""
    fixed: dict[str, Any] = {
        name: run.places[name] for name in ("schedule", "microbatches") if name in options.given
    }  # fmt: skip
    if "zero" in options.given:
        fixed["zero"] = int(run.notes["zero"])
    if "checkpointing" in options.given:
        fixed["recompute"] = recompute_of(run.notes["checkpointing"])
    return fixed


def _source(config: str | None, model: str | None) -> str:
    if config is not None and model is not None:
        raise ModelError(
            f"--config {config} starts from new weights and --model {model} from a checkpoint. Give one of them."
        )
    if not (config or model):
        raise ModelError("give either --config (new weights) or --model (a checkpoint).")
    return config or model or ""


def _check_lora(options: TrainOptions) -> None:
    """Raise `ModelError` for options of adapters that are not trained, or that are not names of layers."""
    given = [f"--{name.replace('_', '-')}" for name in LORA if name in options.given]
    if given and options.lora_rank is None:
        raise ModelError(f"{given[0]} is for training adapters. Give their rank with --lora-rank, or leave it out.")
    if not all(options.lora_targets.split(",")):
        raise ModelError(
            f"--lora-targets must be names of linear layers, separated by commas, or {ALL_LINEAR}; got "
            f"{options.lora_targets!r}."
        )


def _lora_of(options: TrainOptions) -> dict[str, Any]:
    """The arguments of `add_lora` besides rank and seed."""
    targets = None if options.lora_targets == ALL_LINEAR else options.lora_targets.split(",")
    return {
        "alpha": options.lora_alpha, "dropout": options.lora_dropout, "targets": targets, "rslora": options.lora_rslora,
        "dora": options.lora_dora,
    }  # fmt: skip


def _check_saving(options: TrainOptions) -> None:
    """Raise an error before training if saving would fail after it."""
    folder, save_every = options.out_folder, options.save_every
    if options.no_verify:
        raise ModelError("--no-verify is for --resume. Leave it out.")
    if options.keep is not None and save_every is None:
        raise ModelError("--keep limits the checkpoints that --save-every saves. Give --save-every, or leave it out.")
    if save_every is not None and folder is None:
        raise ModelError("--save-every needs a folder for its checkpoints. Give --out.")
    if save_every is not None and options.lora_rank is not None and options.model is None:
        raise ModelError(
            "--save-every with --lora-rank saves only adapters, so resuming needs their model on disk. Give --model, or "
            "leave --save-every out."
        )
    if folder is not None:
        _check_folder(folder)


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"--out {folder} is a file. Name a folder; it is created if it does not exist.")
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "is not a folder" if not there.is_dir() else "cannot be written to"
        raise CheckpointError(f"--out {folder} cannot be created: {there} {why}. Name another folder.")
    weights = sorted(folder.glob("*.safetensors*")) if folder.exists() else []
    if weights:
        raise CheckpointError(
            f"--out {folder} already holds a model ({weights[0].name}). Name another folder, or remove that one."
        )
    steps = RunFolder(folder).steps()
    if steps:
        raise CheckpointError(
            f"--out {folder} already holds a run (its last checkpoint is of step {steps[-1]}). Continue it with --resume, or "
            "name another folder."
        )
