"""From rules to splits: the dimension and the ranges of each tensor of a model that is split over the tensor axis."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from types import MappingProxyType

from partita.core.mesh import Mesh
from partita.core.model.spec import ModelSpec, TensorSpec, config_number, text_config
from partita.core.sharding.cuts import AttentionPlan, ModulePlan, TensorPlan, kv_expansion
from partita.core.sharding.experts import check_experts, experts_of, refuse_without_experts, split_experts
from partita.core.sharding.rules import Rule, Rules, isolate
from partita.core.sharding.split import Split
from partita.errors import PlanError

Resolved = tuple[Mapping[str, ModulePlan], Mapping[str, AttentionPlan], Mapping[str, TensorPlan]]


def resolve(spec: ModelSpec, mesh: Mesh, rules: Rules) -> Resolved:
    """Split every module and tensor of `spec` over the tensor ranks of `mesh`, or experts over `ep`, by `rules`.

    A dimension with fewer units than ranks is not split; if it is the heads, each projection of the attention is split by
    itself instead, so that its memory is still distributed.
    """
    check_experts(mesh)
    text = [path for path in spec.modules if (mesh.tp > 1 or mesh.ep > 1) and not spec.is_in_tower(path)]
    found = {path: rules.find(path) or _rule_of_tied_head(spec, path, rules) for path in text}
    resolver = _Resolver(spec, mesh, _heads_together(spec, found))
    for path, rule in found.items():
        if rule is not None and (mesh.tp > 1 or rule.style == "experts"):
            resolver.add(path, rule)
    if mesh.ep > 1:
        refuse_without_experts(spec, mesh, resolver.modules)
    resolver.follow_ties()
    cuts = {name: resolver.cuts.get(name, TensorPlan(name, t.shape)) for name, t in spec.tensors.items()}
    return MappingProxyType(resolver.modules), MappingProxyType(resolver.attention), MappingProxyType(cuts)


def _rule_of_tied_head(spec: ModelSpec, path: str, rules: Rules) -> Rule | None:
    """The rule of a linear layer without its own rule whose weight is tied to a split embedding (`vocab_projector`)."""
    weight = spec.tensors.get(f"{path}.weight")
    if weight is None or weight.tied_to is None or path not in (spec.linears or ()):
        return None
    rule = rules.find(weight.tied_to.rpartition(".")[0])
    return rule if rule is not None and rule.style == "vocab" else None


def _heads_together(spec: ModelSpec, rules: Mapping[str, Rule | None]) -> int:
    """The number of adjacent heads that must stay together, since their outputs share quantization groups of the next layer."""
    together = 1
    for path, rule in rules.items():
        weight = spec.tensors.get(f"{path}.weight")
        if rule is None or weight is None or rule.style != "row" or rule.over != "heads" or not spec.num_heads:
            continue
        inputs = weight.shape[0 if rule.transposed else -1]
        # Only dimensions that are a multiple of the group are quantized.
        if inputs % spec.quantization_group == 0 and inputs % spec.num_heads == 0:
            width = inputs // spec.num_heads
            together = math.lcm(together, spec.quantization_group // math.gcd(width, spec.quantization_group))
    return together


class _Resolver:
    def __init__(self, spec: ModelSpec, mesh: Mesh, together: int) -> None:
        self.spec = spec
        self.mesh = mesh
        self.tp = mesh.tp
        self.together = together
        self.modules: dict[str, ModulePlan] = {}
        self.attention: dict[str, AttentionPlan] = {}
        self.cuts: dict[str, TensorPlan] = {}

    def add(self, path: str, rule: Rule) -> None:
        tensors = {t.name.rpartition(".")[2]: t for t in self.spec.module_tensors(path)}
        if rule.over in ("heads", "kv_heads", "qkv", "qkv_by_head") and rule.style in ("column", "row"):
            if not self.spec.num_heads:
                raise PlanError(
                    f"{path}: the config has no number of attention heads, so they cannot be split. For a module without a "
                    "config pass num_heads=... to shard()."
                )
            if self._too_few_heads(rule):
                rule = isolate(rule)
        if rule.style == "replicate":
            self._replicate(path, rule, tensors)
        elif rule.style == "experts":
            self._experts(path, rule, tensors)
        elif rule.style == "head":
            self._head(rule, tensors)
        elif "weight" in tensors and len(tensors["weight"].shape) in (2, 3):
            self._linear(path, rule, tensors)
        elif rule.style != "vocab" or "weight" in tensors:
            # (A module named like a head may hold only a bias, beside the linear layer that is the head.)
            shapes = ", ".join(f"{name} {t.shape}" for name, t in tensors.items())
            raise PlanError(
                f"{path}: the style {rule.style} needs a weight of two dimensions, or of three where layers are stacked, but "
                f"it holds {shapes}."
            )

    def _too_few_heads(self, rule: Rule) -> bool:
        if rule.over == "qkv_by_head" and self.spec.num_kv_heads != self.spec.num_heads:
            raise PlanError(
                f"rule {rule.pattern!r}: qkv_by_head needs as many KV heads as heads, but there are "
                f"{self.spec.num_kv_heads} and {self.spec.num_heads}."
            )
        return not self._has_heads

    @property
    def _has_heads(self) -> bool:
        """Whether every rank can have its own heads."""
        return self.spec.num_heads % self.together == 0 and self.spec.num_heads // self.together >= self.tp

    def _replicate(self, path: str, rule: Rule, tensors: Mapping[str, TensorSpec]) -> None:
        copies = config_number(text_config(self.spec.config), rule.copy_output) if rule.copy_output else 0
        if copies and self._has_heads:
            self.modules[path] = ModulePlan(path, "replicate", copy_output=copies)
        if rule.partial_grad and self._has_heads:
            for tensor in tensors.values():
                self.cuts[tensor.name] = TensorPlan(tensor.name, tensor.shape, partial_grad=True)

    def _linear(self, path: str, rule: Rule, tensors: Mapping[str, TensorSpec]) -> None:
        weight = tensors["weight"]
        out_dim, in_dim = len(weight.shape) - 2, len(weight.shape) - 1
        if rule.transposed:
            out_dim, in_dim = in_dim, out_dim
        dim = in_dim if rule.style in ("row", "embedding") else out_dim
        split = self._split(path, rule, weight.shape[dim])
        if split is None:
            return
        expand, width = _expand(rule, self.spec, self.tp, split.size, self.together)
        self.modules[path] = ModulePlan(
            path,
            rule.style,
            split,
            rule.gather_output,
            rule.split_input,
            rule.transposed,
            expand=expand,
            expand_width=width,
        )
        copies = not split.is_partition
        self.cuts[weight.name] = TensorPlan(weight.name, weight.shape, dim, split, partial_grad=copies)
        bias = tensors.get("bias")
        if bias is not None and rule.style in ("column", "vocab"):
            self.cuts[bias.name] = TensorPlan(bias.name, bias.shape, len(bias.shape) - 1, split, partial_grad=copies)
        if rule.style == "column" and rule.over in ("heads", "qkv", "qkv_by_head"):
            parent = path.rpartition(".")[0]
            self.attention[parent] = _attention(
                parent, self.spec.num_heads, self.spec.num_kv_heads, self.tp, self.together
            )

    def _split(self, path: str, rule: Rule, size: int) -> Split | None:
        heads, kv_heads, tp = self.spec.num_heads, self.spec.num_kv_heads, self.tp
        units = {"heads": heads, "kv_heads": kv_heads, "qkv": heads + 2 * kv_heads, "qkv_by_head": heads, "gate_up": 2}
        unit = units.get(rule.over, 1)
        if unit and size % unit:
            raise PlanError(
                f"{path}: its {size} {'inputs' if rule.style == 'row' else 'outputs'} are not a multiple of {unit}, as "
                f"`{rule.over}` with {heads} heads and {kv_heads} KV heads needs. Its rule does not fit this model."
            )
        if rule.over == "features":
            return self._even(size, 1 if rule.style == "vocab" or rule.gather_output else self.spec.quantization_group)
        if rule.over == "gate_up":
            half = self._even(size // 2, self.spec.quantization_group)
            return Split.concat([half, half]) if half is not None else None
        width = size // unit
        queries = _heads(heads, kv_heads, tp, width, self.together)
        keys = _kv_heads(heads, kv_heads, tp, width, self.together)
        return {"heads": queries, "qkv_by_head": queries, "kv_heads": keys}.get(rule.over) or Split.concat(
            [queries, keys, keys]
        )

    def _even(self, size: int, group: int) -> Split | None:
        """`size` distributed in quantization groups; None if there are fewer than ranks."""
        # A dimension that is not a multiple of the group is not quantized.
        unit = group if size % group == 0 else 1
        return _even(size, self.tp, unit=unit) if size // unit >= self.tp else None

    def _head(self, rule: Rule, tensors: Mapping[str, TensorSpec]) -> None:
        for tensor in tensors.values():
            heads, dim = self.spec.num_heads, len(tensor.shape) - 1 if rule.transposed else 0
            if tensor.shape and self._has_heads and tensor.shape[dim] % heads == 0:
                split = _heads(heads, self.spec.num_kv_heads, self.tp, tensor.shape[dim] // heads, self.together)
                self.cuts[tensor.name] = TensorPlan(tensor.name, tensor.shape, dim, split)

    def _experts(self, path: str, rule: Rule, tensors: Mapping[str, TensorSpec]) -> None:
        """Fused experts `[E, 2I, H]` and `[E, H, I]`: I is split, or with ep the E, or both. Others are replicated."""
        if self.mesh.ep > 1:
            split = experts_of(path, tensors, self.mesh)
            cuts = {t.name: TensorPlan(t.name, t.shape, 0, split, axis="ep") for t in tensors.values()}
            if self.mesh.expert_tp > 1:
                alone = _Resolver(self.spec, Mesh(tp=self.mesh.expert_tp), self.together)
                alone._experts(path, rule, tensors)
                whole = {t.name: TensorPlan(t.name, t.shape) for t in tensors.values()}
                cuts = split_experts(path, {**whole, **alone.cuts}, split, self.mesh)
            self.modules[path] = ModulePlan(path, "experts", split, distributed=True)
            self.cuts.update(cuts)
            return
        if rule.over == "gate_up_pairs":
            self._experts_of_pairs(path, tensors)
            return
        up, down = tensors.get("gate_up_proj"), tensors.get("down_proj")
        if up is None or down is None or set(tensors) != {"gate_up_proj", "down_proj"} or len(up.shape) != 3:
            return
        inner = down.shape[2]
        if up.shape[1:] != (2 * inner, down.shape[1]) or inner < self.tp:
            return
        split = _even(inner, self.tp, unit=self._experts_unit(inner))
        self.modules[path] = ModulePlan(path, "experts", split)
        self.cuts[up.name] = TensorPlan(up.name, up.shape, 1, Split.concat([split, split]))
        self.cuts[down.name] = TensorPlan(down.name, down.shape, 2, split)

    def _experts_of_pairs(self, path: str, tensors: Mapping[str, TensorSpec]) -> None:
        """Experts `[E, H, 2I]`, whose columns 2i and 2i + 1 are gate and up, `[E, I, H]`, and biases of both: I is split."""
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        count, inner, hidden = shapes.get("down_proj", (0, 0, 0))
        expected = {
            "gate_up_proj": (count, hidden, 2 * inner), "gate_up_proj_bias": (count, 2 * inner),
            "down_proj": (count, inner, hidden), "down_proj_bias": (count, hidden),
        }  # fmt: skip
        if shapes != expected or inner < self.tp:
            return
        unit = self._experts_unit(inner)
        split, pairs = _even(inner, self.tp, unit=unit), _even(2 * inner, self.tp, unit=2 * unit)
        self.modules[path] = ModulePlan(path, "experts", split)
        for name, dim, held in (("gate_up_proj", 2, pairs), ("gate_up_proj_bias", 1, pairs), ("down_proj", 1, split)):
            self.cuts[tensors[name].name] = TensorPlan(tensors[name].name, shapes[name], dim, held)
        # One rank adds it, so only that rank sees its gradient.
        bias = tensors["down_proj_bias"]
        self.cuts[bias.name] = TensorPlan(bias.name, bias.shape, partial_grad=True)

    def _experts_unit(self, inner: int) -> int:
        """Grouped kernels need rows of multiples of 16 bytes: eight elements of the narrowest dtype."""
        return 8 if inner % 8 == 0 and inner // 8 >= self.tp else 1

    def follow_ties(self) -> None:
        """Split a tied tensor like the one that it shares memory with."""
        for name, tensor in self.spec.tensors.items():
            if tensor.tied_to is None:
                continue
            mine, other = self.cuts.get(name), self.cuts.get(tensor.tied_to)
            if mine is not None and other is None and len(tensor.shape) == 1:
                # A bias that its module holds for another module (BERT's `cls.predictions.bias`) and does not use itself.
                self.cuts[tensor.tied_to] = replace(mine, name=tensor.tied_to)
            elif mine is None or other is None:
                # If one of the two cannot be split, neither is.
                self._leave_whole(name)
                self._leave_whole(tensor.tied_to)
            elif (mine.dim, mine.split, mine.axis) != (other.dim, other.split, other.axis):
                raise PlanError(
                    f"{name} shares its memory with {tensor.tied_to}, but the rules split the two in different ways. "
                    "Give both the same style, e.g. vocab."
                )

    def _leave_whole(self, name: str) -> None:
        path = name.rpartition(".")[0]
        self.modules.pop(path, None)
        for tensor in self.spec.module_tensors(path):
            self.cuts.pop(tensor.name, None)


def _attention(path: str, heads: int, kv_heads: int, tp: int, together: int) -> AttentionPlan:
    return AttentionPlan(
        path, heads, kv_heads, _heads(heads, kv_heads, tp, 1, together), _kv_heads(heads, kv_heads, tp, 1, together)
    )


def _expand(
    rule: Rule, spec: ModelSpec, tp: int, size: int, together: int
) -> tuple[tuple[tuple[int, ...] | None, ...], int]:
    """The local output blocks that a projection of keys and values must repeat on each rank, and their width."""
    if rule.style != "column" or rule.over not in ("kv_heads", "qkv"):
        return (), 0
    attention = _attention("", spec.num_heads, spec.num_kv_heads, tp, together)
    expansion = kv_expansion(spec.num_heads // spec.num_kv_heads, attention.heads)
    if not any(expansion):
        return (), 0
    if rule.over == "kv_heads":
        return expansion, size // spec.num_kv_heads
    fused: list[tuple[int, ...] | None] = []
    for rank, positions in enumerate(expansion):
        if positions is None:
            fused.append(None)
            continue
        queries, keys = attention.heads.local_size(rank), attention.kv_heads.local_size(rank)
        starts = (queries, queries + keys)
        fused.append((*range(queries), *(start + position for start in starts for position in positions)))
    return tuple(fused), size // (spec.num_heads + 2 * spec.num_kv_heads)


_even = cache(Split.even)


@cache
def _heads(heads: int, kv_heads: int, tp: int, width: int, together: int) -> Split:
    return Split.heads(heads, kv_heads, tp, width=width, unit=together)


@cache
def _kv_heads(heads: int, kv_heads: int, tp: int, width: int, together: int) -> Split:
    return Split.kv_heads(heads, kv_heads, tp, width=width, unit=together)
