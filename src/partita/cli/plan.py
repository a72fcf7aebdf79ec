"""`partita plan`: which rank holds what of a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from partita.checkpoint.facts import dtype_note, quantization_note, stored_dtype_at
from partita.cli.arguments.engine import EngineChoice, choose_engine
from partita.cli.arguments.model import find_config, make_plan, refuse_other_model, request_of
from partita.cli.arguments.options import OUTPUT, WEIGHTS, AsJson, TrustRemoteCode
from partita.cli.arguments.planning import STARTS, PlanningOptions
from partita.cli.terminal.console import err, print_json
from partita.cli.terminal.timeline import check_file
from partita.core.model.quantization import quantization_name
from partita.core.model.spec import read_config
from partita.core.plan import Plan
from partita.notes import note
from partita.ranks.environment import EngineName


@dataclass(frozen=True, kw_only=True)
class PlanCommandOptions(PlanningOptions):
    """The options of `partita plan`."""

    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Path of a Hugging Face folder, a GGUF file or a config file, or a hub id (owner/name).",
            show_default=False,
        ),
    ] = None
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List how every tensor is split.", rich_help_panel=OUTPUT)
    ] = False
    save: Annotated[
        Path | None,
        typer.Option(
            "--save",
            metavar="FILE",
            help="Write the complete plan as JSON.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None
    picture: Annotated[
        Path | None,
        typer.Option(
            "--picture",
            metavar="FILE",
            help="Draw what each rank holds as .svg or .png.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None
    engine: Annotated[
        EngineChoice | None,
        typer.Option(
            "--engine",
            help="Plan for the model of this engine; mlx has its own (default: Hugging Face's, which needs no engine).",
            show_default=False,
            rich_help_panel=WEIGHTS,
        ),
    ] = None
    trust_remote_code: TrustRemoteCode = False
    as_json: AsJson = False


def plan(options: PlanCommandOptions) -> None:
    """Show what each rank of a split model holds: layers, parameters, bytes, and the split of tensors. Needs no weights.

    With --ranks, --hardware, --for or another option of these panels: choose the best plan, and predict its time and memory.

    With --plan FILE: show the plan in the file, and compare it with MODEL if that is given.
    """
    if options.save is not None:
        check_file("--save", options.save)
    if options.picture is not None:
        check_file("--picture", options.picture, ".svg", ".png")
    if STARTS & options.given:
        if options.model is None or options.plan is not None:
            raise typer.BadParameter(
                "Give a folder, a config file or a hub id, without --plan FILE, to choose a plan.", param_hint="MODEL"
            )
        from partita.cli.planning import answer

        answer(
            options.model, options, engine="mlx" if options.engine == EngineChoice.mlx else "torch",
            trust_remote_code=options.trust_remote_code, save=options.save, picture=options.picture,
            as_json=options.as_json,
        )  # fmt: skip
        return
    name = choose_engine(options.engine) if options.engine == EngineChoice.mlx else "torch"
    if options.plan is not None and options.model is None:
        made = request_of("", options)[1]
        assert made is not None
    elif options.model is None:
        raise typer.BadParameter("Give a folder, a config file or a hub id, or --plan FILE.", param_hint="MODEL")
    else:
        made = _planned(options.model, options, name)
    if options.save is not None:
        options.save.write_text(made.to_json() + "\n", encoding="utf-8")
    if options.picture is not None:
        from partita.cli.terminal.plan_figure import picture

        picture(made, options.picture)
    if options.as_json:
        print_json(as_data(options.model, made, tensors=options.tensors))
        return
    from partita.cli.terminal.plan_picture import show

    show(made, all_tensors=options.tensors)
    for what, file in (("plan", options.save), ("picture", options.picture)):
        if file is not None:
            err().print(f"The {what} was written to {file}.", soft_wrap=True)


def _planned(model: str, options: PlanCommandOptions, name: EngineName) -> Plan:
    request, given = request_of(model, options, engine=name, trust_remote_code=options.trust_remote_code)
    if given is not None:
        refuse_other_model(given, request)
    made = given if given is not None else make_plan(request)
    path = find_config(request.model)
    line = dtype_note(path, stored_dtype_at(path), read_config(path))
    for text in (line, quantization_note(made.spec)):
        if text:
            note(text)
    return made


def as_data(model: str | None, made: Plan, *, tensors: bool) -> dict[str, Any]:
    """A plan as data for JSON: the model, the stages, and what each rank holds."""
    spec, mesh = made.spec, made.mesh
    data: dict[str, Any] = {
        "model": model,
        "family": spec.family,
        "architecture": spec.architecture,
        "dtype": spec.dtype,
        "parameters": spec.parameters,
        "bytes": spec.parameter_bytes,
        "unpacked_bytes": spec.unpacked_bytes,
        "quantization": quantization_name(spec),
        "num_layers": spec.num_layers,
        "mesh": mesh.to_data(),
        "layout": str(made.layout),
        "proven": made.rules.proven,
        "replicated_parameters": made.replicated_parameters,
        "stages": [
            {"pp": pp, "vpp": vpp, **asdict(stage)}
            for vpp in range(made.layout.virtual_pipeline_model_parallel_size)
            for pp in range(mesh.pp)
            for stage in (made.stage(pp, vpp),)
        ],
        "ranks": [
            {
                "rank": rank,
                **mesh.coordinate(rank)._asdict(),
                **({"ep": mesh.expert_coordinate(rank).ep} if mesh.ep > 1 else {}),
                **({"etp": mesh.expert_coordinate(rank).etp} if mesh.ep > 1 and mesh.expert_tp > 1 else {}),
                "parameters": made.rank_parameters(rank),
                "bytes": made.rank_bytes(rank),
                "unpacked_bytes": made.rank_bytes(rank, unpacked=spec.is_packed),
                "layers": list(made.rank_layers(rank)),
            }
            for rank in range(mesh.size)
        ],
    }
    if tensors:
        data["tensors"] = [
            {
                "name": cut.name,
                "shape": cut.shape,
                "dim": cut.dim,
                **({"axis": cut.axis} if mesh.ep > 1 else {}),
                **({} if cut.inner is None else {"inner_dim": cut.inner_dim}),
                "ranges": (
                    None if cut.split is None else [list(cut.split.ranges(part)) for part in range(cut.split.parts)]
                ),
                **({} if cut.inner is None else {"inner_ranges": [list(one) for one in cut.inner.by_rank]}),
                "tied_to": spec.tensors[cut.name].tied_to,
            }
            for cut in made.cuts.values()
        ]
    return data
