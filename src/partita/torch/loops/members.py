"""The split models of this process, and which of them a parameter belongs to."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from partita.errors import ModelError
from partita.torch.collectives.groups import ParallelGroups
from partita.torch.model.parts import plan_of, unsplit_name
from partita.torch.training.norms import Places, owned_parts

_models: weakref.WeakSet[nn.Module] = weakref.WeakSet()


MEMBER = "_partita_member"


class Member:
    """Held by a split model and by each of its parameters: registers copies of the model, and refuses to be pickled.

    Parameters hold their model through it, so that a loop that keeps only a submodule is still recognized.
    """

    def __init__(self, model: nn.Module) -> None:
        """Register `model` and its parameters."""
        self.model = model
        self.original = True
        _models.add(model)
        for holder in (model, *model.parameters()):
            # First, so that pickling reaches it before anything else that cannot be pickled.
            others = dict(vars(holder))
            vars(holder).clear()
            vars(holder).update({MEMBER: self, **others})

    def __deepcopy__(self, memo: dict[int, Any]) -> Member:
        """The member of the copied model. Its parameters do not exist yet."""
        twin = Member.__new__(Member)
        twin.original = False
        twin.model = memo.get(id(self.model), self.model)
        _models.add(twin.model)
        return twin

    def __reduce__(self) -> Any:
        raise ModelError(
            "a split model cannot be pickled: the file would have only this rank's part. Call partita.torch.save(model, "
            "folder) on every rank, which writes the unsplit model, or save each rank's model.state_dict() in its own file."
        )


def split_models() -> list[nn.Module]:
    """The split models of this process."""
    return list(_models)


def model_of(parameters: Iterable[Tensor]) -> nn.Module | None:
    """The split model that any of `parameters` belongs to, or None.

    Raises:
        ModelError: They belong to models with different groups.
    """
    keys = {id(parameter) for parameter in parameters}
    found = [model for model in _models if any(id(p) in keys for p in model.parameters())]
    if any(plan_of(model)[1] is not plan_of(found[0])[1] for model in found):
        raise ModelError(
            "the parameters belong to models that are split over different groups. Handle each model by itself."
        )
    return found[0] if found else None


def only_groups() -> ParallelGroups | None:
    """The groups of all split models with several stages, if they are the same; a rank may have no parameter of its stage."""
    groups = {id(g): g for _, g in map(plan_of, _models) if g.pp.size > 1}
    return next(iter(groups.values())) if len(groups) == 1 else None


def owned_by_rank() -> dict[int, Places]:
    """What this rank owns of each parameter of every split model, by the parameter's `id`."""
    return {key: places for model in _models for key, places in owned_parts(model, *plan_of(model)).items()}


def split_names(model: nn.Module, parameters: Iterable[Tensor]) -> list[str]:
    """The unsplit names of those of `parameters` of which this rank holds only a part of the unsplit tensor."""
    plan, groups = plan_of(model)
    keys = {id(parameter) for parameter in parameters}
    if groups.tp.size == 1:
        return []
    names = []
    for name, parameter in model.named_parameters():
        if id(parameter) in keys:
            unsplit = unsplit_name(name)
            cut = plan.cuts.get(unsplit)
            # An adapter has no cut of its own, but one of its two parts is split with its layer.
            if cut.split is not None if cut is not None else unsplit != name:
                names.append(unsplit)
    return names
