"""mlx-lm's LoRA adapters of a split model: add, find and merge them; and where each part is stored in peft's format.

mlx-lm stores `lora_a [in, rank]` and `lora_b [rank, out]`, peft `lora_A [rank, in]` and `lora_B [out, rank]`.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from partita.core.plan import Plan
from partita.core.sharding.cuts import TensorPlan
from partita.core.sharding.split import Split
from partita.errors import ModelError
from partita.mlx.collectives.collective_errors import collective_errors
from partita.mlx.collectives.groups import ParallelGroups
from partita.mlx.layers.embedding import VocabParallelEmbedding
from partita.mlx.layers.inner import copy_module, is_quantized, slice_array
from partita.mlx.layers.linear import ColumnParallelLinear, RowParallelLinear
from partita.mlx.layers.lora import Style, split_axis
from partita.mlx.layers.region_parts import EntersRegion
from partita.mlx.mlx_lm_internals import STACKS, lora_layer
from partita.mlx.model.modes import random_state_kept
from partita.mlx.model.parts import INNER_NAMES, Ranges, parameter_homes, plan_of, unsplit_modules
from partita.mlx.model.tree import Home, get_module, named_modules, set_module
from partita.mlx.weights.names import Box
from partita.mlx.weights.origin import Origin
from partita.training.adapter_files import Side, is_target, lora_alpha, name_on_disk, refuse_unmatched

_ROUTERS = ("gate", "router")
"""Name of a linear layer beside stacked experts that is not a layer in transformers, so peft cannot adapt it."""


@random_state_kept()
def add_lora(
    model: nn.Module,
    rank: int,
    *,
    alpha: float | None = None,
    seed: int = 0,
    targets: Collection[str] | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
) -> list[str]:
    """Add mlx-lm's LoRA to linear layers inside the layers of a split model and freeze all other parameters.

    Every rank calls it; the unsplit adapters depend only on the seed. They have the dtype of the weights.

    Args:
        model: What `load`, `shard` or `fresh` made; it may be quantized.
        rank: Rank of the adapters.
        alpha: The scale is `alpha / rank` (default scale: 1).
        seed: Seed of `lora_a`; `lora_b` is zero, so that at first nothing changes.
        targets: Names of the layers to adapt, such as `q_proj` or `self_attn.q_proj` (default: all).
        dropout: Only 0 works on MLX.
        rslora: Whether the scale is `alpha / sqrt(rank)` (default: `alpha / rank`).
        dora: Only False works on MLX.

    Returns:
        Paths of this rank's adapted layers.

    Raises:
        ModelError: The model has no linear layer to adapt, none of a name in `targets`, or one that is not a single tensor on
            disk; or `dropout` or `dora` is given.

    Examples:
        >>> model = pm.load("./model", tp=2)
        >>> pm.add_lora(model, rank=4, seed=0)[0]
        'model.layers.0.self_attn.q_proj'
    """
    plan, groups = plan_of(model)
    if type(rank) is not int or rank < 1:
        raise ModelError(f"the rank of LoRA must be an integer of at least 1; got {rank!r}.")
    if dropout or dora:
        raise ModelError(
            f"on MLX LoRA has no {'dropout' if dropout else 'DoRA'}. Leave it out, or use the torch engine."
        )
    alpha = lora_alpha(rank, alpha, rslora=rslora)
    with collective_errors(groups):
        on_disk = paths_on_disk(model)
        linears = {path: home for path, home in _linears(model, plan).items() if is_target(path, targets)}
        for path in linears:
            _on_disk(on_disk, path)
    everywhere = [path for paths in groups.pp.all_gather_object(list(linears)) for path in paths]
    refuse_unmatched(targets, everywhere, plan.spec)
    model.freeze()
    for path, (holder, key) in linears.items():
        inner = holder[key]
        adapter: Any = lora_layer().from_base(inner, r=rank, scale=(alpha if alpha is not None else rank) / rank)
        dtype = inner["scales"].dtype if is_quantized(inner) else inner["weight"].dtype
        dtype = dtype if mx.issubdtype(dtype, mx.floating) else mx.float32
        inputs = holder.split if isinstance(holder, RowParallelLinear) else Split.even(adapter["lora_a"].shape[0], 1)
        part = groups.tp.rank if isinstance(holder, RowParallelLinear) else 0
        whole = _draw(inputs.size, rank, seed ^ zlib.crc32(path.encode()))
        adapter.lora_b = adapter["lora_b"].astype(dtype)
        holder[key] = adapter
        # Fitting it to the split sampled numbers that depend on the split.
        adapter.lora_a = slice_array(whole, 0, inputs.ranges(part)).astype(dtype)
        mx.eval(adapter["lora_a"], adapter["lora_b"])
    return list(linears)


def _draw(inputs: int, rank: int, seed: int) -> mx.array:
    bound = 1 / math.sqrt(inputs)
    return mx.random.uniform(-bound, bound, (inputs, rank), key=mx.random.key(seed))


def _linears(model: nn.Module, plan: Plan) -> dict[str, Home]:
    """The linear layers inside the layers: maps the unsplit path to the parent and the key."""
    modules = unsplit_modules(model)
    found: dict[str, Home] = {}
    for path, module in modules.items():
        if plan.spec.layer_of(path) is None or _is_router(path, modules):
            continue
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            found[path] = module, "linear"
        elif isinstance(module, EntersRegion) and isinstance(module["inner"], nn.Linear | nn.QuantizedLinear):
            found[path] = module, "inner"
        elif isinstance(module, nn.Linear | nn.QuantizedLinear):
            parent, _, name = path.rpartition(".")
            holder = modules[parent] if parent in modules else get_module(model, parent)
            while type(holder) in INNER_NAMES:
                holder = holder[INNER_NAMES[type(holder)]]
            found[path] = holder, int(name) if isinstance(holder, list) else name
    return found


def _is_router(path: str, modules: Mapping[str, nn.Module]) -> bool:
    parent, _, name = path.rpartition(".")
    if name not in _ROUTERS:
        return False
    beside = {type(module).__name__ for one, module in modules.items() if one.rpartition(".")[0] == parent}
    return bool(beside & {*STACKS, "SplitExperts"})


@contextlib.contextmanager
def removed_on_error(model: nn.Module) -> Iterator[None]:
    """Remove the adapters that are added inside the context, and freeze as before, if an error ends it."""
    frozen = [(module, set(module._no_grad)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for holder, key, adapter in adapters(model):
            holder[key] = adapter["linear"]
        for module, names in frozen:
            module._no_grad = names
        raise


def merge_lora(model: nn.Module) -> None:
    """Merge every LoRA adapter into its base weight and remove it. No communication.

    A quantized weight is quantized again.

    Examples:
        >>> model = pm.load("./model", tp=2)
        >>> paths = pm.add_lora(model, rank=4, seed=0)
        >>> pm.merge_lora(model)  # after training; the model can be saved again
    """
    for holder, key, adapter in adapters(model):
        inner = adapter["linear"]
        fused = adapter.fuse()
        mx.eval(fused.parameters())
        for name in ("weight", "scales", "biases"):
            if name in inner and inner[name] is not None:
                inner[name] = fused[name]
        holder[key] = inner


def adapters(model: nn.Module) -> list[tuple[Any, Any, nn.Module]]:
    """mlx-lm's adapters on this rank: the parent, the key, and the adapter."""
    found: list[tuple[Any, Any, nn.Module]] = []

    def walk(node: Any) -> None:
        for key, child in list(node.items() if isinstance(node, dict) else enumerate(node)):
            if isinstance(child, nn.Module) and "lora_a" in child:
                found.append((node, key, child))
            elif isinstance(child, dict | list):
                walk(child)

    walk(model)
    return found


