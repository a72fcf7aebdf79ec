"""The tree of an MLX model: modules by their path, and where each array of the unsplit model is stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from partita.errors import ModelError

Home = tuple[Any, Any]
"""A module, dict or list, and the key under which it holds an array."""


def children(node: Any) -> Iterator[tuple[Any, Any]]:
    """Entries of a module, dict or list of a model's tree, by key, without a module's private attributes."""
    if isinstance(node, nn.Module):
        yield from ((key, value) for key, value in node.items() if not key.startswith("_"))
    elif isinstance(node, dict):
        yield from node.items()
    elif isinstance(node, list):
        yield from enumerate(node)


def get_module(model: nn.Module, path: str) -> Any:
    """The module (or list, or dict) at `path`, the model itself for an empty one.

    Raises:
        ModelError: There is no such module.
    """
    node: Any = model
    for part in path.split(".") if path else ():
        found = {str(key): value for key, value in children(node)}.get(part)
        if found is None:
            raise ModelError(f"the model ({type(model).__name__}) has no module {path}.")
        node = found
    return node


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replace the module at `path` by `module`."""
    parent, _, name = path.rpartition(".")
    node = get_module(model, parent)
    if isinstance(node, list):
        node[int(name)] = module
    else:
        node[name] = module


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by its path, in the model's own order; the model itself under the empty path."""
    found: dict[str, nn.Module] = {}

    def walk(node: Any, path: str) -> None:
        if isinstance(node, nn.Module):
            found[path] = node
        for key, child in children(node):
            if isinstance(child, (dict, list)):
                walk(child, f"{path}.{key}" if path else str(key))

    walk(model, "")
    return found


def every_array(model: nn.Module) -> list[mx.array]:
    """All arrays of a model's modules, including those that are not parameters (rotary frequencies)."""
    arrays: list[mx.array] = []

    def walk(node: Any) -> None:
        if isinstance(node, mx.array):
            arrays.append(node)
        elif isinstance(node, (dict, list, tuple)):
            for child in node.values() if isinstance(node, dict) else node:
                walk(child)
            if isinstance(node, nn.Module):
                for value in vars(node).values():
                    walk(value)

    walk(model)
    return arrays
