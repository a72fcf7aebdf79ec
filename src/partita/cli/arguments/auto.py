"""`--auto`: a plan for this machine as it was measured; and whether the plan of `--plan FILE` fits it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from partita.cli.arguments.model import make_plan, read_spec
from partita.cli.arguments.options import PlanOptions
from partita.cli.arguments.planning import Question, fixed_sizes, hardware_of
from partita.cli.planning import ask, no_plan, options_of, settings_of
from partita.cli.terminal.console import plural, size
from partita.core.layout.layout import LayerType
from partita.core.plan import Plan, layout_of
from partita.core.request import PlanRequest
from partita.cost.hardware import Hardware, measured_file
from partita.cost.memory import memory
from partita.cost.model import ModelCost
from partita.cost.parts import limits
from partita.cost.work import Arrangement, Recompute, Work
from partita.errors import PlanError
from partita.notes import note
from partita.planner import ENGINES, Fixed
from partita.ranks import environment

PROMPT = 512
"""Tokens of a prompt in predictions for commands that do not know theirs."""


def auto_plan(request: PlanRequest, options: PlanOptions, work: Work, fixed: Mapping[str, Any]) -> Plan:
    """The best plan for the ranks at hand: those that a launcher started, else those that this machine was measured with.

    Args:
        request: The request of the command, whose mesh is not used.
        options: The options, of which those of the split that are given stay fixed.
        work: What the command does.
        fixed: Other parts of the plan that stay fixed.

    Raises:
        PlanError: The machine was not measured, or nothing fits.
    """
    if options.plan is not None:
        raise PlanError(f"--auto and --plan {options.plan} exclude each other. Leave one out.")
    if options.layout is not None:
        raise PlanError(f"--auto chooses the layout, but --layout {options.layout} is given. Leave one out.")
    hardware = hardware_of(None)
    ranks = environment.world() or _ranks_of(hardware)
    question = Question(work, ranks, hardware.for_ranks(ranks), Fixed(**fixed_sizes(options), **fixed))
    spec, _ = read_spec(request.model, trust_remote_code=request.trust_remote_code)
    result = ask(spec, question, ENGINES[request.engine], explain=False)
    if not result.plans:
        raise PlanError(no_plan(ask(spec, question, ENGINES[request.engine]), question))
    made = result.plans[0].arrangement
    if environment.is_first():
        note(f"the planner chose {options_of(made)} for {plural(ranks, 'rank')} of {hardware.name}.")
    layout = layout_of(made.layers, made.mesh.pp)
    chosen = replace(request, mesh=made.mesh, layout=layout, vpp=None, placement=made.placement)
    return make_plan(chosen).with_settings(settings_of(made, work))


def planned(
    request: PlanRequest, given: Plan | None, options: PlanOptions, work: Work, *, auto: bool
) -> tuple[PlanRequest, Plan | None]:
    """The request and plan of a command that decodes: with `--auto` chosen, else those of the options, which must fit.

    Raises:
        PlanError: Nothing fits, or the plan of `--plan FILE` does not.
    """
    if auto:
        given = auto_plan(request, options, work, {})
        return replace(request, mesh=given.mesh, layout=given.layout, vpp=None, placement=given.placement), given
    if given is not None:
        groups = min(-(-work.sequences // given.mesh.dp), given.mesh.pp)
        refuse_too_large(given, request, work, {"schedule": "forward-only", "microbatches": groups})
    return request, given


def refuse_too_large(plan: Plan, request: PlanRequest, work: Work, how: Mapping[str, Any]) -> None:
    """Raise `PlanError` for a plan that needs more memory than this machine has, with the nearest that fits.

    Without a measured machine, or for more ranks than it has, nothing is known and nothing is raised.

    Args:
        plan: The plan of a file.
        request: The request of the command.
        work: What the command does.
        how: The other attributes of `Arrangement`.
    """
    ranks = plan.mesh.size
    if not measured_file().is_file() or plan.num_mtp:
        return
    hardware = hardware_of(None)
    if ranks > _ranks_of(hardware):
        return
    layers = tuple(sum(kind == LayerType.decoder for kind in stage) for stage in plan.layout.stages)
    made = Arrangement(mesh=plan.mesh, layers=layers, placement=plan.placement, **how)
    uses, limit = memory(ModelCost.of(plan.spec), work, made, hardware.kernels), limits(hardware, ranks)
    rank = max(range(ranks), key=lambda r: uses[r].total / limit[r])
    if uses[rank].total <= limit[rank]:
        return
    question = Question(work, ranks, hardware.for_ranks(ranks))
    found = ask(plan.spec, question, ENGINES[request.engine], explain=False).plans
    instead = (
        f"This fits: {options_of(found[0].arrangement)} (--auto)."
        if found
        else f"No other plan fits {plural(ranks, 'rank')} of this machine either. Use a smaller batch or shorter sequences."
    )
    raise PlanError(
        f"the plan needs {size(uses[rank].total)} on rank {rank}, but {size(limit[rank])} of {hardware.name} can be used "
        f"(`partita measure`). {instead}"
    )


def recompute_of(checkpointing: bool | int | str) -> Recompute:
    """`Arrangement.recompute` of `TrainSettings.checkpointing`; some layers count as all."""
    if not checkpointing:
        return "none"
    return "selective" if checkpointing == "selective" else "full"


def _ranks_of(hardware: Hardware) -> int:
    return len(hardware.devices) if len(hardware.devices) > 1 else hardware.devices_per_node
