"""Watching a split model in a training loop of the user's own."""

from __future__ import annotations

import threading
from typing import Any, TypeVar

from torch import Tensor, nn

from partita.core.mesh import Mesh
from partita.errors import ModelError
from partita.torch.collectives.collective_errors import collective_errors
from partita.torch.collectives.groups import ParallelGroups
from partita.torch.loops import norms, optimizers, wrappers
from partita.torch.loops.members import MEMBER, Member
from partita.torch.loops.states import watch_states
from partita.torch.model.parts import is_split, local_tensors, plan_of

M = TypeVar("M", bound=nn.Module)

_installed = threading.Event()


def watch(model: M) -> M:
    """Make what torch's users call around a split `model` exact, or raise an error. Returns the model.

    torch's functions are extended once, when the first model is split; for anything else they run as before.
    """
    if not is_split(model):
        return model
    if not _installed.is_set():
        _installed.set()
        for part in (norms, optimizers, wrappers):
            part.install()
    optimizers.forget_checks()
    wrappers.refuse_fsdp()
    Member(model)
    watch_states(model)
    model.register_forward_pre_hook(_before_training, with_kwargs=True)
    return model


_SEEN = "_partita_seen"


def _before_training(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Check the first call in training.

    Raises:
        ModelError: The parameters or the inputs are not those of a split model; on every rank.
    """
    if not model.training or _SEEN in vars(model):
        return
    vars(model)[_SEEN] = True
    _, groups = plan_of(model)
    refuse_sent_experts(groups.mesh)
    with collective_errors(groups):
        _refuse_replaced(model)
    _compare_inputs(groups, args, kwargs)


def refuse_sent_experts(mesh: Mesh) -> None:
    """Raise `ModelError` for experts to which tokens are sent: only `train` sums their gradients over the ranks with copies."""
    if mesh.experts_send_tokens:
        raise ModelError(
            f"ep={mesh.ep} sends tokens to experts on other ranks, which a loop of your own or a Trainer cannot train: the "
            "gradients of experts are summed over other ranks than the rest. Use partita.torch.train, or ep=tp, or no ep."
        )


def _refuse_replaced(model: nn.Module) -> None:
    """Raise for parameters that are not those of the split, whose gradients nothing would sum over the ranks."""
    plan, _ = plan_of(model)
    member = vars(model)[MEMBER]
    for name, tensor in local_tensors(model, plan).items() if member.model is model and member.original else ():
        if isinstance(tensor, nn.Parameter) and getattr(tensor, MEMBER, None) is not member:
            raise ModelError(
                f"{name} of the split model was replaced, by FSDP, resize_token_embeddings, load_state_dict(assign=True) or "
                "similar, which drops the sum of its gradient over the ranks. Change the unsplit model before it is split, "
                "or copy values in place."
            )


def _compare_inputs(groups: ParallelGroups, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Compare the inputs over the tensor ranks and stages, which all need the same rows.

    Raises:
        ModelError: They differ, for example because a sampler distributed the data over all ranks; on every rank.
    """
    own = [_summary(value) for value in (*args, *(kwargs[name] for name in sorted(kwargs)))]
    for axis, comm in (("tp", groups.tp), ("pp", groups.pp)):
        summaries = comm.all_gather_object(own)
        other = next((rank for rank, one in enumerate(summaries) if one != summaries[0]), None)
        if other is not None:
            raise ModelError(
                f"{axis} ranks 0 and {other} were called with different inputs, but the {axis} ranks of a replica compute "
                f"one model and need the same rows. Distribute the data over dp: num_replicas={groups.dp.size} and rank="
                f"{groups.dp.rank} for this rank (partita.torch.plan_of(model)[1].dp), and seed its order alike."
            )


def _summary(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return None
    flat = value.detach().double().reshape(-1)
    # A sum that sees the order, bit for bit the same for the same values.
    weighted = flat @ flat.new_ones(flat.shape).cumsum(0)
    return str(value.dtype), tuple(value.shape), str(float(flat.sum())), str(float(weighted))
