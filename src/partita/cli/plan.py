"""`partita plan`: which rank holds what of a model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from partita.checkpoint.facts import dtype_note, stored_dtype_at
from partita.cli.console import err, print_json
from partita.cli.engine import EngineName, choose_engine
from partita.cli.model import find_config, make_plan
from partita.cli.options import (
    AsJson,
    LayoutText,
    ModelArgument,
    PipelineRanks,
    Replicas,
    TensorRanks,
    TrustRemoteCode,
    VirtualStages,
)
from partita.cli.timeline import check_file
from partita.core.mesh import Mesh
from partita.core.model.spec import read_config
from partita.core.plan import Plan
from partita.notes import note


def plan(
    model: ModelArgument,
    tp: TensorRanks = 1,
    pp: PipelineRanks = 1,
    dp: Replicas = 1,
    layout: LayoutText = None,
    vpp: VirtualStages = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List how every tensor is cut.")] = False,
    save: Annotated[
        Path | None, typer.Option("--save", metavar="FILE", help="Write the whole plan as JSON.", show_default=False)
    ] = None,
    engine: Annotated[
        EngineName | None,
        typer.Option(
            "--engine",
            help="mlx for the plan of MLX's own model; by default Hugging Face's, for which no engine is needed.",
            show_default=False,
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Show what each rank would hold of a model: layers, parameters, bytes, and how tensors are cut. Needs no weights."""
    if save is not None:
        check_file("--save", save)
    name = choose_engine(engine) if engine == EngineName.mlx else "torch"
    made = make_plan(model, Mesh(dp, pp, tp), layout, vpp, engine=name, trust_remote_code=trust_remote_code)
    path = find_config(model)
    line = dtype_note(path, stored_dtype_at(path), read_config(path))
    if line:
        note(line)
    if save is not None:
        save.write_text(made.to_json() + "\n", encoding="utf-8")
    if as_json:
        print_json(as_data(model, made, tensors=tensors))
        return
    from partita.cli.plan_picture import show

    show(made, all_tensors=tensors)
    if save is not None:
        err().print(f"The plan was written to {save}.", soft_wrap=True)


def as_data(model: str, made: Plan, *, tensors: bool) -> dict[str, Any]:
    """A plan as data: the model, the stages, and what each rank holds."""
    spec, mesh = made.spec, made.mesh
    data: dict[str, Any] = {
        "model": model,
        "family": spec.family,
        "architecture": spec.architecture,
        "dtype": spec.dtype,
        "parameters": spec.parameters,
        "bytes": spec.parameter_bytes,
        "num_layers": spec.num_layers,
        "mesh": asdict(mesh),
        "layout": str(made.layout),
        "proven": made.rules.proven,
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
                "parameters": made.rank_parameters(rank),
                "bytes": made.rank_bytes(rank),
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
                "ranges": [list(cut.split.ranges(tp)) for tp in range(mesh.tp)] if cut.split is not None else None,
                "tied_to": spec.tensors[cut.name].tied_to,
            }
            for cut in made.cuts.values()
        ]
    return data
