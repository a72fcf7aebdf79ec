"""A plan as JSON data, and back. Every value is checked, since files may have been edited by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from partita.core.layout.layout import PipelineParallelLayerLayout
from partita.core.layout.placement import PLACEMENTS, Placement
from partita.core.mesh import Mesh
from partita.core.model.spec import DTYPE_BYTES, ModelSpec, TensorSpec
from partita.core.plan_settings import PlanSettings
from partita.core.sharding.cuts import AttentionPlan, ModulePlan, TensorPlan
from partita.core.sharding.rules import STYLES, Rules
from partita.core.sharding.split import Split
from partita.errors import PlanError


@dataclass(frozen=True)
class PlanFacts:
    """The facts of which a plan consists."""

    spec: ModelSpec
    mesh: Mesh
    layout: PipelineParallelLayerLayout
    rules: Rules
    modules: Mapping[str, ModulePlan]
    attention: Mapping[str, AttentionPlan]
    cuts: Mapping[str, TensorPlan]
    placement: Placement
    settings: PlanSettings | None = None


def as_data(plan: PlanFacts) -> dict[str, Any]:
    """A plan as plain values; each split is stored once and referenced by index."""
    splits: list[Split] = []

    def index(split: Split | None) -> int | None:
        if split is None:
            return None
        if split not in places:
            places[split] = len(splits)
            splits.append(split)
        return places[split]

    places: dict[Split, int] = {}
    spec = plan.spec
    cuts = {
        name: {
            "dim": cut.dim,
            "split": index(cut.split),
            "partial_grad": cut.partial_grad,
            **({} if cut.axis == "tp" else {"axis": cut.axis}),
            **({} if cut.inner is None else {"inner_dim": cut.inner_dim, "inner": index(cut.inner)}),
        }
        for name, cut in plan.cuts.items()
        if cut.split is not None or cut.partial_grad
    }
    modules = {
        path: {**{k: v for k, v in module.to_data().items() if v}, "split": index(module.split)}
        for path, module in plan.modules.items()
    }
    attention = {
        path: {**asdict(a), "heads": index(a.heads), "kv_heads": index(a.kv_heads)}
        for path, a in plan.attention.items()
    }
    return {
        "partita_plan": 1,
        "mesh": plan.mesh.to_data(),
        "layout": str(plan.layout),
        "placement": plan.placement,
        **plan.rules.to_data(),
        "model": {
            "family": spec.family, "architecture": spec.architecture, "dtype": spec.dtype, "layers": spec.layers,
            "num_layers": spec.num_layers, "num_heads": spec.num_heads, "num_kv_heads": spec.num_kv_heads,
            "vocab_size": spec.vocab_size, "config": dict(spec.config),
            "linears": None if spec.linears is None else sorted(spec.linears), "towers": list(spec.towers),
            "tensors": {
                t.name: {"shape": list(t.shape), **({"tied_to": t.tied_to} if t.tied_to else {}),
                         **({"is_buffer": True} if t.is_buffer else {}),
                         **({"packed_bits": t.packed_bits} if t.packed_bits is not None else {})}
                for t in spec.tensors.values()
            },
        },
        "modules": modules,
        "attention": attention,
        "tensors": cuts,
        "splits": [split.to_data() for split in splits],
        **({} if plan.settings is None else {"settings": plan.settings.given}),
    }  # fmt: skip


def from_data(data: dict[str, Any]) -> PlanFacts:
    """The inverse of `as_data`.

    Raises:
        PlanError: A value is invalid.
        KeyError, TypeError, ValueError, IndexError, AttributeError: A value is missing, or has another type.
    """
    splits = [Split.from_data(item) for item in data["splits"]]

    def split(index: int | None) -> Split | None:
        return None if index is None else splits[_whole("an index of `splits`", index)]

    mesh = Mesh(**data["mesh"])
    spec = _spec_from_data(data["model"])
    strange = [name for name in data["tensors"] if name not in spec.tensors]
    if strange:
        raise PlanError(f"the plan splits {strange[0]}, which is not a tensor of its model. Make the plan again.")
    cuts = {}
    for name, tensor in spec.tensors.items():
        cut = data["tensors"].get(name, {})
        cuts[name] = TensorPlan(
            name,
            tensor.shape,
            cut.get("dim"),
            split(cut.get("split")),
            cut.get("partial_grad", False),
            cut.get("axis", "tp"),
            cut.get("inner_dim"),
            split(cut.get("inner")),
        )
        _check_cut(cuts[name], mesh)
    modules = {p: ModulePlan.from_data(p, {**m, "split": split(m["split"])}) for p, m in data["modules"].items()}
    attention = {
        p: AttentionPlan(p, a["num_heads"], a["num_kv_heads"], split(a["heads"]), split(a["kv_heads"]))  # type: ignore[arg-type]
        for p, a in data["attention"].items()
    }
    _check_parts(modules, attention, mesh)
    layout = PipelineParallelLayerLayout(data["layout"], mesh.pp)
    placement = data.get("placement", "loop")
    if placement not in PLACEMENTS:
        raise PlanError(f"placement must be one of {', '.join(PLACEMENTS)}, but is {placement!r:.100}.")
    rules = Rules.from_data(data)
    _is(bool, "proven", rules.proven)
    settings = PlanSettings.from_data(data["settings"]) if data.get("settings") is not None else None
    return PlanFacts(
        spec, mesh, layout, rules,
        MappingProxyType(modules), MappingProxyType(attention), MappingProxyType(cuts), placement, settings,
    )  # fmt: skip


def _spec_from_data(model: Mapping[str, Any]) -> ModelSpec:
    tensors = {
        name: TensorSpec(
            name,
            _shape(t["shape"]),
            t.get("tied_to"),
            _is(bool, "is_buffer", t.get("is_buffer", False)),
            _bits(t.get("packed_bits")),
        )
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
        towers=tuple(_is(str, "towers", path) for path in model.get("towers", ())),
    )
    if spec.dtype not in DTYPE_BYTES:
        raise PlanError(f"the model's dtype must be one of {', '.join(DTYPE_BYTES)}, but is {spec.dtype!r:.40}.")
    for name in tensors:
        spec.layer_of(name)
    return spec


def _check_cut(cut: TensorPlan, mesh: Mesh) -> None:
    _is(bool, "partial_grad", cut.partial_grad)
    if cut.axis not in ("tp", "ep"):
        raise PlanError(f"tensor {cut.name}: `axis` must be tp or ep, but is {cut.axis!r:.40}.")
    for names, dim, split in (
        ("`dim` and `split`", cut.dim, cut.split),
        ("`inner_dim` and `inner`", cut.inner_dim, cut.inner),
    ):
        if (dim is None) != (split is None):
            raise PlanError(f"tensor {cut.name}: {names} go together, but one is missing.")
    if cut.dim is None or cut.split is None:
        return
    parts = mesh.tp if cut.axis == "tp" else mesh.ep * mesh.expert_tp
    if cut.inner is not None and (cut.axis, cut.inner.parts) != ("ep", mesh.expert_tp):
        raise PlanError(f"tensor {cut.name}: `inner` is for experts split over etp={mesh.expert_tp}.")
    for dim, split in ((cut.dim, cut.split), *(((cut.inner_dim, cut.inner),) if cut.inner is not None else ())):
        if _whole("dim", dim) >= len(cut.shape) or split.size != cut.shape[dim] or cut.parts != parts:
            raise PlanError(
                f"tensor {cut.name}: its split ({split}) along dim {dim} does not fit its shape {cut.shape} and "
                f"{cut.axis}={parts}."
            )


def _check_parts(modules: Mapping[str, ModulePlan], attention: Mapping[str, AttentionPlan], mesh: Mesh) -> None:
    tp = mesh.tp
    for module in modules.values():
        parts = mesh.ep if module.distributed is True else tp
        flags = (module.gather_output, module.split_input, module.transposed, module.distributed)
        blocks = [block for blocks in module.expand if blocks is not None for block in blocks]
        if (
            module.style not in STYLES
            or any(type(flag) is not bool for flag in flags)
            or any(
                type(number) is not int or number < 0 for number in (module.copy_output, module.expand_width, *blocks)
            )
            or len(module.expand) not in (0, tp)
            or (module.split is None) != (module.style == "replicate")
            or (module.split is not None and module.split.parts != parts)
        ):
            raise PlanError(f"module {module.path}: {module} is not a valid split of a module over {parts} ranks.")
    for heads in attention.values():
        sizes = (_whole("num_heads", heads.num_heads), _whole("num_kv_heads", heads.num_kv_heads))
        if (
            not all(isinstance(split, Split) for split in (heads.heads, heads.kv_heads))
            or sizes != (heads.heads.size, heads.kv_heads.size)
            or {heads.heads.parts, heads.kv_heads.parts} != {tp}
        ):
            raise PlanError(f"attention {heads.path}: {heads} is not a valid split of heads over {tp} ranks.")


def _is(kind: type[Any], name: str, value: Any) -> Any:
    if type(value) is not kind:
        raise PlanError(f"{name} must be a {kind.__name__}, but is {value!r:.100}.")
    return value


def _bits(value: Any) -> float | None:
    """Bits per element, or None for those of the model's dtype."""
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 < value <= 64:
        raise PlanError(f"`packed_bits` must be a number in (0, 64], but is {value!r:.40}.")
    return float(value)


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
