"""peft on split models: `peft.get_peft_model` adapts them as it adapts the unsplit model.

peft matches layers by path and samples adapters from the shapes that it sees. In a split model both differ, and other stages
have other layers. So peft first adapts the unsplit model on the meta device, whose weights have shapes and no memory. This
twin decides which layers are adapted, with which rank and alpha, and samples the unsplit adapters, one layer at a time. Each
rank then adds peft's layers inside its own split layers (`layers/lora.py` fits them) and keeps its part of the values. With
the same seed the unsplit adapters are therefore those of the unsplit model, on any mesh.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from partita.core.plan import Plan
from partita.dependencies import find
from partita.errors import ModelError
from partita.torch.collectives.collective_errors import value_of_first
from partita.torch.layers.inner import base_layer, take_ranges
from partita.torch.layers.lora import adopt, measure_magnitudes, part_dim
from partita.torch.model.parts import inner_name, is_split, plan_of, unsplit_modules
from partita.torch.stages.cut import Absent
from partita.torch.weights.adapter_parts import is_peft
from partita.torch.weights.adapters import refuse_two_dropouts
from partita.torch.weights.save import unsplit_on_meta
from partita.training.adapter_files import CONFIG_NAME

_WORKS = frozenset(
    (
        "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
        "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "modules_to_save", "init_lora_weights",
        "fan_in_fan_out", "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "runtime_config", "megatron_core",
    )
)  # fmt: skip
"""The options of `LoraConfig` that work on split models; of the others only the default does."""

_INITS = ("gaussian", "orthogonal")
INITS_OF_WEIGHTS = ("pissa", "olora")
"""Initializations by name; the second kind decomposes the unsplit weight, which is gathered one layer at a time."""

_REMEDY = "Or add the adapter to the unsplit model with peft, merge it (merge_and_unload), and split the result."


@dataclasses.dataclass
class _Target:
    """A layer that peft adapts.

    Attributes:
        rank: Rows of `lora_A`.
        alpha: peft's `lora_alpha` of this layer.
        parts: This rank's part of each parameter by peft's name in the layer; empty if another stage has the layer.
    """

    rank: int
    alpha: float
    parts: Mapping[str, Tensor]


def inject(original: Callable[..., Any], tuner: Any, model: nn.Module, adapter_name: str, **options: Any) -> None:
    """peft's `BaseTuner.inject_adapter`, for split models too. Every rank must call it.

    Raises:
        ModelError: The configuration has something that does not work on split models.
    """
    lora_model = find("peft", "peft", "LoraModel", "add adapters to split models")
    if not is_split(model) or not hasattr(model, "config"):
        original(tuner, model, adapter_name, **options)
        return
    if type(tuner) is not lora_model:
        raise ModelError(f"peft's {type(tuner).__name__} does not work on a split model. Use a LoraConfig. {_REMEDY}")
    plan, groups = plan_of(model)
    given = tuner.peft_config[adapter_name]
    refuse(given, model, plan)
    # All ranks sample the same unsplit adapters.
    torch.set_rng_state(value_of_first(groups, torch.get_rng_state()))
    targets, saved = _adapt_twin(lora_model, model, given, adapter_name)
    _refuse_overlap(model, adapter_name, set(targets), set(saved))
    here = {path: target for path, target in targets.items() if target.parts}
    modules = unsplit_modules(model)
    wrapped = [path for path in saved if path in modules and not isinstance(modules[path], Absent)]
    try:
        with torch.random.fork_rng():
            tuner.peft_config[adapter_name] = _local_config(given, here, modules, wrapped)
            original(tuner, model, adapter_name)
    finally:
        tuner.peft_config[adapter_name] = given
    modules = unsplit_modules(model)
    for path, target in here.items():
        _fill(_peft_layer(modules[path]), target.parts, adapter_name)


def _refuse_overlap(model: Any, name: str, targets: set[str], saved: set[str]) -> None:
    """Raise `ModelError` on every rank if an adapter adapts a module that another one trains, or the reverse."""
    known: dict[str, tuple[set[str], set[str]]] = model.__dict__.setdefault("partita_peft_paths", {})
    for other, (other_targets, other_saved) in known.items():
        for one, adapts, another, trains in (
            (name, targets, other, other_saved),
            (other, other_targets, name, saved),
        ):
            if other in getattr(model, "peft_config", {}) and adapts & trains:
                raise ModelError(
                    f"{one!r} adapts {min(adapts & trains)}, which the adapter {another!r} trains as a module of its own "
                    "(modules_to_save). Load one of them at a time."
                )
    known[name] = targets, saved


def refuse(config: Any, model: nn.Module, plan: Plan) -> None:
    """Raise `ModelError` for a `LoraConfig` that cannot work on a split model."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        plain = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if field.name not in _WORKS and value not in (plain, None):
            raise ModelError(f"peft's {field.name}={value!r} does not work on a split model. Leave it out. {_REMEDY}")
    init = config.init_lora_weights
    of_weights = _reads_weights(config)
    if isinstance(init, str) and init.lower() not in _INITS and not of_weights:
        raise ModelError(
            f"peft's init_lora_weights={init!r} does not work on a split model: use True, False, 'gaussian', 'orthogonal', "
            f"'pissa' or 'olora'. {_REMEDY}"
        )
    if of_weights and any(p.dtype == torch.float64 for p in model.parameters()):
        raise ModelError(f"peft's init_lora_weights={init!r} needs float32, float16 or bfloat16 weights; got float64.")
    refuse_two_dropouts(config.lora_dropout, model, plan)


