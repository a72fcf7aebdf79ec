"""Multi-token prediction as tensors: those that DeepSeek-V3's module adds to a model, for any family of decoder layers.

Module k, counted from 0, is layer `num_layers + k` of the checkpoint, as DeepSeek-V3's own files and the tools that read
them number it: the tensors of one more decoder layer, and `enorm` and `hnorm` (norms of the embedding and of the
hidden state), `eh_proj` (hidden <- 2 hidden) and `shared_head.norm`. Source: 2412.19437, section 2.2.
"""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from partita.core.model.spec import ModelSpec, TensorSpec
from partita.errors import PlanError

NORMS = ("enorm", "hnorm", "shared_head.norm")
"""Modules of a prediction layer that are norms like the model's last one."""

PROJECTION = "eh_proj"
"""The linear layer that combines an embedding and a hidden state into one hidden state."""

SHARED = ("embed_tokens", "shared_head.head")
"""The tensors that a checkpoint repeats for each prediction layer: the main model's embedding and head."""


def final_norm(spec: ModelSpec) -> str:
    """The path of the norm after the last layer.

    Raises:
        PlanError: The model has no such norm.
    """
    in_layers = [i for i, name in enumerate(spec.tensors) if spec.layer_of(name) is not None]
    for name in list(spec.tensors)[in_layers[-1] + 1 :] if in_layers else ():
        if name.startswith(spec.prefix) and spec.layer_of(name) is None and len(spec.tensors[name].shape) == 1:
            return name.rpartition(".")[0]
    raise PlanError(
        f"{spec.family} has no norm after its last layer, so it does not support multi-token prediction (m). Leave `m` out "
        "of the layout."
    )


def mtp_count(spec: ModelSpec) -> int:
    """The number of prediction layers among the tensors of `spec`."""
    layers = (spec.layer_of(name) for name in spec.tensors)
    return max((layer + 1 - spec.num_layers for layer in layers if layer is not None), default=0)


def with_mtp(spec: ModelSpec, count: int) -> ModelSpec:
    """`spec` with the tensors of `count` prediction layers after those of its last layer.

    Raises:
        PlanError: The model does not predict tokens from decoder layers, or holds another number of prediction layers.
    """
    if count == 0 or mtp_count(spec) == count:
        return spec
    if "CausalLM" not in spec.architecture and "LMHead" not in spec.architecture:
        raise PlanError(
            f"{spec.architecture or spec.family} does not predict the next token, so it cannot predict several (m). Leave `m` "
            "out of the layout."
        )
    norm = final_norm(spec)
    last = f"{spec.layers}.{spec.num_layers - 1}."
    layer = {n.removeprefix(last): t for n, t in spec.tensors.items() if n.startswith(last)}
    norms = {n.removeprefix(f"{norm}."): t for n, t in spec.tensors.items() if n.startswith(f"{norm}.")}
    hidden = next(iter(norms.values())).shape[0]
    behind = last + next(reversed(layer))
    tensors: dict[str, TensorSpec] = {}
    for name, tensor in spec.tensors.items():
        tensors[name] = tensor
        if name != behind:
            continue
        for k in range(count):
            made = {part: (t.shape, t.is_buffer) for part, t in layer.items()}
            made |= {f"{module}.{part}": (t.shape, False) for module in NORMS[:2] for part, t in norms.items()}
            made[f"{PROJECTION}.weight"] = ((hidden, 2 * hidden), False)
            made |= {f"{NORMS[2]}.{part}": (t.shape, False) for part, t in norms.items()}
            for part, (shape, is_buffer) in made.items():
                path = f"{spec.layers}.{spec.num_layers + k}.{part}"
                tensors[path] = TensorSpec(path, shape, is_buffer=is_buffer)
    linears = spec.linears
    if linears is not None:
        extra = [path.removeprefix(last) for path in linears if path.startswith(last)]
        heads = [f"{spec.layers}.{spec.num_layers + k}." for k in range(count)]
        linears = linears | {head + part for head in heads for part in (*extra, PROJECTION)}
    return replace(spec, tensors=MappingProxyType(tensors), linears=linears)
