"""The request of a plan, parsed once and sent unchanged to every rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from partita.core.layout.layout import PipelineParallelLayerLayout
from partita.core.layout.placement import Placement
from partita.core.mesh import AXES, Mesh
from partita.core.model.spec import ModelSpec
from partita.core.plan import Plan
from partita.core.sharding.rules import Rules
from partita.errors import PlanError


class SplitArguments(TypedDict, total=False):
    """The keyword arguments that describe a split: the sizes of a mesh, and what `SplitRequest` documents."""

    tp: int
    pp: int
    dp: int
    cp: int
    ep: int
    etp: int | None
    layout: str | list[Any] | PipelineParallelLayerLayout | None
    vpp: int | None
    placement: Placement


@dataclass(frozen=True)
class SplitRequest:
    """How to split a model whose facts are not known yet.

    Attributes:
        mesh: The ranks.
        layout: The layers of each pipeline stage; None to distribute them evenly.
        vpp: Stages on each pipeline rank; None for as many as `layout` has, else one.
        placement: The placement of stages on ranks.
        rules: The rules for splitting modules; None for those of the model's family.
    """

    mesh: Mesh
    layout: str | list[Any] | PipelineParallelLayerLayout | None = None
    vpp: int | None = None
    placement: Placement = "loop"
    rules: Rules | None = None

    @classmethod
    def of(cls, plan: Plan | None, arguments: SplitArguments) -> SplitRequest:
        """The split of `plan` if one is given, else of keyword arguments.

        Raises:
            PlanError: `plan` is not a plan, or a size is not a positive integer.
            TypeError: An argument is none of `SplitArguments`.
        """
        names = SplitArguments.__annotations__
        if unknown := sorted(arguments.keys() - names):
            raise TypeError(f"got an unexpected keyword argument {unknown[0]!r}. A split has {', '.join(names)}.")
        mesh = _mesh_of(plan, arguments)
        if plan is not None:
            return cls(mesh, plan.layout, placement=plan.placement)
        placement = arguments.get("placement", "loop")
        return cls(mesh, arguments.get("layout"), arguments.get("vpp"), placement)


def _mesh_of(plan: Plan | None, arguments: SplitArguments) -> Mesh:
    """The mesh of `plan`, or of the sizes in `arguments` if it is None."""
    if plan is None:
        sizes: dict[str, Any] = {axis: arguments.get(axis, 1) for axis in (*AXES, "ep")}
        return Mesh(**sizes, etp=arguments.get("etp"))
    if not isinstance(plan, Plan):
        raise PlanError(f"plan must be a Plan, but is {plan!r:.100}. Read a file with Plan.from_json(text).")
    return plan.mesh


@dataclass(frozen=True)
class PlanRequest:
    """The inputs of a plan, besides the model's own facts.

    Attributes:
        model: A folder, a config file or a hub id.
        mesh: The ranks.
        layout: The layers of each pipeline stage; None for the default layout.
        vpp: Stages on each pipeline rank; None for as many as `layout` has, else one.
        placement: The placement of stages on ranks.
        rules: The rules for splitting modules; None for those of the model's family.
        engine: The engine that executes the plan.
        dtype: The dtype of the weights; None for the checkpoint's own.
        trust_remote_code: Whether code that comes with the model may run.
    """

    model: str
    mesh: Mesh
    layout: PipelineParallelLayerLayout | None = None
    vpp: int | None = None
    placement: Placement = "loop"
    rules: Rules | None = None
    engine: Literal["torch", "mlx"] = "torch"
    dtype: str | None = None
    trust_remote_code: bool = False

    @classmethod
    def parse(cls, model: str, mesh: Mesh, layout: str | None = None, **options: Any) -> PlanRequest:
        """A request whose layout is text.

        Raises:
            LayoutError: The text is not a layout of `mesh.pp` pipeline ranks.
        """
        made = None if layout is None else PipelineParallelLayerLayout(layout, mesh.pp)
        return cls(model, mesh, made, **options)

    def plan(self, spec: ModelSpec, rules: Rules | None = None) -> Plan:
        """The plan of a model with these facts; `rules` are those of its family, used if the request has none.

        Raises:
            PlanError: The model cannot be split as requested.
            LayoutError: The layout does not fit the model.
        """
        return Plan.make(spec, self.mesh, self.layout, self.rules or rules, vpp=self.vpp, placement=self.placement)

    def to_data(self) -> dict[str, Any]:
        """Plain data for JSON; `from_data` reads it back."""
        rules = None if self.rules is None else self.rules.to_data()
        layout = None if self.layout is None else str(self.layout)
        return {**vars(self), "mesh": self.mesh.to_data(), "layout": layout, "rules": rules}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> PlanRequest:
        """The inverse of `to_data`."""
        rules = None if data["rules"] is None else Rules.from_data(data["rules"])
        return cls.parse(**{**data, "mesh": Mesh(**data["mesh"]), "rules": rules})
