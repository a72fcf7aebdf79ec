"""`partita train`: train a model split over ranks, from its checkpoint or from nothing but its config."""

from __future__ import annotations

import importlib
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from partita.cli import launch, rank
from partita.cli.console import count, err, mesh_name, out, plural, print_json, sparkline
from partita.cli.engine import BackendOption, EngineOption, choose_engine
from partita.cli.model import check_early, for_mlx
from partita.cli.options import (
    PIPELINE,
    AsJson,
    Device,
    LayoutText,
    Microbatches,
    PipelineRanks,
    Replicas,
    ScheduleKind,
    TensorRanks,
    VirtualStages,
    WeightsDtype,
)
from partita.cli.progress import loading, saving, training
from partita.cli.stages import choose
from partita.cli.timeline import check_file, show_timeline
from partita.core.mesh import Mesh
from partita.errors import CheckpointError, ModelError

if TYPE_CHECKING:
    from torch import nn

    from partita.schedule import Timeline
    from partita.text import Tokenizer
    from partita.torch.train import StepReport


class Autocast(str, Enum):
    """What autocast computes in."""

    bfloat16 = "bfloat16"
    float16 = "float16"


OPTIMIZER, MEMORY = "Optimizer", "Memory and precision"


def train(
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="SOURCE",
            show_default=False,
            help="A text file, a folder of them, or `stdlib`: the sources of Python's standard library.",
        ),
    ],
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
    lora_rank: Annotated[
        int | None,
        typer.Option(
            "--lora-rank", min=1, help="Train adapters of this rank only.", rich_help_panel=MEMORY, show_default=False
        ),
    ] = None,
    autocast: Annotated[
        Autocast | None,
        typer.Option("--autocast", help="Compute in this dtype.", rich_help_panel=MEMORY, show_default=False),
    ] = None,
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
    engine: EngineOption = None,
    backend: BackendOption = None,
    as_json: AsJson = False,
) -> None:
    """Train a model split over ranks and save it unsplit, as Hugging Face does."""
    if (config is None) == (model is None):
        raise ModelError("give either --config (new weights) or --model (a checkpoint).")
    source = config if config is not None else model
    assert source is not None
    mesh = Mesh(dp=dp, pp=pp, tp=tp)
    stages = choose(
        mesh, layout, vpp, schedule, batch_size=batch_size, microbatches=microbatches, group_size=group_size
    )
    name = choose_engine(engine)
    check_early(source, mesh, layout, stages.vpp, stages.placement, engine=name)
    where = {**stages.plan, "dtype": dtype and dtype.value, "device": device}
    if name == "mlx":
        _check_for_mlx(config, lora_rank, stages.placement)
        where = for_mlx(source, mesh, where)
    if data != "stdlib" and not Path(data).exists():
        raise ModelError(f"--data {data}: there is no such file or folder. Give one, or `stdlib`.")
    if out_folder is not None:
        _check_folder(out_folder)
    if picture is not None:
        check_file("--picture", picture, ".svg", ".png")
    if trace is not None:
        check_file("--trace", trace, ".json")
    options: dict[str, Any] = {
        "steps": steps, "batch_size": batch_size, "sequence_length": sequence_length, "learning_rate": learning_rate,
        "warmup_steps": warmup_steps, "weight_decay": weight_decay, "clip_norm": clip_norm, "seed": seed,
        "autocast": autocast and autocast.value, "checkpointing": checkpointing, "zero": zero, **stages.training,
    }  # fmt: skip

    def work() -> int:
        from partita.training import TrainSettings

        run: Any = importlib.import_module(f"partita.{name}.train").train
        save: Any = importlib.import_module(f"partita.{name}.save").save
        split, tokenizer = _begin(source, name, where, seed, new=config is not None)
        options["mask_token"] = tokenizer.inner.mask_token_id
        if lora_rank is not None:
            import torch

            from partita.torch.adapt import add_lora

            torch.manual_seed(seed)
            add_lora(split, lora_rank)
        tokens = _tokens(data, tokenizer, name, split)
        if rank.is_first() and not as_json and name == "torch":
            _print_start(split, mesh, len(tokens))
        with training(steps) as on_step:
            timelines: list[Timeline] = []
            watch = timelines.append if picture is not None or trace is not None else None
            reports = run(split, tokens, TrainSettings(**options), on_step=on_step, on_timeline=watch)
        if timelines and rank.is_first():
            show_timeline(timelines[0], picture, trace)
        if out_folder is not None:
            if lora_rank is not None:
                from partita.torch.adapt import merge_lora

                merge_lora(split)
            with saving(str(out_folder)) as progress:
                save(split, out_folder, tokenizer=tokenizer, progress=progress)
        if rank.is_first():
            (_print_json if as_json else _print_end)(reports, mesh, out_folder)
        return 0

    launch.run(mesh, work, engine=name, backend=backend)


