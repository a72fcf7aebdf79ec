"""Compiling a split model: `torch.compile` of each layer, with the collectives in the graph."""

from __future__ import annotations

from torch import nn

from partita.errors import ModelError
from partita.torch.collectives.collective_errors import collective_errors
from partita.torch.layers.compiled import compile_each
from partita.torch.model.parts import plan_of
from partita.torch.quantized.tensor import has_quantized


def compile_layers(model: nn.Module, *, generates: bool = False) -> int:
    """Compile each layer of a split model in place, with torch's default compiler; every rank must call it.

    A layer is compiled when it first runs, and again for other shapes, by each rank for itself. Its collectives become
    operators of the graph. With dropout in a layer that tensor ranks split, the layer becomes several graphs.

    Args:
        model: A result of `load`, `shard` or `fresh`.
        generates: Whether the layers will run with a cache of any length, as in `generate`, instead of training.

    Returns:
        The number of layers that this rank holds.

    Raises:
        ModelError: A rank has no C++ compiler, the weights are quantized, or tokens are sent to their experts; on every rank.

    Examples:
        >>> model = pt.load("./model", tp=2)
        >>> pt.compile_layers(model)
        2
    """
    plan, groups = plan_of(model)
    with collective_errors(groups):
        if has_quantized(model):
            raise ModelError(
                "the layers of a quantized model cannot be compiled: each weight would become a graph of its own. Leave "
                "compile out, or call partita.torch.dequantize(model) first."
            )
        if plan.mesh.experts_send_tokens:
            raise ModelError(
                f"ep={plan.mesh.ep} sends each token to the ranks of its experts, whose numbers differ from step to step, so "
                "the layers cannot be compiled. Leave compile out, or use ep=tp, or tp without ep."
            )
        return compile_each(model, plan, generates=generates)
