"""LoRA adapters of a split model: add, find, choose, merge and remove them."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from partita.core.plan import Plan
from partita.dependencies import find
from partita.errors import ModelError
from partita.torch.collectives.collective_errors import value_of_first
from partita.torch.collectives.groups import ParallelGroups
from partita.torch.layers.dropout import has_dropout
from partita.torch.layers.inner import base_layer
from partita.torch.layers.linear import ColumnParallelLinear, RowParallelLinear
from partita.torch.layers.lora import LoraLinear
from partita.torch.model.parts import plan_of, unsplit_modules
from partita.torch.weights.adapter_parts import adapter_name, adapter_parts, is_peft, unwrapped
from partita.training.adapter_files import is_target, lora_alpha, refuse_unmatched, targets_of


def add_lora(
    model: nn.Module,
    rank: int,
    *,
    alpha: float | None = None,
    seed: int | None = None,
    targets: Collection[str] | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
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
        dora: Whether to train the norms of the weight's rows as well (DoRA), with peft's layers.

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
    if dora:
        return _add_dora(model, rank, alpha, seed, targets, dropout, rslora)
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


def _add_dora(
    model: nn.Module,
    rank: int,
    alpha: float | None,
    seed: int | None,
    targets: Collection[str] | None,
    dropout: float,
    rslora: bool,
) -> list[str]:
    plan, groups = plan_of(model)
    purpose = "train DoRA"
    config, lora_model = (find("peft", "peft", name, purpose) for name in ("LoraConfig", "LoraModel"))
    linears = {path for path in plan.spec.linears or () if plan.spec.layer_of(path) is not None}
    chosen = {path for path in linears if is_target(path, targets)}
    refuse_unmatched(targets, chosen, plan.spec)
    with torch.random.fork_rng():
        torch.manual_seed(_seed_of_first(groups) if seed is None else seed)
        settings = config(
            r=rank, lora_alpha=rank if alpha is None else alpha, lora_dropout=dropout, use_rslora=rslora, use_dora=True,
            target_modules=targets_of(chosen, (plan.spec.linears or set()) - chosen),
        )  # fmt: skip
        lora_model(model, {"default": settings}, "default")
    return sorted({part.path for part in adapter_parts(model).values()})


def refuse_two_dropouts(dropout: float, model: nn.Module, plan: Plan) -> None:
    """Raise `ModelError` for dropout of adapters in regions where the model's own dropout differs between the tensor ranks."""
    if dropout and plan.mesh.tp > 1 and has_dropout(getattr(model, "config", None)):
        raise ModelError(
            f"dropout {dropout} of adapters does not work with tp={plan.mesh.tp} on a model whose config enables dropout too: "
            "the ranks would drop different inputs. Set either to 0."
        )


def _seed_of_first(groups: ParallelGroups) -> int:
    """A seed that rank 0 samples and broadcasts: the ranks' generators need not agree."""
    return int(value_of_first(groups, int(torch.randint(1 << 62, ()))))


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
    """Merge every active adapter, ours or peft's, into its base weight, and remove all. Every rank must call it.

    Modules that peft trained beside the adapters (`modules_to_save`) take the place of their originals.

    Raises:
        ModelError: Another kind of adapter is there, or a module beside the adapters is tied to another.

    Examples:
        >>> model = pt.load("./model", tp=2)
        >>> paths = pt.add_lora(model, rank=4, seed=0)
        >>> pt.merge_lora(model)  # after training; the model can be saved again
    """
    model = unwrapped(model)
    plan, _ = plan_of(model)
    tied = {t.name.rpartition(".")[0] for t in plan.spec.tensors.values() if t.tied_to is not None}
    tied |= {t.tied_to.rpartition(".")[0] for t in plan.spec.tensors.values() if t.tied_to is not None}
    for path, *_ in _saved_modules(model):
        if path in tied:
            raise ModelError(
                f"{path} was trained beside the adapters (modules_to_save), but is tied to another module. Save the adapters "
                "(save_adapters), and merge them into the unsplit model with peft."
            )
    for parent, _, adapter in adapters(model):
        if isinstance(adapter, LoraLinear):
            update = adapter.lora_B.weight @ adapter.lora_A.weight * adapter.scaling
            weight: torch.Tensor = adapter.base_layer.weight  # type: ignore[assignment]
            weight += update.T if hasattr(adapter.base_layer, "nf") else update
        elif hasattr(adapter, "lora_magnitude_vector"):
            _merge_peft_layer(adapter, parent)
        else:
            raise ModelError(
                f"{type(adapter).__name__} belongs to another library. Merge it there, e.g. with merge_and_unload()."
            )
    _remove(model, merged=True)