def take_off(model: nn.Module) -> dict[str, nn.Module]:
    """Replace each adapter of an unsplit model by the layer that it adapts, and return the adapters by those layers' paths.

    The model is then planned and split as without them, and `put_back` splits the adapters. If any adapter is not mlx-lm's LoRA
    or DoRA of a linear layer or embedding, all adapters stay, and each layer is split by itself.
    """
    found = {path: module for path, module in named_modules(model).items() if "lora_a" in module}
    if any(not _is_known(adapter) for adapter in found.values()):
        return {}
    for path, adapter in found.items():
        set_module(model, path, adapter["embedding" if "embedding" in adapter else "linear"])
    return found


def _is_known(adapter: nn.Module) -> bool:
    inner = adapter.get("linear", adapter.get("embedding"))
    own = {name for name, _ in tree_flatten(adapter.parameters()) if not name.startswith(("linear.", "embedding."))}
    kinds = nn.Linear | nn.QuantizedLinear | nn.Embedding | nn.QuantizedEmbedding
    return isinstance(inner, kinds) and own <= {"lora_a", "lora_b", "m"} and adapter["lora_a"].ndim == 2


def put_back(model: nn.Module, taken: Mapping[str, nn.Module], tp_rank: int) -> None:
    """Add this rank's part of each adapter that `take_off` returned to its layer of the split model.

    Args:
        model: The split model; layers of other stages get no adapter.
        taken: The unsplit adapters by path.
        tp_rank: The tensor rank.
    """
    modules = unsplit_modules(model)
    for path, whole in taken.items():
        layer = modules.get(path)
        holder, key = _holder(model, path, layer)
        if holder is None:
            continue
        adapter = copy_module(whole)
        if isinstance(layer, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
            style = _style(layer)
            for name in ("lora_a", "lora_b", "m"):
                axis = split_axis(style, name)
                if name in adapter and axis is not None:
                    adapter[name] = slice_array(adapter[name], axis, layer.split.ranges(tp_rank))
            # Every rank has an equal unsplit model, so the replicated parts are equal already.
            adapter._is_adopted = True
        adapter["embedding" if "embedding" in adapter else "linear"] = holder[key]
        holder[key] = adapter


def _holder(model: nn.Module, path: str, layer: Any) -> tuple[Any, Any]:
    """The module that holds the plain layer at a path of the unsplit model, and its key; (None, None) if this rank lacks it."""
    kinds = nn.Linear | nn.QuantizedLinear | nn.Embedding | nn.QuantizedEmbedding
    if type(layer) in INNER_NAMES:
        key = INNER_NAMES[type(layer)]
        return (layer, key) if isinstance(layer[key], kinds) else (None, None)
    if not isinstance(layer, kinds):
        return None, None
    parent, _, name = path.rpartition(".")
    holder = unsplit_modules(model).get(parent) or get_module(model, parent)
    while type(holder) in INNER_NAMES:
        holder = holder[INNER_NAMES[type(holder)]]
    return holder, int(name) if isinstance(holder, list) else name


def _style(layer: nn.Module) -> Style:
    if isinstance(layer, VocabParallelEmbedding):
        return "vocab"
    return "column" if isinstance(layer, ColumnParallelLinear) else "row"


@dataclass(frozen=True)
class AdapterPlaces:
    """The adapters' arrays on this rank, by unsplit name.

    Attributes:
        homes: The module and key of each.
        boxes: The box of each on disk, where it is transposed.
        shapes: The unsplit shape of each.
        held: The ranges that this rank holds.
        owned: The ranges that this rank writes.
    """

    homes: Mapping[str, Home]
    boxes: Mapping[str, tuple[Box, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    held: Mapping[str, Ranges]
    owned: Mapping[str, Ranges]


def adapter_places(model: nn.Module) -> AdapterPlaces:
    """Find the adapters of a split model, in memory and on disk.

    Raises:
        ModelError: Some are not plain LoRA, or adapt a layer that is not a single tensor on disk.
    """
    _, groups = plan_of(model)
    kept = {id(adapter) for _, _, adapter in adapters(model)}
    homes = {name: home for name, home in parameter_homes(model).items() if id(home[0]) in kept}
    modules, on_disk = unsplit_modules(model), paths_on_disk(model)
    boxes, shapes, held, owned = {}, {}, {}, {}
    for name, (home, key) in homes.items():
        if key not in ("lora_a", "lora_b"):
            raise ModelError(f"{name} is not part of a plain LoRA adapter. Only plain LoRA can be saved.")
        path, side = name.rpartition(".")[0], _SIDES[key]
        cut = _cut(name, tuple(home[key].shape), modules[path], groups)
        boxes[name] = (Box(name_on_disk(_on_disk(on_disk, path), side), (0, 0), cut.shape, (1, 0), (0, 0)),)
        shapes[name], held[name], owned[name] = cut.shape, cut.ranges(groups.tp.rank), cut.owned_ranges(groups.tp.rank)
    return AdapterPlaces(homes, boxes, shapes, held, owned)


_SIDES: Mapping[str, Side] = {"lora_a": "A", "lora_b": "B"}


def _cut(name: str, shape: tuple[int, ...], layer: nn.Module, groups: ParallelGroups) -> TensorPlan:
    """The `TensorPlan` of an adapter's array, which follows its layer."""
    if groups.tp.size == 1 or not isinstance(layer, ColumnParallelLinear | RowParallelLinear):
        return TensorPlan(name, shape)
    axis = split_axis("column" if isinstance(layer, ColumnParallelLinear) else "row", name.rpartition(".")[2])
    if axis is None:
        return TensorPlan(name, shape)
    return TensorPlan(name, (*shape[:axis], layer.split.size, *shape[axis + 1 :]), axis, layer.split)


def paths_on_disk(model: nn.Module) -> dict[str, str]:
    """Names in the model's checkpoint of modules whose weight is a single tensor there."""
    origin: Origin = model.partita_origin
    found = {}
    for name, boxes in origin.boxes().items():
        there = boxes[0].name if len(boxes) == 1 else ""
        is_whole = bool(there) and math.prod(origin.shape(boxes[0])) == math.prod(boxes[0].shape)
        if is_whole and name.endswith(".weight") and there.endswith(".weight"):
            found[name.removesuffix(".weight")] = there.removesuffix(".weight")
    return found


def _on_disk(paths: Mapping[str, str], path: str) -> str:
    if path not in paths:
        raise ModelError(f"{path} is not a single tensor on disk, so its adapter would have no name there.")
    return paths[path]
