"""A rank's part of a run's checkpoint: its weights, moments and master weights, distributed over the replicas."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from partita.checkpoint.index import MODEL
from partita.checkpoint.manifest import OPTIMIZER
from partita.checkpoint.unused import Unused
from partita.checkpoint.write import FilePlan, plan_files
from partita.core.optimizers import ALL_MOMENTS, moments_of
from partita.errors import ModelError
from partita.torch.collectives.collective_errors import collective_errors
from partita.torch.model.parts import plan_of
from partita.torch.training.optimizer import initial_state, state_dtype, state_kinds
from partita.torch.training.shards import unsharded
from partita.torch.weights.adapters import adapters
from partita.torch.weights.fill import memory_of
from partita.torch.weights.moments import AnyOptimizer, Held, trained_tensors
from partita.torch.weights.optimizer_state import OPTIONS, optimizer_on_disk
from partita.torch.weights.peft_format import AdaptersOnDisk, adapters_on_disk
from partita.torch.weights.save import DTYPE_NAMES, OnDisk, on_disk
from partita.training.adapter_files import STEM
from partita.training.background import Part
from partita.training.base import place_of
from partita.training.saving import MASTER, Saves, check_base, files_beside
from partita.training.settings import TrainSettings

_Place = tuple[str, list[list[tuple[int, int]]], Tensor, Tensor | None]
"""A tensor on disk: its name, the ranges of each dim, their values, and the tensor that these are part of and that training
changes later."""


class RankShard:
    """See `partita.training.saving.RankShard`. Only the adapters of a model that has any are written.

    Attributes:
        files: The files of weights and optimizer state, the same on every rank, by name prefix.
        beside: Configs and tokenizer, by name, on the first rank.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: AnyOptimizer | None,
        saves: Saves,
        settings: TrainSettings,
        *,
        is_own: bool = False,
    ) -> None:
        """Create the shard of a model in training. Every rank of the run must call it.

        Args:
            model: The model.
            optimizer: Its optimizer; None on a rank that trains nothing.
            saves: The settings for checkpoints.
            settings: The training settings.
            is_own: Whether the optimizer is the caller's, whose state is known once it has stepped.

        Raises:
            ModelError: The model has adapters, and `saves` does not name their base model; or some are not plain LoRA, or more
                than the adapters is trained.
        """
        self.model, self.optimizer, self.settings, self.saves, self.is_own = model, optimizer, settings, saves, is_own
        self.plan, self.groups = plan_of(model)
        adapted = any(self.groups.pp.all_gather_object(bool(adapters(model))))
        check_base(saves, adapted=adapted)
        self.disk: OnDisk | AdaptersOnDisk = (
            adapters_on_disk(model, place_of(saves.base)) if saves.base is not None else on_disk(model)
        )
        self.held = Held.of(optimizer)
        mine = trained_tensors(model, self.plan)
        self.trained = {id(tensor) for tensor in mine.values()}  # whatever is frozen later, for a while
        trained: set[str] = set()
        for names in self.groups.pp.all_gather_object(list(mine)):
            trained |= set(names)  # type: ignore[call-overload]
        with collective_errors(self.groups):
            if adapted:
                _refuse_others(trained - self.disk.dtypes.keys())
            state = [
                (f"{kind}.{piece.name}", DTYPE_NAMES[state_dtype(dtype, settings.master_dtype)], piece.shape)
                for kind in (*ALL_MOMENTS, MASTER)
                for name, dtype in self.disk.dtypes.items()
                if not is_own and name in trained and kind in self._kinds(name, dtype)
                for piece in self.disk.pieces[name]
            ]
            self.files: Mapping[str, tuple[FilePlan, ...]] = {
                STEM if adapted else MODEL: self.disk.files(saves.max_shard_bytes),
                OPTIMIZER: plan_files(state, saves.max_shard_bytes, stem=OPTIMIZER),
            }
            # Open it now: a run that resumed from its own checkpoint may remove that checkpoint.
            self.unused = Unused() if isinstance(self.disk, AdaptersOnDisk) else self.disk.unused
            self.reader = self.unused.opened() if self.unused else None
            if self.reader is not None:
                weakref.finalize(self, self.reader.close)
            self.beside: Mapping[str, bytes] = (
                files_beside(lambda folder: self.disk.write_beside(model, folder, saves.tokenizer))
                if self.groups.rank == 0
                else {}
            )

    @torch.no_grad()
    def copy(self) -> list[Part]:
        """The current values that this rank writes; each replica writes its share of replicated tensors."""
        state = self._own_state() if self.is_own else self._state()
        parts = [
            Part(name, take, memory_of(kept), kept)
            for name, take, part, tensor in (*self._weights(), *state)
            for kept in [part.clone() if _shares_memory(part, tensor) else part]
        ]
        if self.reader is not None:
            parts += [
                Part(*piece) for piece in self.unused.pieces(self.reader, self.groups.rank, self.groups.mesh.size)
            ]
        return parts

    def counts(self, step: int) -> dict[str, int]:
        """AdamW's step counts of this rank's parameters, by name on disk, where they differ from `step`."""
        counts: dict[str, int] = {}
        for name, tensor in self.disk.own(self.model, self.plan, self.groups).items():
            if id(tensor) in self.held.keys and not self.is_own:
                # A parameter that never had a gradient has no state yet.
                count = int(self.held.state(tensor).get("step", 0))
                counts |= {piece.name: count for piece in self.disk.pieces[name] if count != step}
        return counts

    def _kinds(self, name: str, dtype: torch.dtype) -> tuple[str, ...]:
        """Names on disk of the state that the optimizer keeps of a tensor."""
        moments = moments_of(self.settings.optimizer, name, self.plan.spec)
        return state_kinds(dtype, self.settings.master_dtype, moments)

    def _shares(self) -> Iterator[tuple[str, Tensor, bool]]:
        """The tensors that this rank owns, by name, and whether this replica writes them."""
        for index, (name, tensor) in enumerate(self.disk.own(self.model, self.plan, self.groups).items()):
            copies = self.groups.copies(self.plan.cuts.get(name))
            yield name, tensor, index % copies.size == copies.rank

    def _weights(self) -> Iterator[_Place]:
        for name, tensor, mine in self._shares():
            slot = self.held.slots.get(id(tensor))
            is_shard = slot is not None and slot.full is not None
            value = unsharded(slot, slot.shard) if slot is not None and is_shard else tensor
            if mine:
                for piece, take, part in self.disk.parts(name, value, self.plan, self.groups):
                    yield piece, take, part, None if is_shard else value

    def _state(self) -> Iterator[_Place]:
        for name, tensor, mine in self._shares():
            slot = self.held.slots.get(id(tensor))
            if id(tensor) not in self.trained or not (mine or slot is not None):
                continue
            state = self.held.state(tensor)
            for kind in self._kinds(name, tensor.dtype):
                # A parameter that never had a gradient has no state yet.
                one = state.get(kind)
                one = (
                    initial_state(kind, slot.shard if slot else tensor, self.settings.master_dtype)
                    if one is None
                    else one
                )
                one = unsharded(slot, one) if slot is not None else one
                if mine:
                    for piece, take, part in self.disk.parts(name, one, self.plan, self.groups):
                        yield f"{kind}.{piece}", take, part, None if slot is not None else one

    def _own_state(self) -> Iterator[_Place]:
        """The state of the caller's optimizer as it is now; its files are planned again."""
        assert isinstance(self.optimizer, torch.optim.Optimizer)
        state = optimizer_on_disk(self.model, self.optimizer, self.disk, self.saves.max_shard_bytes)
        self.files = {**self.files, OPTIMIZER: state.files}
        self.beside = {**self.beside, OPTIONS: state.text.encode()} if self.groups.rank == 0 else {}
        mine = {name for name, _, mine in self._shares() if mine}
        for (kind, name), tensor in state.tensors.items():
            if name in mine:
                for piece, take, part in self.disk.parts(name, tensor, self.plan, self.groups):
                    yield f"{kind}.{piece}", take, part, tensor


def _refuse_others(names: set[str]) -> None:
    if names:
        raise ModelError(
            f"{min(names)} is trained besides the adapters, but only the adapters are saved. Freeze it "
            "(requires_grad_(False)), or train the whole model."
        )


def _shares_memory(part: Tensor, tensor: Tensor | None) -> bool:
    return tensor is not None and part.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
