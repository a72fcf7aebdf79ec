"""transformers models: read from a local folder or config, and built on the meta device without weights."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from partita.core.model.spec import (
    ModelSpec,
    TensorSpec,
    check_architectures,
    check_layers,
    config_number,
    find_layers,
    spec_from_tensors,
    text_config,
)
from partita.core.sharding.rules import Rules, isolated_rules, rules_for
from partita.dependencies import reading_code
from partita.errors import ModelError
from partita.torch.model.towers import tower_paths
from partita.torch.transformers_internals import (
    auto_class,
    class_of_code,
    float32_tensors,
    has_own_code,
    new_model,
    quiet,
    text_config_of,
    tp_plan_of,
    use_plain_experts,
)

OWN_CODE = (
    "{} comes with its own code, which is not run by default. If you trust it, give trust_remote_code=True "
    "(--trust-remote-code)."
)


def _first_line(error: BaseException) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return f"{line[:200]}."


def read_hf_config(source: str | os.PathLike[str] | Mapping[str, Any] | Any, *, trust_remote_code: bool = False) -> Any:
    """Read a transformers config from a local folder, a config file, plain data, or another config.

    Args:
        source: One of these.
        trust_remote_code: Whether to run code that comes with the config.

    Raises:
        ModelError: The installed transformers cannot read it, or it needs its own code.
    """
    from transformers import AutoConfig, PretrainedConfig

    if isinstance(source, PretrainedConfig):
        return copy.deepcopy(source)
    if not isinstance(source, (str, os.PathLike, Mapping)):
        raise ModelError(
            f"config must be a file, a folder, plain data or a transformers config, but is {source!r:.100}."
        )
    try:
        if isinstance(source, Mapping):
            return AutoConfig.for_model(**dict(source))
        if trust_remote_code and Path(source).name == "config.json":
            source = Path(source).parent  # the code is beside it
        with reading_code(trusted=trust_remote_code):
            return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:
        name = source.get("model_type", "a config") if isinstance(source, Mapping) else source
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if not trust_remote_code and ("trust_remote_code" in str(error) or _names_code(source)):
            raise ModelError(OWN_CODE.format(name)) from error
        reason = " ".join(lines[:3])[:300] or type(error).__name__
        raise ModelError(f"{name}: transformers cannot read this config: {reason}") from error


def _names_code(source: Any) -> bool:
    return isinstance(source, Mapping) and bool(source.get("auto_map"))


def code_note(folder: Any, config: Any) -> str:
    """The message to show when code that comes with a model runs; empty if there is no such code."""
    places = (getattr(config, "auto_map", None) or {}).values()
    names = sorted({place.partition(".")[0] for place in places if isinstance(place, str)})
    if not names:
        return ""
    return f"{folder}: running code that comes with the model ({', '.join(names)}), as trust_remote_code asks."


def config_like(config: Any, data: Mapping[str, Any]) -> Any:
    """A config of the same family as `config` with the values `data`."""
    return type(config).from_dict(dict(data)) if has_own_code(config) else read_hf_config(data)


def model_class(config: Any, *, trust_remote_code: bool = False) -> Any:
    """The model class for a config: that of the model's own code if there is any and it is trusted, else the transformers class
    that the config names, else its causal language model, else its base model."""
    import transformers

    if trust_remote_code:
        try:
            with reading_code():
                found = class_of_code(config)
        except Exception as error:
            raise ModelError(
                f"the code that comes with {config.name_or_path} cannot be run: {type(error).__name__}: {_first_line(error)}"
            ) from error
        if found is not None:
            return found
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    found = auto_class(config)
    if found is not None:
        return found
    raise ModelError(
        f"transformers has no model for the config of {getattr(config, 'model_type', '?')} "
        f"({', '.join(getattr(config, 'architectures', None) or ['no architecture named'])})."
    )


def build_on_meta(
    config: Any, dtype: torch.dtype | None = None, cls: Any = None, *, trust_remote_code: bool = False
) -> nn.Module:
    """The unsplit model of a config on the meta device, in eval mode.

    In float64 all parameters and buffers are float64, and experts use the plain implementation, since the grouped ones
    do not support float64.
    """
    check_layers(getattr(config, "num_hidden_layers", None))
    check_architectures(getattr(config, "architectures", None))
    cls = cls if cls is not None else model_class(config, trust_remote_code=trust_remote_code)
    if dtype == torch.float64:
        use_plain_experts(config)
    try:
        with quiet(), torch.device("meta"):
            model = new_model(cls, config, dtype or getattr(config, "dtype", None) or torch.float32)
    except Exception as error:
        raise ModelError(
            f"{cls.__name__} cannot be built from its config: {type(error).__name__}: {_first_line(error)}"
        ) from error
    _leave_no_memory(model)
    _keep_in_float32(model)
    if dtype == torch.float64:
        # Some modules create parameters and buffers in float32 whatever the dtype of the model (routers, decays).
        model.double()
    return model.eval()


def _keep_in_float32(model: Any) -> None:
    """Widen on the meta device the tensors that transformers' `from_pretrained` keeps in float32 (a router's weights)."""
    names = float32_tensors(model)
    if names is None:
        return
    moved: dict[int, tuple[Tensor, Tensor]] = {}
    for path, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or name in module._non_persistent_buffers_set or not names.search(f"{path}.{name}"):
                    continue
                new: Tensor = torch.empty_like(tensor, dtype=torch.float32)
                if isinstance(tensor, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                tensors[name] = moved.setdefault(id(tensor), (tensor, new))[1]


def _leave_no_memory(model: nn.Module) -> None:
    """Move tensors that a model's constructor created elsewhere to the meta device: torch.normal ignores the default device."""
    moved: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or tensor.device.type == "meta" or name in module._non_persistent_buffers_set:
                    continue
                empty = torch.empty_like(tensor, device="meta")
                if isinstance(tensor, nn.Parameter):
                    empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                tensors[name] = moved.setdefault(id(tensor), (tensor, empty))[1]  # type: ignore[assignment]


