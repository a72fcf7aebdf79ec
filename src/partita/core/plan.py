"""Plan: for one model and one mesh, which rank holds which piece of which tensor and runs which layers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any

from partita.core.layout import LayerType, PipelineParallelLayerLayout
from partita.core.mesh import Mesh
from partita.core.model_spec import ModelSpec, TensorSpec
from partita.core.resolve import AttentionPlan, ModulePlan, TensorPlan, resolve
from partita.core.rules import Rules, rules_for
from partita.core.split import Split, deal
from partita.errors import PlanError


@dataclass(frozen=True)
class Stage:
    """What one pipeline stage runs: the ids of its layers, and whether the embedding or the loss is with it."""

    layers: tuple[int, ...]
    mtp_layers: tuple[int, ...]
    embedding: bool
    loss: bool


@dataclass(frozen=True)
class Plan:
    """Mesh, layout and rules resolved for one model. Data: it prints, it parses back, and it needs no framework.

    Engines, checkpoints and the command line ask it; nobody recomputes. Make one with `Plan.make`.
    """

    spec: ModelSpec
    mesh: Mesh
    layout: PipelineParallelLayerLayout
    modules: Mapping[str, ModulePlan] = field(repr=False)
    attention: Mapping[str, AttentionPlan] = field(repr=False)
    cuts: Mapping[str, TensorPlan] = field(repr=False)
    proven: bool = False

    @classmethod
    def make(
        cls,
        spec: ModelSpec,
        mesh: Mesh,
        layout: str | list[Any] | PipelineParallelLayerLayout | None = None,
        rules: Rules | None = None,
    ) -> Plan:
        """The plan of `spec` on `mesh`.

        Args:
            spec: The model.
            mesh: The ranks.
            layout: Which layers each pipeline stage runs; by default they are dealt out evenly, first stages first.
            rules: How modules are split; by default the table of the model's family.

        Raises:
            PlanError: The model cannot be split so; the text says why and what is nearest.
            LayoutError: The layout does not fit the model.
        """
        rules = rules or rules_for(spec)
        if layout is None:
            layout = default_layout(spec, mesh.pp)
        elif not isinstance(layout, PipelineParallelLayerLayout):
            layout = PipelineParallelLayerLayout(layout, mesh.pp)
        elif layout.pipeline_model_parallel_size != mesh.pp:
            raise PlanError(
                f"layout was made for pp={layout.pipeline_model_parallel_size}, but the mesh has pp={mesh.pp}. "
                f"Make it with pipeline_model_parallel_size={mesh.pp}."
            )
        num_mtp = sum(kind is LayerType.mtp for kind in layout.flatten_layout)
        layout.validate_layer_layout(spec.num_layers, num_mtp)
        modules, attention, cuts = resolve(spec, mesh.tp, rules)
        return cls(spec, mesh, layout, modules, attention, cuts, rules.proven)

    # --- asking it ----------------------------------------------------------------------------------------------------

    def tensor(self, name: str) -> TensorPlan:
        """How tensor `name` is cut; by name of the unsplit model."""
        try:
            return self.cuts[name]
        except KeyError:
            raise PlanError(f"the plan's model ({self.spec.family}) has no tensor {name!r}.") from None

    def stage(self, pp: int, vpp: int = 0) -> Stage:
        """What virtual stage `vpp` of pipeline rank `pp` runs."""
        kinds = self.layout.layout[pp][vpp]
        return Stage(
            tuple(self.layout.get_layer_id_list(LayerType.decoder, vpp, pp)),
            tuple(self.layout.get_layer_id_list(LayerType.mtp, vpp, pp)),
            LayerType.embedding in kinds,
            LayerType.loss in kinds,
        )

    def stages(self, pp: int) -> tuple[Stage, ...]:
        """Every stage of pipeline rank `pp`, in virtual order."""
        return tuple(self.stage(pp, vpp) for vpp in range(self.layout.virtual_pipeline_model_parallel_size))

    def held_by(self, rank: int) -> tuple[TensorPlan, ...]:
        """The tensors of which `rank` holds a part, in the model's order. A tied one is there once a rank."""
        return self._held[self.mesh.coordinate(rank).pp]

    def local_shape(self, name: str, rank: int) -> tuple[int, ...]:
        """The shape of `rank`'s part of tensor `name`."""
        return self.tensor(name).local_shape(self.mesh.coordinate(rank).tp)

    def rank_parameters(self, rank: int) -> int:
        """Parameters that `rank` holds, copies counted."""
        return self._count(rank, buffers=False)

    def rank_bytes(self, rank: int) -> int:
        """Bytes of the weights and saved buffers that `rank` holds, in the model's dtype."""
        return self._count(rank, buffers=True) * self.spec.dtype_bytes

    def rank_layers(self, rank: int) -> tuple[int, ...]:
        """Ids of the decoder layers that `rank` runs, in order."""
        return tuple(i for stage in self.stages(self.mesh.coordinate(rank).pp) for i in stage.layers)

    def _count(self, rank: int, *, buffers: bool) -> int:
        tp = self.mesh.coordinate(rank).tp
        return sum(t.local_numel(tp) for t in self.held_by(rank) if buffers or not self.spec.tensors[t.name].is_buffer)

    @cached_property
    def _held(self) -> tuple[tuple[TensorPlan, ...], ...]:
        held = []
        for pp in range(self.mesh.pp):
            stages = self.stages(pp)
            layers = {i for stage in stages for i in stage.layers}
            first, last = any(s.embedding for s in stages), any(s.loss for s in stages)
            mine: dict[str, TensorPlan] = {}
            for name, tensor in self.spec.tensors.items():
                layer = self.spec.layer_of(name)
                here = layer in layers if layer is not None else (first if self._with_embedding[name] else last)
                if here and tensor.tied_to not in mine:
                    mine[name] = self.cuts[name]
            held.append(tuple(mine.values()))
        return tuple(held)

    @cached_property
    def _with_embedding(self) -> dict[str, bool]:
        """For each tensor outside the layers: whether it lives where the embedding is, rather than the loss."""
        names = list(self.spec.tensors)
        in_layers = [i for i, name in enumerate(names) if self.spec.layer_of(name) is not None]
        start = in_layers[0] if in_layers else len(names)
        return {
            name: False if _AT_THE_END.search(name) else (_AT_THE_START.search(name) is not None or i < start)
            for i, name in enumerate(names)
        }

    # --- as data ------------------------------------------------------------------------------------------------------

    def to_json(self, *, indent: int | None = None) -> str:
        """The whole plan as JSON; `from_json` reads it back to an equal plan."""
        splits: list[Split] = []

        def index(split: Split | None) -> int | None:
            if split is None:
                return None
            if split not in places:
                places[split] = len(splits)
                splits.append(split)
            return places[split]

        places: dict[Split, int] = {}
        spec = self.spec
        cuts = {
            name: {"dim": cut.dim, "split": index(cut.split), "partial_grad": cut.partial_grad}
            for name, cut in self.cuts.items()
            if cut.split is not None or cut.partial_grad
        }
        modules = {
            path: {**{k: v for k, v in module.to_data().items() if v}, "split": index(module.split)}
            for path, module in self.modules.items()
        }
        attention = {
            path: {**asdict(a), "heads": index(a.heads), "kv_heads": index(a.kv_heads)}
            for path, a in self.attention.items()
        }
        data = {
            "partita_plan": 1,
            "mesh": asdict(self.mesh),
            "layout": str(self.layout),
            "proven": self.proven,
            "model": {
                "family": spec.family, "architecture": spec.architecture, "dtype": spec.dtype, "layers": spec.layers,
                "num_layers": spec.num_layers, "num_heads": spec.num_heads, "num_kv_heads": spec.num_kv_heads,
                "vocab_size": spec.vocab_size, "config": dict(spec.config),
                "tensors": {
                    t.name: {"shape": list(t.shape), **({"tied_to": t.tied_to} if t.tied_to else {}),
                             **({"is_buffer": True} if t.is_buffer else {})}
                    for t in spec.tensors.values()
                },
            },
            "modules": modules,
            "attention": attention,
            "tensors": cuts,
            "splits": [split.to_data() for split in splits],
        }  # fmt: skip
        return json.dumps(data, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse of `to_json`. Raises `PlanError` where `text` is not such a plan."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"a plan must be JSON as `partita plan --save` writes it: {error}.") from error
        if not isinstance(data, dict) or data.get("partita_plan") != 1:
            raise PlanError(
                "this JSON is not a Partita plan: it has no `partita_plan: 1`. Write one with `partita plan --save`."
            )
        try:
            return cls._from_data(data)
        except PlanError:
            raise
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise PlanError(
                f"the plan is incomplete or changed: {type(error).__name__} at {error}. Make it anew."
            ) from error

    @classmethod
    def _from_data(cls, data: dict[str, Any]) -> Plan:
        splits = [Split.from_data(item) for item in data["splits"]]

        def split(index: int | None) -> Split | None:
            return None if index is None else splits[index]

        model = dict(data["model"])
        tensors = {
            name: TensorSpec(name, _shape(t["shape"]), t.get("tied_to"), bool(t.get("is_buffer")))
            for name, t in model.pop("tensors").items()
        }
        config = MappingProxyType(dict(model.pop("config")))
        spec = ModelSpec(**model, tensors=MappingProxyType(tensors), config=config)
        mesh = Mesh(**data["mesh"])
        cuts = {}
        for name, tensor in tensors.items():
            cut = data["tensors"].get(name, {})
            plan = TensorPlan(
                name, tensor.shape, cut.get("dim"), split(cut.get("split")), bool(cut.get("partial_grad"))
            )
            if plan.split is not None and (
                plan.split.parts != mesh.tp or plan.split.size != tensor.shape[plan.dim or 0]
            ):
                raise PlanError(
                    f"tensor {name}: its split ({plan.split}) does not fit its shape {tensor.shape} and {mesh}."
                )
            cuts[name] = plan
        modules = {p: ModulePlan.from_data(p, {**m, "split": split(m["split"])}) for p, m in data["modules"].items()}
        attention = {
            p: AttentionPlan(p, a["num_heads"], a["num_kv_heads"], split(a["heads"]), split(a["kv_heads"]))  # type: ignore[arg-type]
            for p, a in data["attention"].items()
        }
        layout = PipelineParallelLayerLayout(data["layout"], mesh.pp)
        return cls(
            spec, mesh, layout, MappingProxyType(modules), MappingProxyType(attention), MappingProxyType(cuts),
            bool(data["proven"]),
        )  # fmt: skip

    def __hash__(self) -> int:
        return hash((self.spec.family, self.mesh, self.layout, len(self.cuts)))


_AT_THE_START = re.compile(r"embed|wte|wpe|project_in|word_embeddings")
_AT_THE_END = re.compile(
    r"lm_head|embed_out|project_out|final|ln_f|(^|\.)norm\.|\bhead\b|cls\.|pooler|classifier|score"
)


def default_layout(spec: ModelSpec, pp: int) -> PipelineParallelLayerLayout:
    """The layers dealt out evenly over `pp` stages, first stages first, the embedding before and the loss behind."""
    if pp > 1 and not spec.layers:
        raise PlanError(
            f"{spec.family}: no list of layers was found in the model, so it cannot be cut into {pp} stages. Use pp=1."
        )
    if spec.num_layers < pp:
        raise PlanError(
            f"pp={pp} needs at least {pp} layers, but the model has {spec.num_layers}. Use pp={spec.num_layers} or less."
        )
    stages = [[LayerType.decoder] * n for n in deal(spec.num_layers, pp, allow_empty=True)]
    stages[0] = [LayerType.embedding, *stages[0]]
    stages[-1] = [*stages[-1], LayerType.loss]
    return PipelineParallelLayerLayout(stages, pp)


@lru_cache(maxsize=4096)
def _shape_of(values: tuple[Any, ...]) -> tuple[int, ...]:
    if any(type(value) is not int or value < 0 for value in values):
        raise PlanError(f"a shape must be whole numbers, but is {values}.")
    return values


def _shape(values: list[Any]) -> tuple[int, ...]:
    return _shape_of(tuple(values))