def _reads_weights(config: Any) -> bool:
    init = config.init_lora_weights
    return isinstance(init, str) and init.lower().startswith(INITS_OF_WEIGHTS)


def _adapt_twin(
    lora_model: type[Any], model: nn.Module, given: Any, adapter_name: str
) -> tuple[dict[str, _Target], list[str]]:
    """Let peft adapt the unsplit model, and keep this rank's part of each adapter.

    Returns:
        The adapted layers by path, and the paths of the modules that `modules_to_save` names. `given` receives what peft
        resolved (`all-linear`).
    """
    plan, _ = plan_of(model)
    modules, targets = unsplit_modules(model), {}
    reads_weights = _reads_weights(given)

    class Twin(lora_model):  # type: ignore[misc]
        def _create_and_replace(
            self, config: Any, name: str, target: Any, target_name: str, parent: Any, current_key: str, **options: Any
        ) -> None:
            if options.get("parameter_name") is not None:
                raise ModelError(
                    f"peft adapts {current_key} by target_parameters, which does not work on a split model. Name linear layers "
                    f"in target_modules, such as q_proj. {_REMEDY}"
                )
            here = modules.get(current_key)
            here = None if isinstance(here, Absent) else here
            if reads_weights:
                config = config if here is not None else _with(config, init_lora_weights=True)
            with _lent_weights(target, here, unsplit=reads_weights):
                super()._create_and_replace(config, name, target, target_name, parent, current_key, **options)
                layer = getattr(parent, target_name)
                parts = {} if here is None else _own_parts(layer, here, with_base=reads_weights)
            targets[current_key] = _Target(layer.r[name], layer.lora_alpha[name], parts)
            for parameter in layer.parameters():
                parameter.data = parameter.data.new_empty(0)

    config = copy.deepcopy(given)
    twin = Twin(unsplit_on_meta(model, plan), {adapter_name: config}, adapter_name)
    given.target_modules = config.target_modules
    saved = [path for path, module in twin.model.named_modules() if hasattr(module, "modules_to_save")]
    return targets, saved


def _with(config: Any, **changes: Any) -> Any:
    twin = copy.copy(config)
    for name, value in changes.items():
        setattr(twin, name, value)
    return twin


@contextmanager
def _lent_weights(target: nn.Module, here: Any, *, unsplit: bool) -> Iterator[None]:
    """Give a layer on the meta device, inside the context, the unsplit weight of `here`, or one zero in all places."""
    kept = dict(target._parameters)
    local = None if here is None else base_layer(_peft_layer(here)).weight
    for name, parameter in kept.items():
        if parameter is not None:
            value = torch.zeros((), dtype=parameter.dtype if local is None else local.dtype).expand(parameter.shape)  # type: ignore[arg-type]
            if unsplit and local is not None and name == "weight":
                value = here.master_weight if inner_name(here) else local.detach().clone()  # type: ignore[operator]
            target._parameters[name] = nn.Parameter(value, requires_grad=False)
    try:
        yield
    finally:
        target._parameters.update(kept)