def spec_of(model: nn.Module) -> ModelSpec:
    """The `ModelSpec` of an unsplit model on any device. Tensors that are one parameter are tied."""
    first: dict[int, str] = {}
    tensors = {}
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        tied_to = first.setdefault(id(tensor), name)
        tensors[name] = TensorSpec(name, tuple(tensor.shape), tied_to if tied_to != name else None, name in buffers)
    config: Any = getattr(model, "config", None)
    data = json.loads(config.to_json_string(use_diff=False)) if hasattr(config, "to_json_string") else {}
    linears = frozenset(p for p, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D")
    towers = tower_paths(model)
    layers, num_layers = _find_layer_list(model, towers)
    dtype = str(next((t.dtype for t in model.parameters()), torch.float32)).removeprefix("torch.")
    heads = _heads(config)
    return spec_from_tensors(
        MappingProxyType(tensors),
        data,
        family=str(getattr(config, "model_type", None) or type(model).__name__),
        architecture=type(model).__name__,
        layers=layers,
        num_layers=num_layers,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        vocab_size=config_number(text_config(data), "vocab_size"),
        dtype=dtype,
        linears=linears,
        towers=towers,
    )


def _heads(config: Any) -> tuple[int, int]:
    """Head counts by the usual config names, (0, 0) if they differ by layer or are unknown."""
    config = text_config_of(config)
    try:
        heads = getattr(config, "num_attention_heads", None)
        kv_heads = getattr(config, "num_key_value_heads", None)
    except Exception:
        # transformers raises here if the number differs by layer.
        return 0, 0
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        kv_heads = 1
    if type(heads) is not int:
        return 0, 0
    return heads, kv_heads if type(kv_heads) is int else heads


def _find_layer_list(model: nn.Module, towers: tuple[str, ...]) -> tuple[str, int]:
    """The longest list of modules of one class that holds the most parameters, outside of `towers`: the model's layers."""
    best, weight = ("", 0), 0
    for path, module in model.named_modules():
        if any(path == tower or path.startswith(f"{tower}.") for tower in towers):
            continue
        if isinstance(module, nn.ModuleList) and len(module) > 0 and not any(p.isdigit() for p in path.split(".")):
            parameters = sum(p.numel() for p in module.parameters())
            if parameters > weight:
                best, weight = (path, len(module)), parameters
    return best if best[0] else find_layers(list(model.state_dict()))


def rules_of(model: nn.Module, spec: ModelSpec) -> Rules:
    """The rules of a model: our table for its family, else its config's `base_model_tp_plan`, else rules for the usual names.

    If none of these matches a module of the model, every linear layer is split by itself. No table was verified with code
    that comes with a model, whatever its family name.
    """
    config: Any = getattr(model, "config", None)
    rules = rules_for(spec, tp_plan_of(config))
    if has_own_code(model):
        rules = replace(rules, proven=False)
    if any(rules.find(path) is not None for path in spec.modules if spec.layer_of(path) is not None):
        return rules
    return isolated_rules(spec)
