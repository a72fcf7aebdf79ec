"""What Partita uses of mlx-lm beyond its documented API, and what differs between its versions.

Each function asks the installed mlx-lm for a feature, never for its version. No other module of the engine names these parts of
mlx-lm, or of transformers, which mlx-lm brings along; `tests/mlx/test_internals.py` checks it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from partita.dependencies import find, lacking
from partita.errors import ModelError

LIBRARY = "mlx-lm"


# --- models -----------------------------------------------------------------------------------------------------------


def module_name(family: str, architectures: Sequence[str]) -> str:
    """The name of mlx-lm's model module for a config of `family`."""
    purpose = "find the model of a config"
    by_family: Mapping[str, str] = find(LIBRARY, "mlx_lm.utils", "MODEL_REMAPPING", purpose)
    # Versions before 0.32 choose by the family only.
    by_architecture: Mapping[tuple[str, str], str] = getattr(
        importlib.import_module("mlx_lm.utils"), "MODEL_ARCHITECTURE_REMAPPING", {}
    )
    found = (by_architecture.get((family, name)) for name in architectures)
    name = next((name for name in found if name), None) or by_family.get(family, family)
    return f"mlx_lm.models.{name}"


def classes_of(module: str) -> tuple[Any, Any]:
    """The model of a module of mlx-lm's models and the class of its arguments.

    Raises:
        ImportError: There is no such module, or it needs another.
        AttributeError: It has no such classes.
        SystemExit: It exits the process because a library is missing.
    """
    arch = importlib.import_module(module)
    return arch.Model, arch.ModelArgs


def family_of(cls: type[nn.Module]) -> str:
    """The family of one of mlx-lm's model classes: the name of its module."""
    return cls.__module__.rpartition(".")[2]


def new_model(cls: Any, arguments: Any, config: Mapping[str, Any]) -> nn.Module:
    """A model of class `cls`, built from the `arguments` of `config`."""
    if not hasattr(arguments, "from_dict"):
        raise lacking(LIBRARY, f"no {arguments.__module__}.{arguments.__name__}.from_dict", "build a model of a config")
    with quiet():
        model: nn.Module = cls(arguments.from_dict(dict(config)))
    return model


def arguments_of(model: nn.Module) -> Any:
    """The arguments that a model was built from, a dataclass; None if it stores none."""
    return getattr(model, "args", None) or getattr(model, "config", None)


STACKS = ("SwitchGLU", "SwitchMLP")
"""Names of mlx-lm's modules of stacked experts, which are called with hidden states and the experts of each."""


def last_of_stack(experts: nn.Module) -> Any:
    """The output layer of stacked experts."""
    return next(experts[name] for name in ("down_proj", "fc2") if name in experts)


_OWN_ROTARY = frozenset(("DynamicNTKAlphaRoPE", "ProportionalRoPE"))
"""Rotary modules of mlx-lm with their own config keys."""


def rotated_dims(module: nn.Module) -> int | None:
    """The number of elements of a head that a module rotates; None if it is not a rotary module of MLX or mlx-lm."""
    kind = type(module)
    if kind is not nn.RoPE and (not kind.__module__.startswith("mlx_lm.") or not kind.__name__.endswith("RoPE")):
        return None
    dims = getattr(module, "dims", getattr(module, "dim", None))
    return dims if type(dims) is int and kind.__name__ not in _OWN_ROTARY else None


def lora_layer(*, dora: bool = False) -> Any:
    """mlx-lm's linear layer with a LoRA or DoRA adapter, a class."""
    module, name = ("mlx_lm.tuner.dora", "DoRALinear") if dora else ("mlx_lm.tuner.lora", "LoRALinear")
    return find(LIBRARY, module, name, "put LoRA adapters on a model")


# --- caches -----------------------------------------------------------------------------------------------------------


def make_cache(model: nn.Module) -> list[Any]:
    """The model's own cache, with one entry per layer.

    Raises:
        ModelError: The model has no cache.
    """
    make = find(LIBRARY, "mlx_lm.models.cache", "make_prompt_cache", "generate text")
    try:
        cache: list[Any] = make(model)
    except AttributeError as error:
        raise ModelError(
            f"{type(model).__module__} has no cache ({error}), so it cannot generate token by token."
        ) from error
    return cache


