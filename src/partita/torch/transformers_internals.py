"""The parts of transformers that differ between its versions, found by what the installed version has."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

_CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""Names of a model's cache, as an argument of `forward` and as a field of its output; the first since transformers 5.24."""


def cache_argument(model: nn.Module) -> str:
    """The name of the argument of `model.forward` that takes the cache."""
    parameters = inspect.signature(type(model).forward).parameters
    return next((name for name in _CACHE_NAMES if name in parameters), _cache_field())


@functools.cache
def _cache_field() -> str:
    """The name of the cache in the outputs of the installed transformers."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    fields = {field.name for field in dataclasses.fields(CausalLMOutputWithPast)}
    return next(name for name in _CACHE_NAMES if name in fields)


def rename_cache(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`inputs` of a forward with the cache, where there is one, under the name that `model.forward` takes it by."""
    name = cache_argument(model)
    return {name if key in _CACHE_NAMES else key: value for key, value in inputs.items()}


def cache_of(output: Any) -> Any:
    """The cache in the output of a model, or None."""
    if dataclasses.is_dataclass(output):
        # Outputs answer to the old names too, with a warning.
        names = {field.name for field in dataclasses.fields(output)}
        return next((getattr(output, name) for name in _CACHE_NAMES if name in names), None)
    return next((value for name in _CACHE_NAMES if (value := getattr(output, name, None)) is not None), None)
