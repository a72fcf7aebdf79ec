"""`partita train`: train a model split over ranks, from its checkpoint or from nothing but its config."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from partita.checkpoint.run_folder import RunFolder
from partita.cli import elastic, launch, rank
from partita.cli.engine import BackendOption, EngineOption, choose_engine
from partita.cli.model import check_early, for_mlx
from partita.cli.options import (
    PIPELINE,
    AsJson,
    Device,
    LayoutText,
    LostAfter,
    Microbatches,
    PipelineRanks,
    Replicas,
    ScheduleKind,
    TensorRanks,
    TrustRemoteCode,
    VirtualStages,
    WeightsDtype,
)
from partita.cli.resume import NOTED, given_options, newest_state, resumed_layout, resumed_options
from partita.cli.stages import choose
from partita.cli.timeline import check_file, show_timeline
from partita.cli.train_run import TrainRun
from partita.core.mesh import Mesh
from partita.errors import CheckpointError, ModelError

if TYPE_CHECKING:
    from partita.schedule import Timeline


class Autocast(StrEnum):
    """What autocast computes in."""

    bfloat16 = "bfloat16"


class AuxLossScope(StrEnum):
    """Over which tokens the auxiliary loss of routers is computed."""

    microbatch = "microbatch"
    sequence = "sequence"


class MasterDtype(StrEnum):
    """What the optimizer steps."""

    float32 = "float32"
    model = "model"


OPTIMIZER, MEMORY, CHECKPOINTS = "Optimizer", "Memory and precision", "Checkpoints"


def train(
    ctx: typer.Context,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="SOURCE",
            show_default=False,
            help="A text file, a folder of them, or `stdlib`: the sources of Python's standard library.",
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", metavar="FILE", help="Begin with new weights for this config.", show_default=False),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="Begin with this checkpoint.", show_default=False)
    ] = None,
    tp: TensorRanks = 1,
    pp: PipelineRanks = 1,
    dp: Replicas = 1,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences of one step, over all replicas.")] = 8,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")] = 128,
    microbatches: Microbatches = None,
    seed: Annotated[int, typer.Option(help="Of new weights and of the order of the data.")] = 0,
    out_folder: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where the trained checkpoint goes.", show_default=False),
    ] = None,
    save_every: Annotated[
        int | None,
        typer.Option(
            "--save-every",
            min=1,
            metavar="STEPS",
            help="Keep a checkpoint in --out each so many steps, from which the run can go on.",
            rich_help_panel=CHECKPOINTS,
            show_default=False,
        ),
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option(
            "--keep",
            min=1,
            help="Of these checkpoints the newest so many; by default all.",
            rich_help_panel=CHECKPOINTS,
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Resume the newest checkpoint in --out that is complete. Any layout and engine may continue it: with --tp, "
            "--pp, --dp, --layout, --vpp, --schedule, --microbatches or --group-size the layout is what these say, without "
            "them the run's own.",
            rich_help_panel=CHECKPOINTS,
        ),
    ] = False,
    no_verify: Annotated[
        bool,
        typer.Option(
            "--no-verify",
            help="With --resume: look at the sizes of the checkpoint's files only, not at their contents.",
            rich_help_panel=CHECKPOINTS,
        ),
    ] = False,
    layout: LayoutText = None,
    vpp: VirtualStages = None,
    schedule: ScheduleKind = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size",
            min=1,
            help="Of interleaved-1f1b: micro-batches that pass a stage in a row; by default --pp.",
            rich_help_panel=PIPELINE,
            show_default=False,
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            "--picture",
            metavar="FILE",
            help="Draw the last step as it was, and as simulated from its costs: .svg or .png.",
            rich_help_panel=PIPELINE,
            show_default=False,
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            metavar="FILE.json",
            help="The same as a trace for ui.perfetto.dev.",
            rich_help_panel=PIPELINE,
            show_default=False,
        ),
    ] = None,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="At its peak.", rich_help_panel=OPTIMIZER)] = 3e-4,
    warmup_steps: Annotated[
        int, typer.Option(min=0, help="Until the peak; a cosine down to a tenth follows.", rich_help_panel=OPTIMIZER)
    ] = 10,
    weight_decay: Annotated[float, typer.Option(min=0.0, help="AdamW's.", rich_help_panel=OPTIMIZER)] = 0.1,
    clip_norm: Annotated[float, typer.Option(min=0.0, help="Largest gradient norm.", rich_help_panel=OPTIMIZER)] = 1.0,
    aux_loss_scope: Annotated[
        AuxLossScope,
        typer.Option(
            "--aux-loss-scope",
            help="Compute the routers' auxiliary loss over each micro-batch, as transformers does, or over each sequence, "
            "where the layout does not change it. The config's `output_router_logits` asks for that loss.",
            rich_help_panel=OPTIMIZER,
        ),
    ] = AuxLossScope.microbatch,
    lora_rank: Annotated[
        int | None,
        typer.Option(
            "--lora-rank", min=1, help="Train adapters of this rank only.", rich_help_panel=MEMORY, show_default=False
        ),
    ] = None,
    autocast: Annotated[
        Autocast | None,
        typer.Option(
            "--autocast",
            help="Multiply float32 weights in this dtype. Weights that are bfloat16 (--dtype) are multiplied in it without.",
            rich_help_panel=MEMORY,
            show_default=False,
        ),
    ] = None,
    master_dtype: Annotated[
        MasterDtype,
        typer.Option(
            "--master-dtype",
            help="`float32`: step float32 copies of narrower weights, with float32 moments. `model`: step the weights in their "
            "own dtype, which saves 8 bytes a weight but rounds small steps away.",
            rich_help_panel=MEMORY,
        ),
    ] = MasterDtype.float32,
    checkpointing: Annotated[
        bool,
        typer.Option(
            "--checkpointing", help="Compute activations again instead of keeping them.", rich_help_panel=MEMORY
        ),
    ] = False,
    zero: Annotated[
        bool,
        typer.Option("--zero", help="Each replica keeps a share of the optimizer's state.", rich_help_panel=MEMORY),
    ] = False,
    dtype: WeightsDtype = None,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    engine: EngineOption = None,
    backend: BackendOption = None,
    lost_after: LostAfter = None,
    as_json: AsJson = False,
) -> None:
    """Train a model split over ranks and save it unsplit, as Hugging Face does."""
    from partita.training import TrainSettings, texts

    is_restarted = elastic.goes_on(out_folder)
    resume = resume or is_restarted
    places: dict[str, Any] = {
        "tp": tp, "pp": pp, "dp": dp, "layout": layout, "vpp": vpp, "schedule": schedule, "microbatches": microbatches,
        "group_size": group_size,
    }  # fmt: skip
    options: dict[str, Any] = {
        "steps": steps, "batch_size": batch_size, "sequence_length": sequence_length, "learning_rate": learning_rate,
        "warmup_steps": warmup_steps, "weight_decay": weight_decay, "clip_norm": clip_norm, "seed": seed,
        "autocast": autocast and autocast.value, "master_dtype": master_dtype.value, "aux_loss_scope": aux_loss_scope.value,
    }  # fmt: skip
    notes: dict[str, Any] = {
        "data": data, "config": config, "model": model, "dtype": dtype and dtype.value, "lora_rank": lora_rank,
        "save_every": save_every, "keep": keep, "run_id": elastic.run_id(),
    }  # fmt: skip
    if resume:
        from partita.training.state import kept_settings

        found, state = newest_state(out_folder)
        given = given_options(ctx)
        made = resumed_options(found, state, {**options, **notes}, given)
        places = resumed_layout(state, places, given)
        options = {**kept_settings(state.settings), **{name: made[name] for name in options}}
        notes = {**{name: made[name] for name in notes}, **{name: state.notes.get(name) for name in NOTED}}
        source = str(found)
        if state.base is not None:
            from partita.training.adapter_files import read_adapters

            state.base.find(model)
            source = model or state.base.path
            notes["lora_rank"] = notes["lora_rank"] or read_adapters(found).rank
    else:
        source = _source(config, model)
    if not notes["data"]:
        raise ModelError("there is nothing to train on. Give --data: a text file, a folder of them, or `stdlib`.")
    mesh = Mesh(dp=places["dp"], pp=places["pp"], tp=places["tp"])
    if is_restarted:
        mesh = elastic.fitted(mesh)
    notes["layout"] = {**places, "dp": mesh.dp}
    stages = choose(
        mesh, places["layout"], places["vpp"], places["schedule"], batch_size=options["batch_size"],
        microbatches=places["microbatches"], group_size=places["group_size"],
    )  # fmt: skip
    name = choose_engine(engine)
    check_early(
        source, mesh, stages.layout, stages.vpp, stages.placement, engine=name, trust_remote_code=trust_remote_code
    )
    goes_on_whole = resume and notes["lora_rank"] is None
    where = {**stages.plan, "dtype": None if goes_on_whole else notes["dtype"], "device": device}
    where["trust_remote_code"] = trust_remote_code
    if name == "mlx":
        _check_for_mlx(stages.placement)
        where = for_mlx(source, mesh, where)
    for _ in texts(notes["data"]):
        """What cannot be read is told before ranks start."""
    if not resume:
        _check_saving(out_folder, save_every, keep, no_verify, lora_rank, model)
    if picture is not None:
        check_file("--picture", picture, ".svg", ".png")
    if trace is not None:
        check_file("--trace", trace, ".json")
    options |= {"checkpointing": checkpointing, "zero": zero, **stages.training}
    TrainSettings(**options)
    run = TrainRun(
        name, backend, mesh, source, notes["config"] is not None and not resume, notes, where, options, out_folder, resume,
        is_restarted, not no_verify, notes["lora_rank"], as_json, trust_remote_code,
    )  # fmt: skip

    def work() -> int:
        timelines: list[Timeline] = []
        watch = timelines.append if picture is not None or trace is not None else None
        run.train(watch)
        if timelines and rank.is_first():
            show_timeline(timelines[0], picture, trace)
        run.end()
        return 0

    launch.run(mesh, work, engine=name, backend=backend)


def _source(config: str | None, model: str | None) -> str:
    if config is not None and model is not None:
        raise ModelError(
            f"--config {config} begins with new weights and --model {model} with a checkpoint. Give one of them."
        )
    if not (config or model):
        raise ModelError("give either --config (new weights) or --model (a checkpoint).")
    return config or model or ""


def _check_for_mlx(placement: str) -> None:
    """Refuse what training on MLX has not."""
    if placement != "loop":
        raise ModelError(
            "the command line trains on MLX with stages dealt out in turn. Use another --schedule than zb-v."
        )


def _check_saving(
    folder: Path | None,
    save_every: int | None,
    keep: int | None,
    no_verify: bool,
    lora_rank: int | None,
    model: str | None,
) -> None:
    """Refuse before training where saving would be refused after it."""
    if no_verify:
        raise ModelError("--no-verify is for --resume. Leave it out.")
    if keep is not None and save_every is None:
        raise ModelError("--keep is of the checkpoints that --save-every makes. Give --save-every, or leave it out.")
    if save_every is not None and folder is None:
        raise ModelError("--save-every needs a folder for its checkpoints. Give --out.")
    if save_every is not None and lora_rank is not None and model is None:
        raise ModelError(
            "--save-every with --lora-rank keeps adapters alone, and their model must be on disk to go on. Give --model, or "
            "leave --save-every out."
        )
    if folder is not None:
        _check_folder(folder)


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"--out {folder} is a file. Name a folder, which is made if it is not there.")
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "is not a folder" if not there.is_dir() else "cannot be written to"
        raise CheckpointError(f"--out {folder} cannot be made, as {there} {why}. Name another folder.")
    weights = sorted(folder.glob("*.safetensors*")) if folder.exists() else []
    if weights:
        raise CheckpointError(
            f"--out {folder} holds a model already ({weights[0].name}). Name another folder, or remove that one."
        )
    steps = RunFolder(folder).steps()
    if steps:
        raise CheckpointError(
            f"--out {folder} holds a run already (its last checkpoint is of step {steps[-1]}). Go on with --resume, or name "
            "another folder."
        )