def _merge_peft_layer(layer: Any, parent: Any) -> None:
    if type(parent) is RowParallelLinear and parent.bias is not None:
        # The base layer's bias is added after the sum over the ranks, and so is that of the adapter.
        for name in layer.active_adapters:
            if layer.lora_bias.get(name):
                parent.bias.add_(layer.lora_B[name].bias * layer.scaling[name])
                layer.lora_bias[name] = False
    layer.merge()


def unload_lora(model: nn.Module) -> None:
    """Remove every adapter, ours or peft's, without merging it; modules that peft trained beside them are removed too.

    An initialization that changed the base weight (PiSSA, OLoRA) leaves it changed.
    """
    _remove(unwrapped(model), merged=False)


def _remove(model: nn.Module, *, merged: bool) -> None:
    for _, parent, name, wrapper in _saved_modules(model):
        active = wrapper.active_adapters
        chosen = wrapper.modules_to_save[active[0]] if merged and active else wrapper.original_module
        setattr(parent, name, chosen.requires_grad_(False))
    for parent, name, adapter in adapters(model):
        setattr(parent, name, base_layer(adapter))
    if is_peft(model):
        del model.peft_config


def places(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module, nn.Module]]:
    """What adapters put in place of modules: the parent, the name in it, the module with the adapter, and the one without.

    Setting the attribute to one or the other adds and removes the adapters of a model that has no others, without
    communication.
    """
    saved = [(parent, name, wrapper, wrapper.original_module) for _, parent, name, wrapper in _saved_modules(model)]
    return saved + [(parent, name, adapter, base_layer(adapter)) for parent, name, adapter in adapters(model)]


def _saved_modules(model: nn.Module) -> list[tuple[str, nn.Module, str, Any]]:
    """peft's wrappers of `modules_to_save`: the unsplit path, the parent, the name in it, and the wrapper."""
    return [
        (f"{path}.{name}".lstrip("."), parent, name, child)
        for path, parent in {"": model, **unsplit_modules(model)}.items()
        for name, child in parent.named_children()
        if isinstance(getattr(child, "modules_to_save", None), nn.ModuleDict)
    ]


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Choose which of the adapters that were loaded with a name computes, or none: then the base model does.

    Only the chosen one can then be trained.

    Args:
        model: A split model with adapters from `load_adapters(..., name=...)` or peft; or peft's model around it.
        name: The adapter, or None.

    Raises:
        ModelError: There is no such adapter, or the adapters have no names.

    Examples:
        >>> paths = pt.load_adapters(model, "./french", name="fr")
        >>> paths = pt.load_adapters(model, "./german", name="de")
        >>> pt.set_adapter(model, "fr")
        >>> pt.set_adapter(model, None)  # the base model
    """
    model = unwrapped(model)
    if not is_peft(model):
        raise ModelError("the model has no adapters with names. Load them with load_adapters(model, folder, name=...).")
    tuners, purpose = "peft.tuners.tuners_utils", "choose between adapters"
    if name is not None:
        name = adapter_name(model, name)
        find("peft", tuners, "set_adapter", purpose)(model, name)
    kinds = (
        find("peft", tuners, "BaseTunerLayer", purpose),
        find("peft", "peft.utils.other", "AuxiliaryTrainingWrapper", purpose),
    )
    module: Any
    for module in model.modules():
        if isinstance(module, kinds):
            held = not hasattr(module, "modules_to_save") or name in module.modules_to_save
            module.enable_adapters(name is not None and held)
