"""What a rank writes of a checkpoint of a run: its own part of weights and moments, dealt out over the replicas."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx
import mlx.nn as nn

from partita.checkpoint.index import MODEL
from partita.checkpoint.write import FilePlan, plan_files
from partita.mlx.apply import plan_of
from partita.mlx.moments import moments_of
from partita.mlx.optimizer import AdamW
from partita.mlx.save import on_disk
from partita.mlx.together import together
from partita.mlx.trainable import Trainable
from partita.training.background import Part
from partita.training.saving import OPTIMIZER, Saves


class Share:
    """See `partita.training.saving.Share`.

    Attributes:
        files: The files of weights and of moments, the same on every rank, by how their names begin.
        beside: Configs and tokenizer, by name, on the first rank.
    """

    def __init__(self, model: nn.Module, trainable: Trainable, optimizer: AdamW, saves: Saves) -> None:
        """Of a model in training; every rank of the run calls it.

        Raises:
            ModelError: The model has arrays that the unsplit one has not, such as adapters.
        """
        self.model, self.trainable, self.optimizer = model, trainable, optimizer
        self.plan, self.groups = plan_of(model)
        self.disk = on_disk(model)
        trained = {n for names in self.groups.pp.all_gather_object(list(trainable.names)) for n in names}
        with together(self.groups):
            tensors = self.disk.tensors(trained.__contains__)
            moments = [(f"{kind}.{name}", *facts) for kind in moments_of(optimizer) for name, *facts in tensors]
            self.files: Mapping[str, tuple[FilePlan, ...]] = {
                MODEL: plan_files(self.disk.tensors(), saves.max_shard_bytes),
                OPTIMIZER: plan_files(moments, saves.max_shard_bytes, stem=OPTIMIZER),  # type: ignore[arg-type]
            }
            self.beside: Mapping[str, bytes] = self._beside(saves) if self.groups.rank == 0 else {}

    def _beside(self, saves: Saves) -> dict[str, bytes]:
        with TemporaryDirectory() as made:
            folder = Path(made)
            self.disk.write_beside(folder, saves.tokenizer)
            files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
            return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}

    def copy(self) -> list[Part]:
        """The present values of all that this rank writes: of what replicas hold alike each writes its share."""
        parts: list[Part] = []
        for index, (name, (home, key)) in enumerate(self.disk.own(self.model, self.plan, self.groups).items()):
            if index % self.groups.dp.size != self.groups.dp.rank:
                continue
            arrays = {"": home[key]}
            if name in self.trainable.homes:
                for kind, moments in moments_of(self.optimizer).items():
                    # Before the first step there are none, which is to say zeros.
                    arrays[f"{kind}."] = moments.get(name, mx.zeros_like(home[key]))
            for prefix, array in arrays.items():
                for box, take, data in self.disk.parts(name, home, key, array, self.plan, self.groups):
                    parts.append(Part(prefix + box, take, data))
        return parts