def _own_parts(layer: nn.Module, here: Any, *, with_base: bool) -> dict[str, Tensor]:
    """This rank's part of an unsplit adapter, and of the weight that its initialization changed."""
    parts: dict[str, Tensor] = {}
    for name, parameter in layer.named_parameters():
        is_base = name == "base_layer.weight"
        if "magnitude" in name or (name.startswith("base_layer.") and not (is_base and with_base)):
            continue
        value, dim = parameter.detach(), None
        if inner_name(here):
            dim = _weight_dim(here) if is_base else part_dim(here.style, name)
        parts[name] = value.clone() if dim is None else take_ranges(value, [here.split.ranges(here.comm.rank)], dim)
    return parts


def _weight_dim(layer: Any) -> int:
    return 0 if layer.style == "vocab" else int(layer._weight_dim)


def _local_config(given: Any, here: Mapping[str, _Target], modules: Mapping[str, nn.Module], wrapped: list[str]) -> Any:
    """A configuration for this rank's layers: each by its path in the split model, with its rank and alpha."""
    dummy = find("peft", "peft.utils.constants", "DUMMY_TARGET_MODULES", "adapt stages without targets")
    paths = {path: _path_here(path, modules[path]) for path in here}
    return _with(
        given,
        target_modules="|".join(map(re.escape, paths.values())) or dummy,
        exclude_modules=None, layers_to_transform=None, layers_pattern=None, init_lora_weights=True,
        rank_pattern={re.escape(paths[path]): target.rank for path, target in here.items()},
        alpha_pattern={re.escape(paths[path]): target.alpha for path, target in here.items()},
        modules_to_save=wrapped or None,
    )  # fmt: skip


def _path_here(path: str, module: nn.Module) -> str:
    inner = inner_name(module)
    return path if inner is None else f"{path}.{inner}"


def _peft_layer(module: Any) -> Any:
    inner = inner_name(module)
    return module if inner is None else getattr(module, inner)


@torch.no_grad()
def _fill(layer: Any, parts: Mapping[str, Tensor], adapter_name: str) -> None:
    """Give a peft layer this rank's part of the unsplit adapter."""
    parameters = dict(layer.named_parameters())
    for name, part in parts.items():
        parameters[name].copy_(part)
    measure_magnitudes(layer, adapter_name)


def cast(original: Callable[..., Any], tuner: Any, *args: Any, **options: Any) -> None:
    """peft's `BaseTuner._cast_adapter_dtype`, which replaces parameters: the new ones are fitted to the split again."""
    original(tuner, *args, **options)
    model = tuner.model
    if is_split(model):
        for module in unsplit_modules(model).values():
            if inner_name(module):
                layer: Any = module
                adopt(_peft_layer(layer), layer.comm, layer.split, layer.style, filled=True)


def add_from(model: nn.Module, folder: Path, name: str) -> None:
    """Let peft add the adapter that the config in `folder` describes, trainable, to a split model. Every rank must call it.

    Raises:
        ModelError: The model has an adapter of this name, or the config has something that does not work on split models.
    """
    read = find("peft", "peft", "PeftConfig", "read its adapters").from_pretrained
    lora_model = find("peft", "peft", "LoraModel", "add adapters to split models")
    known: dict[str, Any] = dict(model.peft_config) if is_peft(model) else {}  # type: ignore[arg-type]
    if name in known:
        raise ModelError(f"the model has an adapter {name!r} already. Give another name.")
    config = read(str(folder))
    config.inference_mode = False
    try:
        tuner = lora_model(model, {**known, name: config}, name)
    except Exception:
        model.peft_config = known  # type: ignore[assignment]
        raise
    # As in peft's own model, adapters of narrower weights are float32.
    tuner._cast_adapter_dtype(adapter_name=name, autocast_adapter_dtype=True)


def config_text(model: Any, name: str, base: str | None) -> str:
    """The text of `adapter_config.json` for one of peft's adapters of a split model."""
    config = _with(model.peft_config[name], inference_mode=True, base_model_name_or_path=base)
    with tempfile.TemporaryDirectory() as made:
        config.save_pretrained(made)
        return (Path(made) / CONFIG_NAME).read_text(encoding="utf-8")
