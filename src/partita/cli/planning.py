"""The search of `partita plan`: its answer as text, JSON, a picture and a saved plan."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from partita.cli.arguments.model import read_spec
from partita.cli.arguments.planning import PlanningOptions, Question, question_of
from partita.cli.terminal.console import err, print_json, size
from partita.core.model.spec import ModelSpec
from partita.core.plan import Plan, layout_of
from partita.core.plan_settings import PlanSettings
from partita.core.sharding.rules import Rules
from partita.cost.work import Arrangement, Estimate, Work
from partita.errors import PlanError
from partita.planner import ENGINES, Features, Nearest, Result, best, costs_of, excess, unsupported
from partita.ranks.environment import EngineName


def answer(
    model: str, options: PlanningOptions, *, engine: EngineName, trust_remote_code: bool, save: Path | None,
    picture: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Print the best plans, and write the best one and its picture if requested.

    Raises:
        PlanError: Nothing fits, or the options contradict each other.
    """
    question = question_of(options)
    spec, rules = read_spec(model, trust_remote_code=trust_remote_code)
    features = ENGINES[engine]
    result = ask(spec, question, features)
    if not result.plans:
        raise PlanError(no_plan(result, question))
    winner = result.plans[0]
    if save is not None:
        save.write_text(plan_of(spec, rules, winner, question.work).to_json() + "\n", encoding="utf-8")
    if picture is not None:
        from partita.cli.terminal.planning_figure import draw

        draw(spec, question, winner, picture)
    if as_json:
        print_json(as_data(model, question, result, features))
        return
    from partita.cli.terminal.planning_table import show

    show(spec, question, result, features)
    for what, file in (("plan", save), ("picture", picture)):
        if file is not None:
            err().print(f"The {what} was written to {file}.", soft_wrap=True)


def ask(spec: ModelSpec, question: Question, features: Features, *, explain: bool = True) -> Result:
    """The answer to a question about a model."""
    return best(
        costs_of(spec, question.hardware), question.work, question.ranks, question.fixed, optimize=question.optimize,
        features=features, explain=explain,
    )  # fmt: skip


def plan_of(spec: ModelSpec, rules: Rules | None, estimate: Estimate, work: Work) -> Plan:
    """The plan of an estimate, with its settings."""
    made = estimate.arrangement
    plan = Plan.make(spec, made.mesh, layout_of(made.layers, made.mesh.pp), rules, placement=made.placement)
    return plan.with_settings(settings_of(made, work))


def settings_of(made: Arrangement, work: Work) -> PlanSettings:
    """What a plan says besides the split."""
    if work.purpose != "train":
        return PlanSettings(dtype=work.dtype)
    return PlanSettings(
        schedule=made.schedule, microbatches=made.microbatches, zero=made.zero, recompute=made.recompute,
        sequence_parallel=made.sequence_parallel, overlap_gradients=made.overlap_gradients, batch_size=work.batch_size,
        sequence_length=work.sequence_length, dtype=work.dtype,
    )  # fmt: skip


def no_plan(result: Result, question: Question) -> str:
    """Why nothing fits, and the nearest plans that do."""
    need = "no arrangement exists"
    if result.closest is not None:
        rank = max(range(len(result.closest.memory)), key=lambda r: _share(result.closest, r))
        used, limit = result.closest.memory[rank].total, result.closest.limit[rank]
        need = (
            f"the nearest, {options_of(result.closest.arrangement)}, needs {size(used)} of {size(limit)} on rank {rank}"
        )
    elif result.least is not None:
        need = f"at least {size(result.least.bytes)} of {size(result.least.limit)} are needed on a rank"
    nearest = [f"{as_option(one.change)}: {_brief(one, question.work)}" for one in result.nearest]
    instead = "These fit:\n  " + "\n  ".join(nearest) if nearest else "Use more ranks, or devices with more memory."
    named = f"{question.ranks} rank{'' if question.ranks == 1 else 's'} of {question.hardware.name}"
    return f"no plan fits {named}: {need}. {instead}"