def parts_of(entry: Any) -> Sequence[Any]:
    """The entries that make up a layer's composite cache entry; empty for a simple entry."""
    parts = getattr(entry, "caches", None)
    return parts if isinstance(parts, (tuple, list)) else ()


def grows_with_tokens(entry: Any) -> bool:
    """Whether an entry of a cache holds keys and values of every token, or of every token of a window."""
    return hasattr(entry, "update_and_fetch")


def add_tokens(entry: Any, keys: mx.array, values: mx.array) -> None:
    """Append keys and values `[batch, heads, tokens, width]` to an entry that grows with tokens."""
    entry.update_and_fetch(keys, values)


_KINDS = ("max_size", "keep", "chunk_size", "step", "group_size", "bits")
"""Attributes that distinguish caches of one class."""


def kind_of(entry: Any) -> Hashable:
    """A key that is equal for cache entries that count tokens in the same way."""
    return (type(entry), *(getattr(entry, name, None) for name in _KINDS))


def keys_of(entry: Any) -> mx.array | None:
    """The keys in a cache entry, if it has an array of them."""
    keys = getattr(entry, "keys", None)
    return keys if isinstance(keys, mx.array) else None


def leaves_of(cache: Sequence[Any]) -> list[Any]:
    """The simple entries of a cache, in order; those of composite entries one by one."""
    return [leaf for entry in cache if entry is not None for leaf in (leaves_of(parts_of(entry)) or [entry])]


def _is(entry: Any, name: str) -> bool:
    """Whether an entry is of mlx-lm's class `name`, and of no class derived from it."""
    return type(entry) is getattr(importlib.import_module("mlx_lm.models.cache"), name, None)


def window_of(entry: Any) -> int | None:
    """The number of latest tokens whose keys and values an entry holds at least, 0 for all; None if it holds anything else."""
    if _is(entry, "KVCache"):
        return 0
    return int(entry.max_size) if _is(entry, "RotatingKVCache") and not entry.keep else None


def is_state(entry: Any) -> bool:
    """Whether an entry holds a state of fixed size, as recurrent layers and convolutions have."""
    return _is(entry, "ArraysCache")


def latest_tokens(entry: Any, count: int, end: int) -> tuple[mx.array, mx.array] | None:
    """The `count` keys and values `[1, heads, count, width]` before token `end` of an entry with a `window_of`.

    None if the entry has no tokens.
    """
    if entry.keys is None:
        return None
    arrays = entry.keys, entry.values
    last = int(entry.offset)
    if _is(entry, "RotatingKVCache"):
        arrays = tuple(map(entry._temporal_order, arrays))
        end -= last - arrays[0].shape[2]
    return arrays[0][..., end - count : end, :], arrays[1][..., end - count : end, :]


def reserve(entry: Any, tokens: int) -> None:
    """Make an empty entry that holds every token allocate memory for `tokens` tokens, once and no more."""
    if _is(entry, "KVCache"):
        entry.step = tokens


def refill(entry: Any, keys: mx.array, values: mx.array, tokens: int) -> None:
    """Give an empty entry with a `window_of` the keys and values of the latest of `tokens` tokens."""
    if _is(entry, "KVCache"):
        entry.update_and_fetch(keys, values)
        return
    entry.keys, entry.values = keys, values
    entry.offset, entry._idx = tokens, keys.shape[2]


def token_bytes(entry: Any) -> int:
    """Bytes of one token's keys and values in an entry that has seen tokens; 0 if it holds none."""
    keys, values = getattr(entry, "keys", None), getattr(entry, "values", None)
    arrays = [x for x in (keys, values) if isinstance(x, mx.array) and x.ndim == 4]
    return sum(x.nbytes // x.shape[2] for x in arrays)


def state_bytes(entry: Any) -> int:
    """Bytes of an entry that do not grow with tokens."""
    return 0 if grows_with_tokens(entry) else int(getattr(entry, "nbytes", 0))


# --- what mlx-lm reads through transformers ---------------------------------------------------------------------------


def config_class(family: str) -> Any:
    """transformers' config class of a family.

    Raises:
        KeyError: transformers does not support the family.
    """
    purpose = "fill in what a config leaves to its family's defaults"
    return find("transformers", "transformers.models.auto.configuration_auto", "CONFIG_MAPPING", purpose)[family]


# --- messages ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence mlx-lm and transformers while a config is read or a model is built."""
    loggers = [logging.getLogger(name) for name in ("transformers", "mlx_lm")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
