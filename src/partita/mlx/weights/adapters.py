"""mlx-lm's LoRA and DoRA adapters of a split model: add new ones, and split those of an unsplit model."""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from partita.core.plan import Plan
from partita.core.sharding.split import Split
from partita.errors import ModelError
from partita.mlx.collectives.collective_errors import collective_errors
from partita.mlx.collectives.comm import Communicator
from partita.mlx.collectives.groups import ParallelGroups
from partita.mlx.layers.dropout import AdapterDropout
from partita.mlx.layers.embedding import VocabParallelEmbedding
from partita.mlx.layers.inner import copy_module, is_quantized, linear_shape, slice_array
from partita.mlx.layers.linear import ColumnParallelLinear, RowParallelLinear
from partita.mlx.layers.lora import Style, fit_dropout, split_axis
from partita.mlx.layers.region_parts import EntersRegion
from partita.mlx.mlx_lm_internals import STACKS, lora_layer
from partita.mlx.model.modes import random_state_kept
from partita.mlx.model.parts import INNER_NAMES, plan_of, unsplit_modules
from partita.mlx.model.tree import Home, get_module, named_modules, set_module
from partita.mlx.weights.adapter_places import adapters, path_on_disk, paths_on_disk
from partita.training.adapter_files import Adapters, is_target, refuse_adapted, refuse_unmatched
from partita.training.adapter_patterns import AdapterConfig, unmatched_patterns

_ROUTERS = ("gate", "router")
"""Name of a linear layer beside stacked experts that is not a layer in transformers, so peft cannot adapt it."""


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
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> list[str]:
    """Add mlx-lm's LoRA to linear layers inside the layers of a split model and freeze all other parameters.

    Every rank calls it; the unsplit adapters depend only on the seed. They have the dtype of the weights.

    Args:
        model: What `load`, `shard` or `fresh` made; it may be quantized.
        rank: Rank of the adapters.
        alpha: The scale is `alpha / rank` (default scale: 1).
        seed: Seed of `lora_a`; `lora_b` is zero, so that at first nothing changes.
        targets: Names of the layers to adapt, such as `q_proj` or `self_attn.q_proj` (default: all).
        dropout: Probability with which training drops an input of an adapter. In `train` every mesh drops the same elements.
        rslora: Whether the scale is `alpha / sqrt(rank)` (default: `alpha / rank`).
        dora: Whether to train the norms of the weight's rows as well (DoRA).
        rank_pattern: Ranks of layers whose path on disk ends with a pattern, as in peft.
        alpha_pattern: Alphas of such layers.

    Returns:
        Paths of this rank's adapted layers.

    Raises:
        ModelError: The model has adapters already, no linear layer to adapt, none of a name in `targets` or of a pattern, or
            one that is not a single tensor on disk; or a number is out of its range.

    Examples:
        >>> model = pm.load("./model", tp=2)
        >>> pm.add_lora(model, rank=4, seed=0)[0]
        'model.layers.0.self_attn.q_proj'
    """
    plan, groups = plan_of(model)
    ranks, alphas = dict(rank_pattern or {}), dict(alpha_pattern or {})
    _check_numbers(rank, alpha, dropout, ranks, alphas)
    usual = Adapters(rank, float(rank if alpha is None else alpha), dropout, dora)
    config = AdapterConfig(usual, ranks, alphas, rslora)
    with collective_errors(groups):
        refuse_adapted(bool(adapters(model)))
        known = paths_on_disk(model)
        linears = {path: home for path, home in linears_of(model, plan).items() if is_target(path, targets)}
        on_disk = {path: path_on_disk(known, path) for path in linears}
    everywhere = [pair for pairs in groups.pp.all_gather_object(list(on_disk.items())) for pair in pairs]
    refuse_unmatched(targets, [path for path, _ in everywhere], plan.spec)
    if unmatched := unmatched_patterns([*ranks, *alphas], [there for _, there in everywhere]):
        raise ModelError(
            f"the pattern {unmatched[0]!r} matches no adapted layer. Their names on disk are {everywhere[0][1]}, ..."
        )
    kinds = {path: config.of(there) for path, there in on_disk.items()}
    for path, adapter in put_on(model, {path: (linears[path], kind) for path, kind in kinds.items()}, groups).items():
        _sample(adapter, linears[path][0], seed ^ zlib.crc32(path.encode()), groups)
    if dropout:
        _seed_alike(groups.tp)
    return list(linears)