def _share(estimate: Estimate | None, rank: int) -> float:
    assert estimate is not None
    return estimate.memory[rank].total / estimate.limit[rank]


def _brief(one: Nearest, work: Work) -> str:
    what = "a step" if work.purpose == "train" else "a token"
    most = max(use.total for use in one.estimate.memory)
    return f"{options_of(one.estimate.arrangement)} ({seconds(one.estimate.step_s)} {what}, at most {size(most)})"


def options_of(made: Arrangement) -> str:
    """An arrangement as options of the command line; those without an effect are left out."""
    mesh = made.mesh
    parts = [f"--{axis} {getattr(mesh, axis)}" for axis in ("tp", "pp", "dp", "cp", "ep") if getattr(mesh, axis) > 1]
    parts += [f"--vpp {made.vpp}"] if made.vpp > 1 and made.schedule != "zb-v" else []
    if made.schedule != "forward-only":
        parts += [f"--schedule {made.schedule}"] if mesh.pp > 1 else []
        parts += [f"--microbatches {made.microbatches}"] if made.microbatches > 1 else []
        parts += [f"--zero {made.zero}"] if made.zero else []
        parts += [f"--recompute {made.recompute}"] if made.recompute != "none" else []
    parts += ["--sequence-parallel"] if made.sequence_parallel else []
    parts += ["--overlap-gradients"] if made.overlap_gradients else []
    return " ".join(parts) or "one rank"


def as_option(change: str) -> str:
    """A change of the search as options: `tp 1` is `--tp 1`, and a schedule names itself."""
    head, _, rest = change.partition(" ")
    if head == "without" or head.startswith("--"):
        return change if head.startswith("--") or rest.startswith("all") else f"without {as_option(rest)}"
    return f"--{head.replace('_', '-')} {rest}" if rest else f"--schedule {head}"


def seconds(value: float) -> str:
    """Seconds in readable form: 1.23 s, 45.6 ms."""
    return f"{value:,.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} us"


def as_data(model: str, question: Question, result: Result, features: Features) -> dict[str, Any]:
    """The answer as data for JSON."""
    return {
        "model": model,
        "work": asdict(question.work),
        "hardware": question.hardware.name,
        "kernels": question.hardware.kernels,
        "ranks": question.ranks,
        "optimize": question.optimize,
        "plans": [_plan_data(one, features) for one in result.plans],
        "others": [
            {
                "change": as_option(loser.change),
                "plan": _plan_data(loser.estimate, features) if loser.estimate is not None else None,
                "needs": None if loser.closest is None else excess(loser.closest),
            }
            for loser in result.losers
        ],
        "external": None if result.external is None else _plan_data(result.external, features),
        "evaluated": result.evaluated,
    }


def _plan_data(one: Estimate, features: Features) -> dict[str, Any]:
    made = one.arrangement
    return {
        **{name: getattr(made.mesh, name) for name in ("dp", "pp", "tp", "cp", "ep", "etp")},
        "vpp": made.vpp,
        "layout": str(layout_of(made.layers, made.mesh.pp)),
        "placement": made.placement,
        "schedule": made.schedule,
        "microbatches": made.microbatches,
        "zero": made.zero,
        "recompute": made.recompute,
        "sequence_parallel": made.sequence_parallel,
        "overlap_gradients": made.overlap_gradients,
        "unsupported": list(unsupported(made, features)),
        "step_s": one.step_s,
        "prefill_s": one.prefill_s,
        "tokens_per_s": one.tokens_per_s,
        "mfu": one.mfu,
        "bubble": one.bubble,
        "parts_s": one.parts_s,
        "memory_bytes": [{**asdict(use), "total": use.total} for use in one.memory],
        "limit_bytes": list(one.limit),
    }
