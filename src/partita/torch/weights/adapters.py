"""LoRA adapters of a split model: add, find and merge them."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from partita.core.plan import Plan
from partita.errors import ModelError
from partita.torch.collectives.groups import ParallelGroups
from partita.torch.layers.dropout import has_dropout
from partita.torch.layers.inner import base_layer
from partita.torch.layers.linear import ColumnParallelLinear, RowParallelLinear
from partita.torch.layers.lora import LoraLinear
from partita.torch.model.parts import plan_of
from partita.training.adapter_files import is_target, lora_alpha, refuse_unmatched


def add_lora(
    model: nn.Module,
    rank: int,
    *,
    alpha: float | None = None,
    seed: int | None = None,
    targets: Collection[str] | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
) -> list[str]:
    """Add a LoRA adapter to linear layers inside the layers of a split model and freeze all other parameters.

    Every rank must call it. The unsplit adapters depend only on the seed, not on the mesh.

    Args:
        model: A result of `load`, `shard` or `fresh`.
        rank: Rank of the adapters.
        alpha: The scale is `alpha / rank` (default scale: 1).
        seed: Seed of `lora_A` (default: rank 0 samples one). `lora_B` is zero, so that at first nothing changes.
        targets: Names of the layers to adapt, such as `q_proj` or `self_attn.q_proj` (default: all).
        dropout: Probability with which training drops an input of an adapter.
        rslora: Whether the scale is `alpha / sqrt(rank)` (default: `alpha / rank`).

    Returns:
        Paths of the adapted layers.

    Raises:
        ModelError: The model has no linear layer to adapt, or none of a name in `targets`; or `dropout` is given with tp for a
            model whose config enables dropout too.

    Examples:
        >>> model = pt.load("./model", tp=2)
        >>> pt.add_lora(model, rank=4, seed=0)[0]
        'model.layers.0.self_attn.q_proj'
    """
    plan, groups = plan_of(model)
    refuse_two_dropouts(dropout, model, plan)
    alpha = lora_alpha(rank, alpha, rslora=rslora)
    places = {
        path: module
        for path, module in model.named_modules()
        if is_target(path, targets) and _can_adapt(path, module, plan)
    }
    everywhere = [path for paths in groups.pp.all_gather_object(list(places)) for path in paths]  # type: ignore[attr-defined]
    refuse_unmatched(targets, everywhere, plan.spec)
    model.requires_grad_(False)
    seed = _seed_of_first(groups) if seed is None else seed
    for path, module in places.items():
        # Each layer has its own generator, so that the assignment of layers to stages does not matter.
        with torch.random.fork_rng():
            torch.manual_seed((seed ^ zlib.crc32(path.encode())) & ((1 << 63) - 1))
            if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
                row = isinstance(module, RowParallelLinear)
                inputs, part = (module.split, groups.tp.rank) if row else (None, 0)
                module.linear = LoraLinear(module.linear, rank, alpha, inputs=inputs, tp_rank=part, dropout=dropout)
            else:
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, LoraLinear(module, rank, alpha, dropout=dropout))
    return list(places)


def _can_adapt(path: str, module: nn.Module, plan: Plan) -> bool:
    if plan.spec.layer_of(path) is None:
        return False
    if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
        return True
    return _is_linear(module) and path in (plan.spec.linears or ())


@contextmanager
def removed_on_error(model: nn.Module) -> Iterator[None]:
    """Remove the adapters that are added inside the context, and train what was trained, if an error ends it."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for parent, name, adapter in adapters(model):
            setattr(parent, name, base_layer(adapter))
        for parameter, flag in trained:
            parameter.requires_grad_(flag)
        raise


def refuse_two_dropouts(dropout: float, model: nn.Module, plan: Plan) -> None:
    """Raise `ModelError` for dropout of adapters in regions where the model's own dropout differs between the tensor ranks."""
    if dropout and plan.mesh.tp > 1 and has_dropout(getattr(model, "config", None)):
        raise ModelError(
            f"dropout {dropout} of adapters does not work with tp={plan.mesh.tp} on a model whose config enables dropout too: "
            "the ranks would drop different inputs. Set either to 0."
        )


def _seed_of_first(groups: ParallelGroups) -> int:
    """A seed that rank 0 samples and broadcasts: the ranks' generators need not agree."""
    seed: Any = int(torch.randint(1 << 62, ()))
    for comm in (groups.tp, groups.pp, groups.dp):
        seed = comm.broadcast_object(seed)
    return int(seed)


def _is_linear(module: nn.Module) -> bool:
    """Whether it is a plain linear layer of torch or of transformers' GPT-2, not a subclass or wrapper."""
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def adapters(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Every adapter of a model: its parent module, its attribute name, and the adapter."""
    return [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent.named_children()
        if base_layer(child) is not child and not isinstance(parent, LoraLinear)
    ]


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Merge every LoRA adapter into its base weight and remove it. No communication.

    Raises:
        ModelError: Another library added an adapter; peft merges its own (`merge_and_unload`).

    Examples:
        >>> model = pt.load("./model", tp=2)
        >>> paths = pt.add_lora(model, rank=4, seed=0)
        >>> pt.merge_lora(model)  # after training; the model can be saved again
    """
    for parent, name, adapter in adapters(model):
        if not isinstance(adapter, LoraLinear):
            raise ModelError(
                f"{type(adapter).__name__} belongs to another library. Merge it there, e.g. with merge_and_unload()."
            )
        base = adapter.base_layer
        update = adapter.lora_B.weight @ adapter.lora_A.weight * adapter.scaling
        weight: torch.Tensor = base.weight  # type: ignore[assignment]
        weight += update.T if hasattr(base, "nf") else update
        setattr(parent, name, base)
