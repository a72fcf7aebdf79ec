"""A rank's part of a run's checkpoint: its weights, moments and master weights, distributed over the replicas."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import mlx.nn as nn

from partita.checkpoint.index import MODEL
from partita.checkpoint.manifest import OPTIMIZER
from partita.checkpoint.unused import Unused
from partita.checkpoint.write import FilePlan, plan_files
from partita.errors import ModelError
from partita.mlx.collectives.collective_errors import collective_errors
from partita.mlx.model.parts import plan_of
from partita.mlx.model.trainable import Trainable
from partita.mlx.training.optimizer import Optimizer
from partita.mlx.weights.adapter_places import adapters
from partita.mlx.weights.moments import initial_state, state_of
from partita.mlx.weights.names import DTYPES
from partita.mlx.weights.peft_format import AdaptersOnDisk, adapters_on_disk
from partita.mlx.weights.save import DTYPE_NAMES, OnDisk, on_disk
from partita.training.adapter_files import STEM
from partita.training.background import Part
from partita.training.base import place_of
from partita.training.saving import MASTER, Saves, check_base, files_beside


class RankShard:
    """See `partita.training.saving.RankShard`. Only the adapters of a model that has any are written.

    Attributes:
        files: The files of weights and optimizer state, the same on every rank, by name prefix.
        beside: Configs and tokenizer, by name, on the first rank.
    """

    def __init__(self, model: nn.Module, trainable: Trainable, optimizer: Optimizer, saves: Saves) -> None:
        """Create the shard of a model in training. Every rank of the run must call it.

        Raises:
            ModelError: The model has adapters, and `saves` does not name their base model; or some are not plain LoRA, or more
                than the adapters is trained; or the model has arrays that the unsplit model lacks.
        """
        self.model, self.trainable, self.optimizer = model, trainable, optimizer
        self.plan, self.groups = plan_of(model)
        adapted = any(self.groups.pp.all_gather_object(bool(adapters(model))))
        check_base(saves, adapted=adapted)
        self.disk: OnDisk | AdaptersOnDisk = (
            adapters_on_disk(model, place_of(saves.base)) if saves.base is not None else on_disk(model)
        )
        trained = {n for names in self.groups.pp.all_gather_object(list(trainable.names)) for n in names}
        with collective_errors(self.groups):
            if adapted:
                _refuse_others(trained - self.disk.boxes.keys())
            tensors = self.disk.tensors(trained.__contains__)
            state = [
                (f"{kind}.{name}", DTYPE_NAMES[optimizer.state_dtype(DTYPES[dtype])], shape)
                for kind in (*optimizer.moments, MASTER)
                for name, dtype, shape in tensors
                if kind in state_of(optimizer, DTYPES[dtype])
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
                files_beside(lambda folder: self.disk.write_beside(folder, saves.tokenizer))
                if self.groups.rank == 0
                else {}
            )

    def copy(self) -> list[Part]:
        """The current values that this rank writes; each replica writes its share of replicated tensors."""
        parts: list[Part] = []
        for index, (name, (home, key)) in enumerate(self.disk.own(self.model, self.plan, self.groups).items()):
            if index % self.groups.dp.size != self.groups.dp.rank:
                continue
            arrays = {"": home[key]}
            if name in self.trainable.homes:
                for kind, state in state_of(self.optimizer, home[key].dtype).items():
                    # There is no state before the first step.
                    arrays[f"{kind}."] = (
                        state[name] if name in state else initial_state(kind, home[key], self.optimizer)
                    )
            for prefix, array in arrays.items():
                for box, take, data in self.disk.parts(name, home, key, array, self.plan, self.groups):
                    parts.append(Part(prefix + box, take, data))
        if self.reader is not None:
            pieces = self.unused.pieces(self.reader, self.groups.rank, self.groups.mesh.size)
            parts += [Part(*piece) for piece in pieces]
        return parts

    def counts(self, step: int) -> dict[str, int]:
        """AdamW's step counts of this rank's parameters, by name on disk, where they differ from `step`."""
        counts: dict[str, int] = {}
        for name in self.disk.own(self.model, self.plan, self.groups).keys() & self.trainable.homes.keys():
            count = self.optimizer.steps.get(name, 0)
            counts |= {box.name: count for box in self.disk.boxes[name] if count != step}
        return counts


def _refuse_others(names: set[str]) -> None:
    if names:
        raise ModelError(
            f"{min(names)} is trained besides the adapters, but only the adapters are saved. Freeze it, or train the unsplit "
            "model."
        )
