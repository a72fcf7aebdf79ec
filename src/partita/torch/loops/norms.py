"""torch's clipping functions on a split model: the norm of the unsplit gradient, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from partita.dependencies import lacking
from partita.torch.collectives.groups import ParallelGroups
from partita.torch.loops.members import model_of, only_groups, owned_by_rank, split_models
from partita.torch.model.parts import plan_of
from partita.torch.training.norms import Places, unsplit_norm


def clip_grad_norm_(
    model_or_parameters: nn.Module | Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale gradients in place so that the norm of the unsplit gradient is at most `max_norm`.

    `torch.nn.utils.clip_grad_norm_` computes the same once a model is split. Every rank must call it. Each element of the
    unsplit gradient counts once, wherever it is stored: a replicated weight on one tensor rank, a tied head on one stage.
    Parameters that belong to no split model count as equal on every rank.

    Args:
        model_or_parameters: A model, or parameters of one. Gradients of replicas (dp) must be summed already.
        max_norm: The largest norm.
        norm_type: The order of the norm: any number but 0, also `inf`.
        error_if_nonfinite: Whether to raise if the norm is NaN or infinite.
        foreach: Whether to scale with torch's foreach kernels (default: where they are faster).

    Returns:
        The norm before clipping, a scalar, the same on every rank: float64 for float64 gradients, else float32.

    Raises:
        ModelError: `norm_type` is 0, or the parameters belong to models with different groups.
        RuntimeError: The norm is not finite and `error_if_nonfinite` is set; on every rank.

    Examples:
        >>> loss.backward()
        >>> norm = pt.clip_grad_norm_(model, 1.0)
    """
    given = model_or_parameters.parameters() if isinstance(model_or_parameters, nn.Module) else model_or_parameters
    parameters = [given] if isinstance(given, Tensor) else list(given)
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)


def install() -> None:
    """Make `torch.nn.utils.clip_grad_norm_` and `get_total_norm` count the parts of split models on all ranks.

    All of torch's functions compute the norm in one function, `_get_total_norm`. Its body is replaced, and not its name in a
    module, so that functions which a program has imported by name before are correct, too.
    """
    outer: Any = torch.nn.utils.get_total_norm
    inner = getattr(outer, "__wrapped__", None)
    cells = [cell for cell in outer.__closure__ or () if cell.cell_contents is inner]
    if inner is None or not cells:
        raise lacking("torch", "a get_total_norm of another form", "compute the norm of a split model's gradient")
    cells[0].cell_contents = _counting_once(inner)


def _counting_once(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def get_total_norm(
        tensors: Tensor | Iterable[Tensor],
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> Tensor:
        found = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        owner = _owners(found)
        groups = _groups_of(found, owner)
        if groups is None:
            return original(found, norm_type, error_if_nonfinite, foreach)
        known = owned_by_rank()
        # What belongs to no split model is equal on all ranks.
        other: Places = None if groups.tp.rank == groups.pp.rank == 0 else ()
        parts = [(tensor, known.get(owner.get(id(tensor), 0), other)) for tensor in found]
        norm, dtype = unsplit_norm(parts, norm_type, (groups.tp, groups.pp))
        if error_if_nonfinite and not bool(norm.isfinite()):
            raise RuntimeError(
                f"the total norm of order {norm_type} of the gradients is {norm.item()}, so they cannot be clipped. Pass "
                "error_if_nonfinite=False to scale them by it."
            )
        return norm.to(dtype)

    return get_total_norm


def _owners(tensors: list[Tensor]) -> dict[int, int]:
    """The `id` of the parameter that each of `tensors` is, or is the gradient of, by the tensor's `id`."""
    wanted = {id(tensor) for tensor in tensors}
    owners = {}
    for model in split_models():
        for parameter in model.parameters():
            for key in (id(parameter), id(parameter.grad)):
                if key in wanted:
                    owners[key] = id(parameter)
    return owners


def _groups_of(tensors: list[Tensor], owners: dict[int, int]) -> ParallelGroups | None:
    """The groups over which a norm is computed, or None for tensors of no split model."""
    if not tensors:
        return only_groups()
    if not owners:
        return None
    keys = set(owners.values())
    model = model_of(p for one in split_models() for p in one.parameters() if id(p) in keys)
    return plan_of(model)[1] if model is not None else None