def _seed_alike(comm: Communicator) -> None:
    """Make MLX's random state that of the first rank: outside `train`, dropout samples from it on each of the tensor ranks."""
    if comm.size > 1:
        drawn: Any = mx.random.randint(0, 1 << 31, ()).item()
        mx.random.seed(comm.broadcast_object(drawn, 0))


def _check_numbers(rank: Any, alpha: Any, dropout: float, ranks: Mapping[str, Any], alphas: Mapping[str, Any]) -> None:
    for value in (rank, *ranks.values()):
        if type(value) is not int or value < 1:
            raise ModelError(f"the rank of LoRA must be an integer of at least 1; got {value!r}.")
    for value in (0 if alpha is None else alpha, *alphas.values()):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ModelError(f"the alpha of LoRA must be a finite number; got {value!r}.")
    if not 0 <= dropout < 1:
        raise ModelError(f"the dropout of LoRA must be at least 0 and less than 1; got {dropout!r}.")


def put_on(
    model: nn.Module, layers: Mapping[str, tuple[Home, Adapters]], groups: ParallelGroups
) -> dict[str, nn.Module]:
    """Put adapters of zeros on linear layers of a split model, and freeze all other parameters. No communication.

    Args:
        model: The model.
        layers: For each unsplit path, where the layer is (see `linears_of`), and the kind of its adapter.
        groups: The groups of the model.

    Returns:
        The adapters by path: of rank `r`, `lora_a [in_r, r]`, `lora_b [r, out_r]`, and for DoRA `m [out_r]`, zero too.
    """
    model.freeze()
    made = {}
    for path, ((holder, key), kind) in layers.items():
        inner = holder[key]
        outputs, inputs = linear_shape(inner)
        with random_state_kept():
            adapter = lora_layer(dora=kind.dora)(1, 1, r=kind.rank, scale=kind.alpha / kind.rank)
        dtype = inner["scales"].dtype if is_quantized(inner) else inner["weight"].dtype
        dtype = dtype if mx.issubdtype(dtype, mx.floating) else mx.float32
        is_row = isinstance(holder, RowParallelLinear)
        adapter["dropout"] = AdapterDropout(
            kind.dropout, path, holder.split if is_row else None, groups.tp.rank if is_row else 0
        )
        adapter["linear"] = inner
        adapter["lora_a"] = mx.zeros((inputs, kind.rank), dtype)
        adapter["lora_b"] = mx.zeros((kind.rank, outputs), dtype)
        if kind.dora:
            adapter["m"] = mx.zeros(outputs, dtype if dtype.size >= 4 else mx.float32)
        adapter.train(inner.training)
        adapter._is_adopted = True  # fitted to the split already
        holder[key] = made[path] = adapter
    return made


def _sample(adapter: Any, holder: Any, seed: int, groups: ParallelGroups) -> None:
    """Fill a new adapter with this rank's part of the unsplit one: `lora_a`, and DoRA's norms of unsplit rows."""
    a = adapter["lora_a"]
    is_row = isinstance(holder, RowParallelLinear)
    inputs, part = (holder.split, groups.tp.rank) if is_row else (Split.even(a.shape[0], 1), 0)
    bound = 1 / math.sqrt(inputs.size)
    whole = mx.random.uniform(-bound, bound, (inputs.size, a.shape[1]), key=mx.random.key(seed))
    adapter["lora_a"] = slice_array(whole, 0, inputs.ranges(part)).astype(a.dtype)
    if "m" in adapter:
        squares = mx.square(adapter._dequantized_weight().astype(adapter["m"].dtype)).sum(axis=1)
        adapter["m"] = mx.sqrt(groups.tp.all_sum(squares) if is_row else squares)
    mx.eval(adapter["lora_a"], adapter["lora_b"], adapter.get("m", []))


def linears_of(model: nn.Module, plan: Plan) -> dict[str, Home]:
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
            fit_dropout(adapter, tp_rank, layer.split, style)
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
