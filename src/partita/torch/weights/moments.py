"""AdamW's running means of gradients and of their squares, and its master weights, by the names in the unsplit model."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from partita.checkpoint.header import TensorInfo
from partita.checkpoint.index import Checkpoint, open_checkpoint
from partita.checkpoint.manifest import OPTIMIZER
from partita.checkpoint.read import Range, Reader
from partita.core.optimizers import ALL_MOMENTS, moments_of
from partita.core.plan import Plan
from partita.errors import CheckpointError
from partita.torch.collectives.collective_errors import collective_errors
from partita.torch.model.parts import local_tensors, plan_of
from partita.torch.training.optimizer import Mastered, initial_state, state_dtype, state_kinds
from partita.torch.training.sharded import ShardedOptimizer
from partita.torch.training.shards import Slot
from partita.torch.weights.adapter_parts import AdapterPart, adapter_name, adapter_parts
from partita.torch.weights.fill import DTYPES, CheckpointFill
from partita.torch.weights.names import Source, pieces_for_writing, repeated_pieces, sources_for_reading
from partita.torch.weights.save import unsplit_on_meta
from partita.training.resume import refuse_left_out
from partita.training.saving import HAS_MASTER, MASTER, OTHER_DTYPE, moments_in, trained_in
from partita.training.state import read_state


def trained_tensors(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """This rank's part of each trained tensor, by its unsplit name; tied tensors appear under the first name only.

    Raises `ModelError` for adapters that are no LoRA.
    """
    trained: dict[str, Tensor] = {}
    for name, tensor in local_tensors(model, plan).items():
        if tensor.requires_grad:
            trained.setdefault(plan.spec.tensors[name].tied_to or name, tensor)
    parts = trained_parts(model)
    return trained | {name: part.tensor for name, part in parts.items() if part.tensor.requires_grad}


def trained_parts(model: nn.Module) -> dict[str, AdapterPart]:
    """This rank's parts of the adapter that is trained, if there is one."""
    return adapter_parts(model, adapter_name(model))


AnyOptimizer = torch.optim.Optimizer | ShardedOptimizer
"""What `make_optimizer` returns."""


@dataclass(frozen=True)
class Held:
    """The optimizer that steps on this rank.

    Attributes:
        inner: The optimizer of the parameters, or of this replica's shards of them; None on a rank that trains nothing.
        keys: What it steps for each parameter, by the parameter's `id`.
        slots: The shards by the parameter's `id`, if replicas share the state.
    """

    inner: torch.optim.Optimizer | None
    keys: Mapping[int, Tensor]
    slots: Mapping[int, Slot]

    @classmethod
    def of(cls, optimizer: AnyOptimizer | None) -> Held:
        """What `make_optimizer` returned, or the caller's own optimizer."""
        if isinstance(optimizer, ShardedOptimizer):
            trained = {id(slot.parameter): slot.shard for slot in optimizer.trained}
            return cls(optimizer.inner, trained, optimizer.slots)
        groups = [] if optimizer is None else optimizer.param_groups
        return cls(optimizer, {id(p): p for group in groups for p in group["params"]}, {})

    def state(self, tensor: Tensor) -> dict[str, Any]:
        """The state of a parameter, empty before it had a gradient; its tensors may be those of the shard."""
        if self.inner is None or id(tensor) not in self.keys:
            return {}
        return dict(self.inner.state.get(self.keys[id(tensor)], {}))

    def own(self, tensor: Tensor, value: Tensor) -> Tensor:
        """Of a value of the parameter's shape what this replica keeps."""
        slot = self.slots.get(id(tensor))
        return value if slot is None else slot.own(value).clone()


