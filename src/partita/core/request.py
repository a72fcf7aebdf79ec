"""The request of a plan, parsed once and sent unchanged to every rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from partita.core.layout.layout import PipelineParallelLayerLayout
from partita.core.layout.placement import Placement
from partita.core.mesh import Mesh
from partita.core.model.spec import ModelSpec
from partita.core.plan import Plan
from partita.core.sharding.rules import Rules


@dataclass(frozen=True)
class PlanRequest:
    """The inputs of a plan, besides the model's own facts.

    Attributes:
        model: A folder, a config file or a hub id.
        mesh: The ranks.
        layout: The layers of each pipeline stage; None to distribute them evenly.
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
        return {**vars(self), "mesh": asdict(self.mesh), "layout": layout, "rules": rules}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> PlanRequest:
        """The inverse of `to_data`."""
        rules = None if data["rules"] is None else Rules.from_data(data["rules"])
        return cls.parse(**{**data, "mesh": Mesh(**data["mesh"]), "rules": rules})
