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
from partita.core.model_spec import DTYPE_BYTES, ModelSpec, TensorSpec, config_number, text_config
from partita.core.resolve import AttentionPlan, ModulePlan, TensorPlan, resolve
from partita.core.rules import STYLES, Rule, Rules, rules_for
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
    rules: Rules = field(repr=False)
    modules: Mapping[str, ModulePlan] = field(repr=False)
    attention: Mapping[str, AttentionPlan] = field(repr=False)
    cuts: Mapping[str, TensorPlan] = field(repr=False)

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
        _check_layout(layout, spec)
        modules, attention, cuts = resolve(spec, mesh.tp, rules)
        return cls(spec, mesh, layout, rules, modules, attention, cuts)

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
            "proven": self.rules.proven,
            "rules": [asdict(rule) for rule in self.rules],
            "model": {
                "family": spec.family, "architecture": spec.architecture, "dtype": spec.dtype, "layers": spec.layers,
                "num_layers": spec.num_layers, "num_heads": spec.num_heads, "num_kv_heads": spec.num_kv_heads,
                "vocab_size": spec.vocab_size, "config": dict(spec.config),
                "linears": None if spec.linears is None else sorted(spec.linears),
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
            return None if index is None else splits[_whole("an index of `splits`", index)]

        mesh = Mesh(**data["mesh"])
        spec = _spec_from_data(data["model"])
        strange = [name for name in data["tensors"] if name not in spec.tensors]
        if strange:
            raise PlanError(f"the plan cuts {strange[0]}, which is no tensor of its model. Make it anew.")
        cuts = {}
        for name, tensor in spec.tensors.items():
            cut = data["tensors"].get(name, {})
            cuts[name] = TensorPlan(
                name, tensor.shape, cut.get("dim"), split(cut.get("split")), cut.get("partial_grad", False)
            )
            _check_cut(cuts[name], mesh.tp)
        modules = {p: ModulePlan.from_data(p, {**m, "split": split(m["split"])}) for p, m in data["modules"].items()}
        attention = {
            p: AttentionPlan(p, a["num_heads"], a["num_kv_heads"], split(a["heads"]), split(a["kv_heads"]))  # type: ignore[arg-type]
            for p, a in data["attention"].items()
        }
        _check_parts(modules, attention, mesh.tp)
        layout = PipelineParallelLayerLayout(data["layout"], mesh.pp)
        _check_layout(layout, spec)
        return cls(
            spec, mesh, layout, Rules(tuple(Rule(**rule) for rule in data["rules"]), _is(bool, "proven", data["proven"])),
            MappingProxyType(modules), MappingProxyType(attention), MappingProxyType(cuts),
        )  # fmt: skip

    def __deepcopy__(self, memo: object) -> Plan:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Plan.from_json, (self.to_json(),)

    def __hash__(self) -> int:
        return hash((self.spec.family, self.mesh, self.layout, len(self.cuts)))


_AT_THE_START = re.compile(r"embed|wte|wpe|project_in|word_embeddings")
_AT_THE_END = re.compile(
    r"lm_head|embed_out|project_out|final|ln_f|(^|\.)norm\.|\bhead\b|cls\.|pooler|classifier|score"
)


def _mtp_layers(spec: ModelSpec) -> int:
    return config_number(text_config(spec.config), "num_nextn_predict_layers", "mtp_num_layers", "num_mtp_layers")


def default_layout(spec: ModelSpec, pp: int) -> PipelineParallelLayerLayout:
    """The layers dealt out evenly over `pp` stages, first stages first, the embedding before and the loss behind."""
    if pp > 1 and not spec.layers:
        raise PlanError(
            f"{spec.family}: no list of layers was found in the model, so it cannot be cut into {pp} stages. Use pp=1."
        )
    if 1 < pp > spec.num_layers:
        raise PlanError(
            f"pp={pp} needs at least {pp} layers, but the model has {spec.num_layers}. Use pp={spec.num_layers} or less."
        )
    stages = [[LayerType.decoder] * n for n in deal(spec.num_layers, pp, allow_empty=True)]
    stages[0] = [LayerType.embedding, *stages[0]]
    stages[-1] = [*stages[-1], LayerType.loss]
    return PipelineParallelLayerLayout(stages, pp)


def _check_layout(layout: PipelineParallelLayerLayout, spec: ModelSpec) -> None:
    """Raise `LayoutError` unless `layout` runs every layer of the model once. Of MTP layers it may have any number."""
    # A layout may leave out the multi-token prediction that a model was trained with.
    layout.validate_layer_layout(spec.num_layers, _mtp_layers(spec) if LayerType.mtp in layout.flatten_layout else 0)


# --- reading what may have been changed by hand ---------------------------------------------------------------------------


def _spec_from_data(model: Mapping[str, Any]) -> ModelSpec:
    tensors = {
        name: TensorSpec(name, _shape(t["shape"]), t.get("tied_to"), _is(bool, "is_buffer", t.get("is_buffer", False)))
        for name, t in model["tensors"].items()
    }
    for name, tensor in tensors.items():
        if tensor.tied_to is not None and tensors[tensor.tied_to].shape != tensor.shape:
            raise PlanError(f"tensor {name} cannot share the memory of {tensor.tied_to}, which has another shape.")
    texts: dict[str, Any] = {k: _is(str, k, model[k]) for k in ("family", "architecture", "layers", "dtype")}
    numbers: dict[str, Any] = {
        k: _whole(k, model[k]) for k in ("num_layers", "num_heads", "num_kv_heads", "vocab_size")
    }
    linears = model["linears"]
    spec = ModelSpec(
        **texts,
        **numbers,
        tensors=MappingProxyType(tensors),
        config=MappingProxyType(dict(model["config"])),
        linears=None if linears is None else frozenset(_is(str, "linears", path) for path in linears),
    )
    if spec.dtype not in DTYPE_BYTES:
        raise PlanError(f"the model's dtype must be one of {', '.join(DTYPE_BYTES)}, but is {spec.dtype!r:.40}.")
    for name in tensors:
        spec.layer_of(name)
    return spec


def _check_cut(cut: TensorPlan, tp: int) -> None:
    _is(bool, "partial_grad", cut.partial_grad)
    if (cut.dim is None) != (cut.split is None):
        raise PlanError(f"tensor {cut.name}: `dim` and `split` go together, but one is missing.")
    if cut.dim is None or cut.split is None:
        return
    if _whole("dim", cut.dim) >= len(cut.shape) or (cut.split.parts, cut.split.size) != (tp, cut.shape[cut.dim]):
        raise PlanError(
            f"tensor {cut.name}: its split ({cut.split}) along dim {cut.dim} does not fit its shape {cut.shape} and tp={tp}."
        )


def _check_parts(modules: Mapping[str, ModulePlan], attention: Mapping[str, AttentionPlan], tp: int) -> None:
    for module in modules.values():
        flags = (module.gather_output, module.split_input, module.transposed)
        blocks = [block for blocks in module.expand if blocks is not None for block in blocks]
        if (
            module.style not in STYLES
            or any(type(flag) is not bool for flag in flags)
            or any(
                type(number) is not int or number < 0 for number in (module.copy_output, module.expand_width, *blocks)
            )
            or len(module.expand) not in (0, tp)
            or (module.split is None) != (module.style == "replicate")
            or (module.split is not None and module.split.parts != tp)
        ):
            raise PlanError(f"module {module.path}: {module} is not how a module can be split over {tp} ranks.")
    for heads in attention.values():
        sizes = (_whole("num_heads", heads.num_heads), _whole("num_kv_heads", heads.num_kv_heads))
        if (
            not all(isinstance(split, Split) for split in (heads.heads, heads.kv_heads))
            or sizes != (heads.heads.size, heads.kv_heads.size)
            or {heads.heads.parts, heads.kv_heads.parts} != {tp}
        ):
            raise PlanError(f"attention {heads.path}: {heads} is not how heads can be split over {tp} ranks.")


def _is(kind: type[Any], name: str, value: Any) -> Any:
    if type(value) is not kind:
        raise PlanError(f"{name} must be a {kind.__name__}, but is {value!r:.100}.")
    return value


def _whole(name: str, value: Any) -> int:
    if type(value) is not int or value < 0:
        raise PlanError(f"{name} must be a whole number of at least 0, but is {value!r:.100}.")
    return value


@lru_cache(maxsize=4096)
def _shape_of(values: tuple[Any, ...]) -> tuple[int, ...]:
    for value in values:
        _whole("a size", value)
    return values


def _shape(values: list[Any]) -> tuple[int, ...]:
    return _shape_of(tuple(values))
