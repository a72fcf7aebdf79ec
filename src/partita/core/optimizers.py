"""The optimizers of both engines, and the state that each keeps of a tensor, as its names on disk."""

from __future__ import annotations

from partita.core.model.spec import ModelSpec
from partita.errors import PlanError

OPTIMIZERS = ("adamw", "sgd", "muon")

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")
"""Running means of the gradients and of their squares, in torch's words."""

MOMENTUM = ("momentum_buffer",)
"""Running sum of the gradients, in torch's word."""

ALL_MOMENTS = (*ADAM_MOMENTS, *MOMENTUM)

_REFUSED = {
    "adafactor": "its row and column means are not tensors of the model's shapes, so a checkpoint, which any layout must read, "
    "cannot keep them",
    "adamw-8bit": "bitsandbytes quantizes moments in blocks of the local tensor, so other layouts would round them differently "
    "and a checkpoint, which any layout must read, cannot keep them",
}


def check_optimizer(name: str) -> None:
    """Raise `PlanError` unless `name` is one of `OPTIMIZERS`."""
    if name in _REFUSED:
        raise PlanError(f"optimizer {name} is not supported: {_REFUSED[name]}. Use {', '.join(OPTIMIZERS)}.")
    if name not in OPTIMIZERS:
        raise PlanError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, but is {name!r}.")


def moments_of(optimizer: str, name: str, spec: ModelSpec) -> tuple[str, ...]:
    """The moments that `optimizer` keeps of the tensor `name`, by its name in the unsplit model or an adapter's."""
    if optimizer == "sgd" or (optimizer == "muon" and is_hidden_matrix(name, spec)):
        return MOMENTUM
    return ADAM_MOMENTS


def is_hidden_matrix(name: str, spec: ModelSpec) -> bool:
    """Whether Muon orthogonalizes the updates of a tensor: matrices of the layers, and stacked matrices of experts.

    Embeddings, heads, vectors, convolutions and adapters are left to AdamW, as Muon's authors do.
    """
    tensor = spec.tensors.get(name)
    if tensor is None or not spec.layers or not name.startswith(f"{spec.layers}."):
        return False
    return len(tensor.shape) == 2 or (len(tensor.shape) == 3 and ".experts." in name)
