"""ModelCost: the facts of a model that its costs need, for each kind of layer and each tensor rank.

One layer of each kind is resolved, not each layer, so that a model of 671 B parameters takes milliseconds for each `tp`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any

from partita.core.layout.layout import PipelineParallelLayerLayout
from partita.core.mesh import Mesh
from partita.core.model.mtp import mtp_count, with_mtp
from partita.core.model.rotary import Rotary
from partita.core.model.spec import ModelSpec, TensorSpec, config_number, text_config
from partita.core.plan import Plan
from partita.core.sharding.cuts import AttentionPlan, ModulePlan, TensorPlan
from partita.core.sharding.resolve import resolve
from partita.core.sharding.rules import Rules, rules_for
from partita.core.sharding.split import Split
from partita.cost.facts import ATTENTION, Attention, Ends, Layer, Mlp, Part, Product, Sliced, ceil_div
from partita.errors import ModelError, PlanError

_NORM = re.compile(r"(^|[._])(norm|layernorm|layer_norm|rmsnorm|ln|ln_\w+|\w*norm\w*)($|[._\d])", re.IGNORECASE)
_HEAD_NORM = re.compile(r"(q|k|query|key)_?(layer)?norm$")


class ModelCost:
    """The facts of a model that its costs need. Make one with `ModelCost.of`.

    Attributes:
        spec: The model.
        kinds: For each decoder layer, then each prediction layer that the checkpoint has, the number of its kind.
        first: For each kind, the first layer of it.
        hidden: The width of the hidden state.
        head_width: Elements of a head.
    """

    def __init__(self, spec: ModelSpec, rules: Rules | None = None) -> None:
        self.spec = spec
        self.rules = rules or rules_for(spec)
        config = text_config(spec.config)
        self.config = config
        self.hidden = config_number(config, "hidden_size", "n_embd", "d_model", "hidden_dim") or _hidden_of(spec)
        self.head_width = config_number(config, "head_dim") or self.hidden // max(1, spec.num_heads)
        by_layer: dict[int, list[TensorSpec]] = {}
        self._outside: list[TensorSpec] = []
        for name, tensor in spec.tensors.items():
            layer = spec.layer_of(name)
            if layer is None:
                self._outside.append(tensor)
            else:
                by_layer.setdefault(layer, []).append(tensor)
        self._by_layer = by_layer
        found: dict[Any, int] = {}
        self.kinds = tuple(
            found.setdefault(self._signature(layer, by_layer.get(layer, [])), len(found))
            for layer in range(spec.num_layers)
        )
        self.first = tuple(self.kinds.index(kind) for kind in range(len(found)))
        self._sliced: dict[tuple[int, int, int], Sliced] = {}
        self.cache: dict[Any, Any] = {}
        """Costs that were computed before; for the other modules of this package."""

    @classmethod
    def of(cls, spec: ModelSpec) -> ModelCost:
        """The facts of `spec`, computed once."""
        return _model_cost(spec)

    def _signature(self, layer: int, tensors: Iterable[TensorSpec]) -> Any:
        prefix = len(f"{self.spec.layers}.{layer}.")
        shapes = tuple((t.name[prefix:], t.shape, t.packed_bits, t.is_buffer, t.tied_to) for t in tensors)
        return shapes, self.window_of(layer)

    def window_of(self, layer: int) -> int:
        """Tokens that a token of a layer attends to at most; 0 for all."""
        window = config_number(self.config, "sliding_window", "attention_window")
        if not window or self.config.get("use_sliding_window") is False:
            return 0
        types = self.config.get("layer_types")
        if isinstance(types, (list, tuple)) and layer < len(types):
            return window if "sliding" in str(types[layer]) else 0
        pattern = config_number(self.config, "sliding_window_pattern")
        if pattern:
            return 0 if (layer + 1) % pattern == 0 else window
        if self.spec.family == "gemma2":
            return window if layer % 2 == 0 else 0
        return window

    @cached_property
    def num_experts(self) -> int:
        """Routed experts of a layer; 0 without."""
        return config_number(self.config, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

    @cached_property
    def chosen_experts(self) -> int:
        """Routed experts that a token visits."""
        return config_number(self.config, "num_experts_per_tok", "moe_top_k", "num_experts_per_token") or 1

    @cached_property
    def has_fused_experts(self) -> bool:
        """Whether the experts of a layer are one tensor, [experts, ...], which ranks can distribute."""
        return any(self.is_expert(tensor.name) and len(tensor.shape) == 3 for tensor in self.spec.tensors.values())

    def longest_split(self, length: int) -> int:
        """The most ranks that can share sequences of `length` tokens: 1 where a layer needs all tokens on one rank.

        Those are layers without attention (recurrences, convolutions), attention in both directions, and rotary frequencies
        that depend on the length.
        """
        forms = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        rotary = Rotary(
            0, {"rope_type": forms.get("type"), **forms} if isinstance(forms, Mapping) else {}, self._positions
        )
        try:
            limit = rotary.limit
        except ModelError:
            return 1
        kinds = ([t.name for t in self._by_layer.get(layer, [])] for layer in self.first)
        splits = self.is_causal and all(any(map(ATTENTION.search, names)) for names in kinds)
        return length if splits and (limit is None or length <= limit) else 1

    @cached_property
    def _positions(self) -> int:
        return config_number(self.config, "max_position_embeddings", "n_positions")

    @cached_property
    def is_causal(self) -> bool:
        """Whether tokens attend to earlier ones only."""
        return "MaskedLM" not in self.spec.architecture and not self.spec.family.startswith(("bert", "roberta"))

    @cached_property
    def has_rotary(self) -> bool:
        """Whether positions are rotations of queries and keys."""
        return not self.spec.positions and self.spec.family not in ("bloom", "mpt", "bert", "opt", "gpt2")

    @cached_property
    def is_parallel(self) -> bool:
        """Whether attention and MLP of a layer read the same hidden state."""
        default = self.spec.family in ("gpt_neox", "gptj", "phi", "cohere", "cohere2", "codegen")
        return bool(self.config.get("use_parallel_residual", self.config.get("parallel_attn", default)))

    @cached_property
    def is_partial(self) -> bool:
        """Whether only a part of each head is rotated."""
        share = self.config.get("partial_rotary_factor", self.config.get("rotary_pct"))
        share = {"gpt_neox": 0.25, "phi": 0.5, "stablelm": 0.25}.get(self.spec.family) if share is None else share
        return isinstance(share, int | float) and share < 1

    @cached_property
    def activation(self) -> str:
        """The name of the activation."""
        default = {"gpt2": "gelu_new", "opt": "relu", "gptj": "gelu_new", "phi": "gelu_new"}.get(
            self.spec.family, "silu"
        )
        named = next(
            (self.config[k] for k in ("hidden_act", "activation_function", "hidden_activation") if self.config.get(k)),
            0,
        )
        return str(named or default)

    def with_mtp(self, count: int) -> ModelCost:
        """The facts of the model with `count` prediction layers."""
        if count == 0 or mtp_count(self.spec) == count:
            return self
        key = ("mtp", count)
        if key not in self.cache:
            self.cache[key] = ModelCost(with_mtp(self.spec, count), self.rules)
        result: ModelCost = self.cache[key]
        return result

    @cached_property
    def mtp(self) -> int:
        """Prediction layers among the tensors."""
        return mtp_count(self.spec)

    def sliced(self, tp: int, ep: int = 1, etp: int | None = None) -> Sliced:
        """The model over `tp` tensor ranks, and its experts over `ep` groups of `etp` ranks.

        Experts that `ep` does not divide count as on the ranks with the most.

        Raises:
            PlanError: The model cannot be split so.
        """
        key = (tp, ep, tp if etp is None else etp)
        if key not in self._sliced:
            self._sliced[key] = self._slice(*key)
        return self._sliced[key]

    def _slice(self, tp: int, ep: int, etp: int) -> Sliced:
        shown = [*self.first, *range(self.spec.num_layers, self.spec.num_layers + self.mtp)]
        tensors = {t.name: t for layer in shown for t in self._by_layer.get(layer, [])}
        tensors |= {t.name: t for t in self._outside}
        spec = replace(
            self.spec, tensors=MappingProxyType({n: t for n, t in self.spec.tensors.items() if n in tensors})
        )
        modules, attention, cuts = resolve(spec, Mesh(tp=tp), self.rules)
        # Tokens are sent to their experts, but for experts within a tensor group, whose ranks have all tokens and sum outputs.
        sends = None if ep > 1 and ep * etp == tp else ep > 1
        if (ep, etp) != (1, tp):
            if ep > 1 and self.num_experts < ep:
                raise PlanError(
                    f"ep={ep} is more than the {self.num_experts} experts of {self.spec.family}. Use fewer."
                )
            cuts, modules = dict(cuts), dict(modules)
            others = resolve(spec, Mesh(tp=etp), self.rules) if etp > 1 else None
            for name in cuts:
                if self.is_expert(name):
                    path = name.rpartition(".")[0]
                    cuts[name] = self._expert_cut(
                        cuts[name] if others is None else others[2][name], tp, ep, others is None
                    )
                    modules.pop(path, None)
                    if others is not None and path in others[0]:
                        modules[path] = others[0][path]
        made: dict[Any, tuple[tuple[Layer, ...], Ends]] = {}
        found = []
        for rank in range(tp):
            # What a rank holds follows from its shapes and heads, which most ranks share.
            heads = tuple((one.local_heads(rank), one.local_kv_heads(rank)) for one in attention.values())
            key = heads, tuple(cut.local_shape(rank) for cut in cuts.values())
            if key not in made:
                made[key] = (
                    tuple(self._layer(layer, rank, modules, attention, cuts, etp / tp, sends=sends) for layer in shown),
                    self._ends(rank, modules, cuts),
                )
            found.append(made[key])
        return Sliced(tuple(layers for layers, _ in found), tuple(ends for _, ends in found))

    def is_expert(self, name: str) -> bool:
        """Whether a tensor is the weight of routed experts."""
        return ".experts." in name and len(self.spec.tensors[name].shape) >= 2

    def _expert_cut(self, cut: TensorPlan, tp: int, ep: int, whole: bool) -> TensorPlan:
        """The part of stacked experts that a rank holds: `1 / ep` of them, each split as `cut` says or `whole`."""
        shape = (ceil_div(self.spec.tensors[cut.name].shape[0], ep), *cut.shape[1:])
        if whole or cut.split is None:
            return TensorPlan(cut.name, shape)
        by_rank = tuple(cut.split.by_rank[rank % cut.split.parts] for rank in range(max(tp, cut.split.parts)))
        return TensorPlan(cut.name, shape, cut.dim, Split(cut.split.size, by_rank))

    # --- a layer ------------------------------------------------------------------------------------------------------

    def _layer(
        self,
        layer: int,
        rank: int,
        modules: Mapping[str, ModulePlan],
        attention: Mapping[str, AttentionPlan],
        cuts: Mapping[str, TensorPlan],
        share: float,
        *,
        sends: bool | None,
    ) -> Layer:
        prefix = f"{self.spec.layers}.{layer}."
        tensors = self._by_layer.get(layer, [])
        held = self._part(tensors, rank, cuts)
        products: list[Product] = []
        norms: list[int] = []
        head_norms = 0
        here = self._attention(layer, rank, prefix, attention, cuts)
        for tensor in tensors:
            path, _, leaf = tensor.name.rpartition(".")
            inner = path.removeprefix(prefix)
            if len(tensor.shape) == 1 and leaf == "weight":
                if _HEAD_NORM.search(inner) and here is not None and tensor.shape[0] <= here.key_width:
                    heads = here.heads if inner.rpartition(".")[2].startswith("q") else here.kv_heads
                    head_norms += heads * tensor.shape[0]
                elif _NORM.search(inner):
                    norms.append(tensor.shape[0])
            elif len(tensor.shape) >= 2 and not tensor.is_buffer and (leaf == "weight" or leaf.endswith("_proj")):
                products += self._product(tensor, inner, leaf, rank, modules.get(path), cuts[tensor.name], share)
        reduces, entries, gathers = self._collectives(products, prefix, modules, tensors)
        is_routed = any(p.is_routed for p in products)
        if is_routed and sends is None:
            reduces, entries = reduces + 1, entries + 1
        biased = any(t.name.endswith("bias") and len(t.shape) == 1 and _NORM.search(t.name) for t in tensors)
        return Layer(
            held, tuple(products), here, self._mlps(products), tuple(norms), head_norms, reduces, entries, gathers,
            not biased, self.is_parallel, self.hidden * self.chosen_experts * bool(is_routed and sends),
        )  # fmt: skip

    def _product(
        self,
        tensor: TensorSpec,
        inner: str,
        leaf: str,
        rank: int,
        module: ModulePlan | None,
        cut: TensorPlan,
        share: float,
    ) -> list[Product]:
        shape, local = tensor.shape, cut.local_shape(rank)
        style = module.style if module is not None else "replicate"
        rule = self.rules.find(tensor.name.rpartition(".")[0])
        style_in = rule.style if rule is not None else "replicate"
        if len(shape) == 3 and (leaf.startswith(("gate_up", "down", "up", "w1", "w2", "w3")) or "experts" in inner):
            # Fused experts: [E, 2 I, H] and [E, H, I], or with the last two dimensions exchanged.
            down = "down" in leaf
            hidden = self.hidden
            flip = (shape[1] == hidden) == down
            outputs, inputs = (local[1], local[2]) if flip else (local[2], local[1])
            whole = (shape[2], shape[1]) if flip else (shape[1], shape[2])
            style = ("row" if down else "column") if module is not None else "replicate"
            return [
                Product(
                    f"{inner}.{leaf}", inputs, outputs, style, f"{inner}.{'inner' if down else 'hidden'}",
                    local[0], self.chosen_experts, share, tensor.packed_bits, whole, "row" if down else "column", True,
                )
            ]  # fmt: skip
        if len(shape) != 2:
            return []
        transposed = module.transposed if module is not None else self._is_transposed(inner)
        outputs, inputs = (local[1], local[0]) if transposed else (local[0], local[1])
        whole = (shape[0], shape[1]) if transposed else (shape[1], shape[0])
        parent = inner.rpartition(".")[0]
        if "row" in (style, style_in):
            source = f"{inner}.inner"
        else:
            source = f"{parent if ATTENTION.search(inner) else 'mlp'}.{whole[0]}"
        return [Product(inner, inputs, outputs, style, source, 1, 1, 1.0, tensor.packed_bits, whole, style_in)]

    def _is_transposed(self, inner: str) -> bool:
        """Whether a weight is [in, out] (transformers' Conv1D), for modules that no rank splits."""
        return self.spec.family == "gpt2" and inner.endswith(("c_attn", "c_proj", "c_fc"))

    def _attention(
        self,
        layer: int,
        rank: int,
        prefix: str,
        attention: Mapping[str, AttentionPlan],
        cuts: Mapping[str, TensorPlan],
    ) -> Attention | None:
        tensors = self.spec.tensors
        paths = [name for name in (t.name for t in self._by_layer.get(layer, [])) if ATTENTION.search(name)]
        if not paths or not self.spec.num_heads:
            return None
        plan = next((found for path, found in attention.items() if path.startswith(prefix)), None)
        heads = plan.local_heads(rank) if plan else self.spec.num_heads
        kv_heads = plan.local_kv_heads(rank) if plan else self.spec.num_kv_heads
        latent_rank = config_number(self.config, "kv_lora_rank")
        rope = config_number(self.config, "qk_rope_head_dim")
        if latent_rank and any("kv_a_proj" in name for name in paths):
            key = rope + config_number(self.config, "qk_nope_head_dim")
            value = config_number(self.config, "v_head_dim")
            return Attention(heads, heads, key, value, self.window_of(layer), latent_rank + rope, self.is_causal)
        width = self.head_width
        queries = next((n for n in paths if n.endswith(("q_proj.weight", "query.weight"))), None)
        if queries is not None and len(tensors[queries].shape) == 2:
            width = tensors[queries].shape[0] // self.spec.num_heads
        if (
            f"{'q_proj'}" in (queries or "")
            and tensors[queries or ""].shape[0] == 2 * self.head_width * self.spec.num_heads
        ):
            width = self.head_width  # half of the outputs are a gate (Qwen3-Next)
        fused = queries is None and not any("k_proj" in name or "key.weight" in name for name in paths)
        return Attention(
            heads,
            kv_heads,
            width,
            width,
            self.window_of(layer),
            0,
            self.is_causal,
            self.has_rotary,
            fused,
            self.is_partial,
        )

    def _mlps(self, products: list[Product]) -> tuple[Mlp, ...]:
        """The activations: before each product that reads what another of its parent computes."""
        found = []
        for down in products:
            if ATTENTION.search(down.name) or down.outputs != self.hidden or down.unsplit[1] != self.hidden:
                continue
            parent = down.name.rpartition(".")[0]
            ups = [
                p
                for p in products
                if p is not down and p.name.rpartition(".")[0] == parent and p.experts == down.experts
            ]
            outputs = sum(p.outputs for p in ups if p.unsplit[0] == self.hidden and p.unsplit[1] >= down.unsplit[0])
            if outputs >= down.inputs:
                found.append(Mlp(down.inputs, outputs >= 2 * down.inputs, down.chosen * down.share, self.activation))
        return tuple(found)

    def _collectives(
        self, products: list[Product], prefix: str, modules: Mapping[str, ModulePlan], tensors: list[TensorSpec]
    ) -> tuple[int, int, int]:
        rows = {p.name.rpartition(".")[0] if p.is_routed else p.name for p in products if p.style == "row"}
        entries = {p.source for p in products if p.style == "column" and not self._gathers(prefix, p, modules)}
        gathers = sum(p.unsplit[1] for p in products if self._gathers(prefix, p, modules))
        split_inputs = sum(
            p.unsplit[0] for p in products if p.style == "row" and self._splits_input(prefix, p, modules)
        )
        return len(rows), len(entries), gathers + split_inputs * 0

    @staticmethod
    def _gathers(prefix: str, product: Product, modules: Mapping[str, ModulePlan]) -> bool:
        module = modules.get(prefix + product.name)
        return module is not None and module.gather_output

    @staticmethod
    def _splits_input(prefix: str, product: Product, modules: Mapping[str, ModulePlan]) -> bool:
        module = modules.get(prefix + product.name)
        return module is not None and module.split_input

    # --- what a rank holds --------------------------------------------------------------------------------------------

    def _part(self, tensors: Iterable[TensorSpec], rank: int, cuts: Mapping[str, TensorPlan]) -> Part:
        parameters = matrices = lora = experts = 0
        bits = unpacked = 0.0
        for tensor in tensors:
            numel = cuts[tensor.name].local_numel(rank)
            bits += numel * self.spec.bits_of(tensor)
            unpacked += numel * self.spec.bits_of(tensor, unpacked=True)
            if tensor.is_buffer:
                continue
            parameters += numel
            experts += numel if self.is_expert(tensor.name) else 0
            shape = cuts[tensor.name].local_shape(rank)
            if self.spec.layer_of(tensor.name) is not None:
                if len(shape) == 2 or (len(shape) == 3 and ".experts." in tensor.name):
                    matrices += numel
                if len(shape) == 2 and tensor.name.endswith(".weight"):
                    lora += sum(shape)
        return Part(parameters, bits, unpacked, matrices, lora, experts)

    def _ends(self, rank: int, modules: Mapping[str, ModulePlan], cuts: Mapping[str, TensorPlan]) -> Ends:
        placed = self._placed
        norm = [t for t in placed["loss"] if self.spec.prefix and t.name.startswith(self.spec.prefix)]

        def part(*groups: list[TensorSpec]) -> Part:
            tensors = list({t.name: t for group in groups for t in group}.values())
            names = {t.name for t in tensors}
            return self._part([t for t in tensors if t.tied_to not in names], rank, cuts)

        return Ends(
            part(placed["embedding"]),
            part(placed["loss"]),
            part(placed["embedding"], placed["loss"]),
            part([t for t in placed["embedding"] if not self.spec.is_in_tower(t.name)], norm),
            part([t for t in placed["embedding"] if not self.spec.is_in_tower(t.name)], placed["loss"]),
            self._head(rank, modules, cuts),
            sum(t.shape[0] for t in placed["loss"] if len(t.shape) == 1 and t.name.endswith(".weight")),
            not any(len(t.shape) == 1 and t.name.endswith(".bias") and _NORM.search(t.name) for t in placed["loss"]),
        )

    def _head(self, rank: int, modules: Mapping[str, ModulePlan], cuts: Mapping[str, TensorPlan]) -> Product | None:
        vocabulary = self.spec.vocab_size
        for tensor in reversed(self._placed["loss"]):
            if len(tensor.shape) == 2 and tensor.shape[0] >= vocabulary > 0:
                local = cuts[tensor.name].local_shape(rank)
                style = "column" if local != tensor.shape else "replicate"
                whole = (tensor.shape[1], tensor.shape[0])
                return Product("head", local[1], local[0], style, "head", bits=tensor.packed_bits, unsplit=whole)
        return None

    @cached_property
    def _placed(self) -> dict[str, list[TensorSpec]]:
        """Tensors outside the layers: with the embedding or with the loss."""
        layout = PipelineParallelLayerLayout("E" + "t" * self.spec.num_layers + "L", 1)
        plan = Plan(self.spec, Mesh(), layout, Rules(()), {}, {}, {})
        found: dict[str, list[TensorSpec]] = {"embedding": [], "loss": []}
        for tensor in self._outside:
            first = self.spec.is_in_tower(tensor.name) or plan.is_before_layers(tensor.name)
            found["embedding" if first else "loss"].append(tensor)
        return found


@lru_cache(maxsize=32)
def _model_cost(spec: ModelSpec) -> ModelCost:
    return ModelCost(spec)


def _hidden_of(spec: ModelSpec) -> int:
    """The width of the hidden state, from the widest norm of a model without a config."""
    widths = [t.shape[0] for t in spec.tensors.values() if len(t.shape) == 1]
    return max(widths, default=0)