def restore_optimizer(model: nn.Module, optimizer: AnyOptimizer | None, folder: Path) -> None:
    """Load the state of a checkpoint into an optimizer that has not stepped yet. Every rank must call it.

    If the checkpoint has no master weight for a parameter, the parameter in float32 is used.

    Args:
        model: The model that it trains, in any layout, loaded from the same checkpoint.
        optimizer: Its optimizer; None on a rank that trains nothing.
        folder: The checkpoint.

    Raises:
        CheckpointError: The checkpoint has no such state, lacks some parameters, has parameters that the model lacks, or
            has another dtype for a parameter.
    """
    plan, groups = plan_of(model)
    with collective_errors(groups):
        moments, run = open_checkpoint(folder, stem=OPTIMIZER), read_state(folder)
        trained = trained_tensors(model, plan)
        parts = trained_parts(model)
        unsplit, sources = state_sources(model, plan, parts, trained, folder)
        held = Held.of(optimizer)
        inner, master_dtype = held.inner, _master_dtype(held.inner)
        now = {one for name in trained for one in names_on_disk(name, sources)} | _repeated_names(unsplit, plan)
    now = {name for names in groups.pp.all_gather_object(sorted(now)) for name in names}  # type: ignore[attr-defined]
    with collective_errors(groups):
        refuse_left_out(folder, trained_in(moments), now)
        with Reader(moments) as reader:
            for kind in (*ALL_MOMENTS, MASTER):
                part = StateReader(reader, moments, kind)
                fill = CheckpointFill(part, part.infos, sources, unsplit, None, 0)  # type: ignore[arg-type]
                for name, tensor in trained.items():
                    kinds = state_kinds(tensor.dtype, master_dtype, moments_of(run.settings.optimizer, name, plan.spec))
                    if inner is not None and id(tensor) in held.keys and kind in kinds:
                        state = inner.state[held.keys[id(tensor)]]
                        state["step"] = torch.tensor(
                            float(run.count(name, names_on_disk(name, sources))), dtype=torch.float32
                        )
                        if _is_kept(folder, kind, name, tensor, kinds, sources, moments.tensors):
                            cut = plan.tensor(name) if name in plan.spec.tensors else parts[name].cut
                            value = torch.empty_like(
                                tensor, dtype=state_dtype(tensor.dtype, master_dtype), requires_grad=False
                            )
                            fill(name, cut, groups.part(cut), value)
                            state[kind] = held.own(tensor, value)
                        else:
                            state[kind] = initial_state(kind, held.keys[id(tensor)], master_dtype)


def _master_dtype(optimizer: torch.optim.Optimizer | None) -> str:
    return optimizer.param_groups[0].get("master_dtype", "float32") if isinstance(optimizer, Mastered) else "model"


def state_sources(
    model: nn.Module, plan: Plan, parts: Mapping[str, AdapterPart], trained: Mapping[str, Tensor], folder: Path | None
) -> tuple[nn.Module, dict[str, Source]]:
    """Sources of the trained tensors in a checkpoint, and the unsplit model that converters need.

    Without a folder they are the sources of a checkpoint that `save` writes.
    """
    if not trained.keys() & plan.spec.tensors.keys():
        return nn.Module(), {name: parts[name].source for name in trained}
    unsplit = unsplit_on_meta(model, plan)
    if folder is None:
        shapes = {piece.name: piece.shape for one in pieces_for_writing(unsplit).values() for piece in one}
    else:
        shapes = {name: info.shape for name, info in open_checkpoint(folder).tensors.items()}
    return unsplit, sources_for_reading(unsplit, shapes)[0]


def _is_kept(
    folder: Path,
    kind: str,
    name: str,
    tensor: Tensor,
    kinds: Sequence[str],
    sources: Mapping[str, Source],
    infos: Mapping[str, TensorInfo],
) -> bool:
    """Whether a checkpoint has the state `kind` of a parameter; master weights are optional.

    Raises:
        CheckpointError: It has none, or one for another dtype.
    """
    wanted = names_on_disk(name, sources)
    missing = [one for one in wanted if f"{kind}.{one}" not in infos]
    if missing and kind != MASTER:
        raise CheckpointError(
            f"{folder}: has no {kind}.{missing[0]}, so {name} was not trained in that run. Train the same parameters."
        )
    moment, has_master = infos[f"{kinds[0]}.{wanted[0]}"], f"{MASTER}.{wanted[0]}" in infos
    if has_master and MASTER not in kinds:
        raise CheckpointError(HAS_MASTER.format(folder, f"{MASTER}.{wanted[0]}", name, tensor.dtype))
    if MASTER in kinds and not has_master and DTYPES[moment.dtype] != tensor.dtype:
        raise CheckpointError(OTHER_DTYPE.format(folder, moment.name, moment.dtype, name, tensor.dtype))
    return not missing


def names_on_disk(name: str, sources: Mapping[str, Source]) -> list[str]:
    """The names of the tensors on disk that hold the tensor `name`."""
    source = sources.get(name, Source())
    return [piece.name for piece in source.pieces] or [one for one, _ in source.inputs] or [name]


def _repeated_names(unsplit: nn.Module, plan: Plan) -> set[str]:
    """Tensors that a checkpoint repeats for layers of multi-token prediction."""
    if plan.num_mtp == 0 or not dict(unsplit.named_parameters()):
        return set()
    pieces = repeated_pieces(unsplit, plan, dict.fromkeys(plan.spec.tensors, ()))
    return {piece.name for made in pieces.values() for piece in made}


@dataclass(frozen=True)
class StateReader:
    """The state of one kind as a separate checkpoint, with the parameters' names."""

    reader: Reader
    checkpoint: Checkpoint
    kind: str

    @functools.cached_property
    def infos(self) -> dict[str, TensorInfo]:
        """The facts of this kind, by parameter name."""
        return moments_in(self.checkpoint, self.kind)

    def read(self, name: str, ranges_by_dim: Sequence[Sequence[Range]], out: memoryview) -> None:
        """As `Reader.read`, by parameter name."""
        self.reader.read(f"{self.kind}.{name}", ranges_by_dim, out)