def _check_for_mlx(config: str | None, lora_rank: int | None, placement: str) -> None:
    """Refuse what training on MLX has not."""
    if config is not None:
        raise ModelError(
            "--engine mlx trains a checkpoint, not new weights. Give --model, e.g. one that torch has begun."
        )
    if lora_rank is not None:
        raise ModelError("--lora-rank is for torch. On MLX put mlx-lm's LoRA on the model and call partita.mlx.train.")
    if placement != "loop":
        raise ModelError(
            "the command line trains on MLX with stages dealt out in turn. Use another --schedule than zb-v."
        )


def _check_folder(folder: Path) -> None:
    """Refuse before training where saving would be refused after it."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"--out {folder} is a file. Name a folder, which is made if it is not there.")
    weights = sorted(folder.glob("*.safetensors*")) if folder.exists() else []
    if weights:
        raise CheckpointError(
            f"--out {folder} holds a model already ({weights[0].name}). Name another folder, or remove that one."
        )


def _begin(source: str, name: str, where: dict[str, Any], seed: int, *, new: bool) -> tuple[nn.Module, Tokenizer]:
    from partita.checkpoint.find import find_model
    from partita.text import load_tokenizer

    found = find_model(source, weights=not new)
    tokenizer = load_tokenizer(found if found.is_dir() else found.parent)
    if new:
        from partita.torch.fresh import fresh

        return fresh(found, seed=seed, **where), tokenizer
    load: Any = importlib.import_module(f"partita.{name}.load").load
    with loading("loading") as progress:
        return load(found, progress=progress, **where), tokenizer


def _tokens(data: str, tokenizer: Tokenizer, name: str, split: nn.Module) -> Any:
    from partita.training import read_ids

    plan, _ = importlib.import_module(f"partita.{name}.apply").plan_of(split)
    tokens: Any = read_ids(data, tokenizer)
    if name == "torch":
        import torch

        tokens = torch.from_numpy(tokens)
    if plan.spec.vocab_size and (largest := int(tokens.max())) >= plan.spec.vocab_size:
        raise ModelError(
            f"the model's vocabulary has {plan.spec.vocab_size} ids, but the text has id {largest}: the tokenizer "
            f"({tokenizer.vocab_size} ids) is not the model's. The byte-level one needs a vocab_size of at least 257."
        )
    return tokens


def _print_start(split: nn.Module, mesh: Mesh, tokens: int) -> None:
    from partita.torch.apply import plan_of

    plan, _ = plan_of(split)
    trained = sum(p.numel() for p in split.parameters() if p.requires_grad)
    held = sum(p.numel() for p in split.parameters())
    only = f", of which {count(trained)} are trained" if trained < held else ""
    err().print(
        f"{plan.spec.architecture}: {count(plan.spec.parameters)} parameters on {mesh_name(mesh)}, "
        f"{count(held)} on rank 0{only}; {count(tokens)} tokens of text",
        style="dim", soft_wrap=True,
    )  # fmt: skip


def _print_end(reports: list[StepReport], mesh: Mesh, folder: Path | None) -> None:
    losses = [report.loss for report in reports]
    seconds = sum(report.seconds for report in reports)
    tokens = sum(report.tokens for report in reports)
    console = out()
    console.print(f"loss {losses[0]:.4f} {sparkline(losses)} {losses[-1]:.4f}", soft_wrap=True)
    rate = f"{tokens:,} tokens in {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s"
    console.print(f"{plural(len(reports), 'step')}, {rate} on {mesh_name(mesh)}", soft_wrap=True)
    if folder is not None:
        console.print(f"saved to {folder}", soft_wrap=True)
    else:
        console.print("not saved: --out was not given", soft_wrap=True)


def _print_json(reports: list[StepReport], mesh: Mesh, folder: Path | None) -> None:
    print_json(
        {
            "mesh": asdict(mesh),
            "out": str(folder) if folder is not None else None,
            "loss": reports[-1].loss,
            "steps": [asdict(report) for report in reports],
        }
    )
