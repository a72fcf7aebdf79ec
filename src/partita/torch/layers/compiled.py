"""Compiling the layers of a split model with `torch.compile`, one graph a layer."""

from __future__ import annotations

from typing import Any

from torch import nn

from partita.core.plan import Plan
from partita.errors import ModelError


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of `module` are compiled (`module.compile()`)."""
    return module._compiled_call_impl is not None


def compiled_parts(model: nn.Module) -> set[nn.Module]:
    """The modules that run in compiled graphs: every compiled module and all modules in it."""
    return {part for module in model.modules() if is_compiled(module) for part in module.modules()}


def compile_each(model: nn.Module, plan: Plan, *, generates: bool) -> int:
    """Compile each layer of `model` that this rank holds, and return their number.

    In training, layers of the same shapes share a graph. With a cache each layer needs its own graphs, because the cache's
    entries are guarded, so its recompilations are counted by themselves and any length of the cache is one graph.

    Raises:
        ModelError: There is no C++ compiler.
    """
    _find_compiler()
    layers = model.get_submodule(plan.spec.layers) if plan.spec.layers else nn.ModuleList()
    own = [layer for name, layer in layers.named_children() if name.isdigit()]
    options: dict[str, Any] = {"dynamic": True, "isolate_recompiles": True} if generates else {}
    for layer in own:
        layer.compile(**options)
    return len(own)


def _find_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ModelError(
            "compiling layers needs a C++ compiler, and neither g++ nor what CXX names was found. Install g++ (on Debian: "
            "apt-get install g++), set CXX to a compiler, or leave compiling out."
        ) from error
