"""Plan: for one model and one mesh, the pieces of tensors that each rank holds and the layers that it runs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from partita.core import plan_json
from partita.core.layout.balance import balance
from partita.core.layout.layout import LayerType, PipelineParallelLayerLayout
from partita.core.layout.placement import PLACEMENTS, Placement, home_of, stage_at
from partita.core.mesh import Mesh
from partita.core.model.mtp import with_mtp
from partita.core.model.spec import ModelSpec, config_number, text_config
from partita.core.plan_settings import PlanSettings
from partita.core.sharding.cuts import AttentionPlan, ModulePlan, TensorPlan
from partita.core.sharding.resolve import resolve
from partita.core.sharding.rules import Rules, rules_for
from partita.core.sharding.split import check_sizes, deal
from partita.errors import ModelError, PlanError


@dataclass(frozen=True)
class Stage:
    """One pipeline stage: the ids of its layers, and whether it has the embedding or the loss."""

    layers: tuple[int, ...]
    mtp_layers: tuple[int, ...]
    embedding: bool
    loss: bool


@dataclass(frozen=True)
class Plan:
    """Mesh, layout and rules resolved for one model, as data that prints and parses back and needs no framework.

    Engines, checkpoints and the command line query it instead of recomputing it. Make one with `Plan.make`.
    """

    spec: ModelSpec
    mesh: Mesh
    layout: PipelineParallelLayerLayout
    rules: Rules = field(repr=False)
    modules: Mapping[str, ModulePlan] = field(repr=False)
    attention: Mapping[str, AttentionPlan] = field(repr=False)
    cuts: Mapping[str, TensorPlan] = field(repr=False)
    placement: Placement = "loop"
    settings: PlanSettings | None = None

    @classmethod
    def make(
        cls,
        spec: ModelSpec,
        mesh: Mesh,
        layout: str | list[Any] | PipelineParallelLayerLayout | None = None,
        rules: Rules | None = None,
        *,
        vpp: int | None = None,
        placement: Placement = "loop",
    ) -> Plan:
        """The plan of `spec` on `mesh`.

        Args:
            spec: The model.
            mesh: The ranks.
            layout: The layers of each pipeline stage; by default that of `default_layout`.
            rules: The rules for splitting modules; by default the table of the model's family.
            vpp: Stages on each pipeline rank; by default as many as `layout` has, else one.
            placement: The placement of stages on ranks: `loop`, or `v` for schedules that turn around at the ends.

        Raises:
            PlanError: The model cannot be split as requested; the message has the reason and an alternative.
            LayoutError: The layout does not fit the model.

        Examples:
            >>> from partita import spec_from_config
            >>> spec = spec_from_config({
            ...     "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
            ...     "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
            ... })
            >>> plan = Plan.make(spec, Mesh(pp=2, tp=2), "Et*3|tL")
            >>> plan.stage(pp=1)
            Stage(layers=(3,), mtp_layers=(), embedding=False, loss=True)
            >>> plan.local_shape("model.layers.0.self_attn.k_proj.weight", rank=0)
            (16, 64)
            >>> Plan.from_json(plan.to_json()) == plan
            True
        """
        for name, value, kind in (("spec", spec, ModelSpec), ("mesh", mesh, Mesh), ("rules", rules, Rules)):
            if not isinstance(value, kind) and (name, value) != ("rules", None):
                raise PlanError(f"{name} must be a {kind.__name__}, but is of type {type(value).__name__}.")
        if vpp is not None:
            check_sizes(vpp=vpp)
        rules = rules or rules_for(spec)
        if placement not in PLACEMENTS:
            raise PlanError(f"placement must be one of {', '.join(PLACEMENTS)}, but is {placement!r}.")
        if layout is None:
            layout = default_layout(spec, mesh.pp, 1 if vpp is None else vpp)
        elif not isinstance(layout, PipelineParallelLayerLayout):
            layout = PipelineParallelLayerLayout(layout, mesh.pp)
        elif layout.pipeline_model_parallel_size != mesh.pp:
            raise PlanError(
                f"layout was made for pp={layout.pipeline_model_parallel_size}, but the mesh has pp={mesh.pp}. "
                f"Make it with pipeline_model_parallel_size={mesh.pp}."
            )
        if vpp is not None and layout.virtual_pipeline_model_parallel_size != vpp:
            raise PlanError(
                f"vpp={vpp} needs a layout of {vpp * mesh.pp} stages (pp x vpp), but the layout {layout} has "
                f"{layout.num_stages}. Change the layout or vpp."
            )
        _check_layout(layout, spec)
        spec = with_mtp(spec, layout.flatten_layout.count(LayerType.mtp))
        modules, attention, cuts = resolve(spec, mesh, rules)
        if mesh.tp > 1 and rules.table and all(cut.split is None for cut in cuts.values()):
            raise PlanError(
                f"tp={mesh.tp} is more than the parts into which any tensor of the model ({spec.family}) can be split. "
                "Use fewer."
            )
        return cls(spec, mesh, layout, rules, modules, attention, cuts, placement)

    # --- queries ----------------------------------------------------------------------------------------------------

    def tensor(self, name: str) -> TensorPlan:
        """The split of tensor `name` of the unsplit model."""
        try:
            return self.cuts[name]
        except KeyError:
            raise PlanError(f"the plan's model ({self.spec.family}) has no tensor {name!r}.") from None

    def with_settings(self, settings: PlanSettings) -> Plan:
        """The same plan with these settings."""
        return replace(self, settings=settings)

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `ModelError` unless a model has the tensors of the plan's model, in these `shapes` by name."""
        planned = {name: tensor.shape for name, tensor in self.spec.tensors.items()}
        if shapes != planned:
            name = next(n for n in sorted({*shapes, *planned}) if shapes.get(n) != planned.get(n))
            raise ModelError(
                f"the model does not match the plan ({self.spec.family}): {name} has the shape {shapes.get(name, 'none')} in "
                f"the model and {planned.get(name, 'none')} in the plan. Create the plan from this model."
            )

    @property
    def vpp(self) -> int:
        """Stages on each pipeline rank."""
        return self.layout.virtual_pipeline_model_parallel_size

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline: pp x vpp."""
        return self.layout.num_stages

    @cached_property
    def num_mtp(self) -> int:
        """Multi-token-prediction layers of the layout."""
        return self.layout.flatten_layout.count(LayerType.mtp)

    @cached_property
    def loss_stage(self) -> int:
        """The index of the stage with the loss: the last stage that is not empty."""
        return next(index for index, kinds in enumerate(self.layout.stages) if LayerType.loss in kinds)

    def stage_index(self, pp: int, vpp: int = 0) -> int:
        """The index in the pipeline of virtual stage `vpp` of pipeline rank `pp`."""
        for name, index, count in (("pp", pp, self.mesh.pp), ("vpp", vpp, self.vpp)):
            if not 0 <= index < count:
                raise PlanError(f"{name} must be in [0, {count}) of this plan, but is {index}.")
        return stage_at(self.placement, self.mesh.pp, pp, vpp)

    def stage_rank(self, index: int) -> int:
        """The pipeline rank that runs stage `index` of the pipeline."""
        return home_of(self.placement, self.mesh.pp, index)[0]

    def stage_at(self, index: int) -> Stage:
        """The layers of stage `index` of the pipeline."""
        vpp, pp = divmod(index, self.mesh.pp)
        kinds = self.layout.stages[index]
        return Stage(
            tuple(self.layout.get_layer_id_list(LayerType.decoder, vpp, pp)),
            tuple(self.layout.get_layer_id_list(LayerType.mtp, vpp, pp)),
            LayerType.embedding in kinds,
            LayerType.loss in kinds,
        )

    def stage(self, pp: int, vpp: int = 0) -> Stage:
        """The layers of virtual stage `vpp` of pipeline rank `pp`."""
        return self.stage_at(self.stage_index(pp, vpp))

    def stages(self, pp: int) -> tuple[Stage, ...]:
        """Every stage of pipeline rank `pp`, in virtual order."""
        return tuple(self.stage(pp, vpp) for vpp in range(self.vpp))

    def held_by(self, rank: int) -> tuple[TensorPlan, ...]:
        """The tensors of which `rank` holds a part, in the model's order. A tied tensor occurs once per rank."""
        return self._held[self.mesh.coordinate(rank).pp]

    def is_held(self, name: str, pp: int) -> bool:
        """Whether pipeline rank `pp` runs the module of tensor `name`. Tied tensors are distinguished by name."""
        return name in self._needed[pp]

    def is_before_layers(self, name: str) -> bool:
        """Whether tensor `name`, which is outside the layers, belongs to a module before them rather than after."""
        return self._with_embedding[name]

    @cached_property
    def copies(self) -> Mapping[str, tuple[int, ...]]:
        """Tensors that several pipeline ranks hold, with these ranks, first the owner. A tied tensor has its twin's name."""
        holders: dict[str, list[int]] = {}
        for pp, needed in enumerate(self._needed):
            for name in dict.fromkeys(self.spec.tensors[name].tied_to or name for name in needed):
                holders.setdefault(name, []).append(pp)
        return {
            name: tuple(sorted(ranks, key=lambda pp: (not self.is_held(name, pp), not self._embeds(pp), pp)))
            for name, ranks in holders.items()
            if len(ranks) > 1
        }

    def _embeds(self, pp: int) -> bool:
        return any(stage.embedding for stage in self.stages(pp))

    def local_shape(self, name: str, rank: int) -> tuple[int, ...]:
        """The shape of `rank`'s part of tensor `name`."""
        return self.tensor(name).local_shape(self.part(self.tensor(name), rank))

    def part(self, cut: TensorPlan, rank: int) -> int:
        """The part of a tensor that `rank` holds: its index among the ranks over which the tensor is split."""
        if cut.axis == "tp":
            return self.mesh.coordinate(rank).tp
        here = self.mesh.expert_coordinate(rank)
        return here.ep * self.mesh.expert_tp + here.etp

    def rank_parameters(self, rank: int) -> int:
        """Parameters that `rank` holds, copies counted."""
        tensors = self.spec.tensors
        return sum(t.local_numel(self.part(t, rank)) for t in self.held_by(rank) if not tensors[t.name].is_buffer)

    def rank_bytes(self, rank: int, *, unpacked: bool = False) -> int:
        """Bytes of the weights and saved buffers that `rank` holds.

        Args:
            rank: The rank.
            unpacked: Whether quantized weights count in the model's dtype, as where the engine unpacks them, rather than packed
                as they are on disk.
        """
        spec = self.spec
        held = ((t.local_numel(self.part(t, rank)), spec.tensors[t.name]) for t in self.held_by(rank))
        return math.ceil(sum(numel * spec.bits_of(tensor, unpacked=unpacked) for numel, tensor in held) / 8)

    def bytes_outside_layers(self, pp: int) -> int:
        """Bytes of the unsplit tensors of pipeline rank `pp` that belong to no layer: embedding, norm, head, towers."""
        held, tensors = self._needed[pp], self.spec.tensors
        outside = (tensors[name] for name in held if self.spec.layer_of(name) is None)
        return sum(self.spec.bytes_of(tensor) for tensor in outside if tensor.tied_to not in held)

    @cached_property
    def replicated(self) -> tuple[str, ...]:
        """The parameters that every tensor rank of a stage holds unsplit, the largest first; none without tensor ranks."""
        tensors = self.spec.tensors
        names = (n for n, cut in self.cuts.items() if cut.split is None and tensors[n].tied_to is None)
        found = [name for name in names if not tensors[name].is_buffer] if self.mesh.tp > 1 else []
        return tuple(sorted(found, key=lambda name: -tensors[name].numel))

    @cached_property
    def replicated_parameters(self) -> int:
        """The number of parameters of `replicated`."""
        return sum(self.spec.tensors[name].numel for name in self.replicated)

    @property
    def is_mostly_replicated(self) -> bool:
        """Whether tensor ranks split less than half of the model, so that they hardly reduce what each rank holds."""
        return 2 * self.replicated_parameters > self.spec.parameters

    def rank_layers(self, rank: int) -> tuple[int, ...]:
        """Ids of the decoder layers that `rank` runs, in order."""
        return tuple(i for stage in self.stages(self.mesh.coordinate(rank).pp) for i in stage.layers)

    @cached_property
    def _held(self) -> tuple[tuple[TensorPlan, ...], ...]:
        return tuple(
            tuple(self.cuts[name] for name in needed if self.spec.tensors[name].tied_to not in needed)
            for needed in self._needed
        )

    @cached_property
    def _needed(self) -> tuple[dict[str, None], ...]:
        """For each pipeline rank the tensors that its stages compute with, in the model's order."""
        needed = []
        for pp in range(self.mesh.pp):
            stages = self.stages(pp)
            layers = {i for stage in stages for i in stage.layers}
            layers |= {self.spec.num_layers + i for stage in stages for i in stage.mtp_layers}
            first, last = any(s.embedding for s in stages), any(s.loss for s in stages)
            mtp = any(s.mtp_layers for s in stages)
            mine: dict[str, None] = {}
            for name in self.spec.tensors:
                layer = self.spec.layer_of(name)
                if layer is not None:
                    here = layer in layers
                elif self.spec.is_in_tower(name):
                    here = first
                elif self._with_embedding[name]:
                    here = first or mtp
                else:
                    # Multi-token prediction starts with the last norm of the base model.
                    here = last or (mtp and name.startswith(self.spec.prefix) and self.spec.prefix != "")
                if here:
                    mine[name] = None
            needed.append(mine)
        return tuple(needed)

    @cached_property
    def _with_embedding(self) -> dict[str, bool]:
        """For each tensor outside the layers: whether it is placed with the embedding rather than with the loss."""
        names = list(self.spec.tensors)
        in_layers = [i for i, name in enumerate(names) if self.spec.layer_of(name) is not None]
        start, end = (in_layers[0], in_layers[-1]) if in_layers else (len(names), len(names))

        def is_before(i: int, name: str) -> bool:
            if self.spec.is_in_tower(name):
                return True
            starts, ends = (pattern.search(name) is not None for pattern in (_AT_THE_START, _AT_THE_END))
            if starts and i < start:
                return True  # ModernBERT's `embeddings.norm`
            # There may be a position embedding after the layers, but a norm there ends the model (LFM2).
            is_norm = i > end and len(self.spec.tensors[name].shape) < 2
            return not ends and (i < start or (starts and not is_norm))

        return {name: is_before(i, name) for i, name in enumerate(names)}

    # --- as data ------------------------------------------------------------------------------------------------------

    def to_json(self, *, indent: int | None = None) -> str:
        """The complete plan as JSON; `from_json` reads it back to an equal plan."""
        facts = plan_json.PlanFacts(**{name: getattr(self, name) for name in plan_json.PlanFacts.__dataclass_fields__})
        return json.dumps(plan_json.as_data(facts), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse of `to_json`. Raises `PlanError` if `text` is not such a plan."""
        try:
            data = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise PlanError(f"a plan must be JSON as `partita plan --save` writes it: {error}.") from error
        if not isinstance(data, dict) or data.get("partita_plan") != 1:
            raise PlanError(
                "this JSON is not a Partita plan: it has no `partita_plan: 1`. Write one with `partita plan --save`."
            )
        try:
            facts = plan_json.from_data(data)
            _check_layout(facts.layout, facts.spec)
            return cls(**vars(facts))
        except PlanError:
            raise
        except KeyError as error:
            raise PlanError(f"the plan is incomplete: {error!s:.100} is missing. Make the plan again.") from error
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            why = " ".join(str(error).split())
            raise PlanError(
                f"the plan was changed: {type(error).__name__} at {why:.200}. Make the plan again."
            ) from error

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


def _refuse_shared_layers(spec: ModelSpec, stages: int) -> None:
    """Raise `PlanError` for several stages of a model that applies the same layers again and again (ALBERT)."""
    config = text_config(spec.config)
    groups, applied = config_number(config, "num_hidden_groups"), config_number(config, "num_hidden_layers")
    if stages > 1 and 0 < groups < applied:
        weights = "one set" if groups == 1 else f"{groups} sets"
        raise PlanError(
            f"{spec.family}: its {applied} layers share {weights} of weights (num_hidden_groups={groups}), so it cannot be "
            f"partitioned into {stages} stages. Use pp=1, and tp to split each layer."
        )


def default_layout(spec: ModelSpec, pp: int, vpp: int = 1) -> PipelineParallelLayerLayout:
    """The layers distributed over pp x vpp stages, after the embedding and before the loss.

    Layers of equal bytes are distributed evenly, first stages first. Where they differ (the first layers of DeepSeek-V3 have
    no experts), the largest stage has the fewest bytes possible, embedding and head counted.
    """
    count = pp * vpp
    _refuse_shared_layers(spec, count)
    if count > 1 and not spec.layers:
        raise PlanError(
            f"{spec.family}: no list of layers was found in the model, so it cannot be partitioned into {count} "
            "stages. Use pp=1."
        )
    if 1 < count > spec.num_layers:
        name, wanted = ("pp", pp) if vpp == 1 else ("pp x vpp", count)
        raise PlanError(
            f"{name}={wanted} needs at least {wanted} layers, but the model has {spec.num_layers}. Use "
            f"{name}={spec.num_layers} or less, or give a layout with empty stages."
        )
    even = deal(spec.num_layers, count, allow_empty=True)
    layers = spec.layer_bytes if count > 1 else ()
    if len(set(layers)) <= 1:
        return layout_of(even, pp)
    two = Plan(spec, Mesh(pp=2), layout_of([1, spec.num_layers - 1], 2), Rules(()), {}, {}, {})
    first, last = (two.bytes_outside_layers(stage) for stage in range(2))
    return layout_of(balance(layers, even, first, last), pp)


def layout_of(counts: Sequence[int], pp: int) -> PipelineParallelLayerLayout:
    """The layout with these numbers of decoder layers in its stages."""
    stages = [[LayerType.decoder] * n for n in counts]
    stages[0] = [LayerType.embedding, *stages[0]]
    stages[-1] = [*stages[-1], LayerType.loss]
    return PipelineParallelLayerLayout(stages, pp)


def _check_layout(layout: PipelineParallelLayerLayout, spec: ModelSpec) -> None:
    """Raise `LayoutError` unless `layout` runs every layer of the model once.

    A layout may leave out the multi-token prediction that a model was trained with, and add some to a model without.
    """
    _refuse_shared_layers(spec, layout.num_stages)
    mtp = layout.flatten_layout.count(LayerType.mtp)
    layout.validate_layer_layout(spec.num_layers, (_mtp_layers(spec) or mtp) if mtp else 0)
