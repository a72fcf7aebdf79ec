"""LoRA adapters on disk, unsplit, in peft's format: `PeftModel.from_pretrained` reads them onto transformers' own model."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from partita.checkpoint.index import open_checkpoint, weights_name
from partita.checkpoint.read import Reader
from partita.checkpoint.write import FilePlan, Writer, plan_files, write_folder
from partita.core.plan import Plan
from partita.core.sharding.split import Range
from partita.errors import CheckpointError
from partita.generation import Tokenizer
from partita.torch.collectives.collective_errors import collective_errors
from partita.torch.collectives.groups import ParallelGroups
from partita.torch.model.parts import parameter_homes, plan_of
from partita.torch.weights.adapter_parts import AdapterPart, adapter_name, adapter_parts, is_peft, unwrapped
from partita.torch.weights.adapters import adapters, add_lora, removed_on_error
from partita.torch.weights.fill import CheckpointFill, memory_of
from partita.torch.weights.names import Piece, Source
from partita.torch.weights.peft_models import add_from, config_text
from partita.torch.weights.save import DTYPE_NAMES, own_part, unsplit_on_meta
from partita.training.adapter_files import (
    CONFIG_NAME,
    PREFIX,
    STEM,
    Adapters,
    check_shape,
    find_adapters,
    is_plain,
    only,
    path_of,
    read_adapters,
    refuse_adapted,
    refuse_unplaced,
    targets_of,
)
from partita.training.mlx_adapters import in_peft_format


def save_adapters(
    model: nn.Module, folder: str | os.PathLike[str], *, base: str | None = None, name: str | None = None
) -> None:
    """Write an adapter of a split model, unsplit, in peft's format. Every rank of the run must call it.

    The folder, with `adapter_config.json` and `adapter_model.safetensors`, is created atomically. It does not depend
    on how the model was split.

    Args:
        model: A model with adapters from `add_lora`, `load_adapters` or peft; or peft's model around it.
        folder: Destination; created if needed. It must not hold weights already.
        base: The base model's folder or id for peft (default: where `model` was loaded from).
        name: The adapter, if the model has several.

    Raises:
        ModelError: The model has no adapters, or several and `name` is not one of them, or some that are no LoRA.
        CheckpointError: The folder holds weights already, or cannot be written.
    """
    model = unwrapped(model)
    plan, groups = plan_of(model)
    disk = adapters_on_disk(model, base, name)

    def write(writer: Writer) -> None:
        for part_name, tensor in disk.own(model, plan, groups).items() if groups.replicas.rank == 0 else ():
            for piece, take, part in disk.parts(part_name, tensor, plan, groups):
                writer.write(piece, take, memory_of(part))

    write_folder(
        Path(folder), groups, disk.files(), lambda made: disk.write_beside(model, made, None), write,
        partial(collective_errors, groups),
    )  # fmt: skip


def load_adapters(model: nn.Module, folder: str | os.PathLike[str], *, name: str | None = None) -> list[str]:
    """Add an adapter that peft, `mlx_lm.lora` or `save_adapters` wrote to a split model, trainable.

    Every rank of the run must call it. Each rank reads its own part. All other parameters are frozen.

    Args:
        model: Its base model, from `load`, `shard` or `fresh`, in any layout.
        folder: A folder with `adapter_config.json`, and `adapter_model.safetensors` or mlx-lm's `adapters.safetensors`,
            or the folder of a run that trained adapters.
        name: A name for the adapter, which peft then computes; the model may have several with names, of which
            `set_adapter` chooses one. Without a name it is the only one.

    Returns:
        Paths of this rank's adapted layers.

    Raises:
        CheckpointError: There are none, or they are not LoRA, or not for this model; on every rank.
        ModelError: The model has adapters already, or one of this name.
        ModuleNotFoundError: Adapters with a name, or with more than LoRA of one rank and alpha, need peft.
    """
    model = unwrapped(model)
    plan, groups = plan_of(model)
    with contextlib.ExitStack() as stack:
        with collective_errors(groups):
            place = find_adapters(Path(folder))
            if name is None or not is_peft(model):
                refuse_adapted(bool(adapters(model)))
            source = stack.enter_context(in_peft_format(place, lambda path: _path_here(plan, path)))
            plain = name is None and is_plain(source) and not _adapts_outside_layers(plan, source)
        if plain:
            stack.enter_context(removed_on_error(model))
            return _put_on(model, place, source)
        name = name or "default"
        add_from(model, source, name)
        read_adapter(model, source, name)
    return sorted({part.path for part in adapter_parts(model, name).values()})


def read_adapter(model: nn.Module, folder: Path, name: str) -> None:
    """Fill one of peft's adapters of a split model from a folder in peft's format. Every rank must call it.

    Raises:
        CheckpointError: The folder holds other tensors than the adapter.
    """
    plan, groups = plan_of(model)
    with collective_errors(groups):
        checkpoint = open_checkpoint(folder / weights_name(STEM))
    with collective_errors(groups), Reader(checkpoint) as reader:
        _read_into(model, folder, reader, name)
        _check_base(model, folder, reader)
    wanted = {part for part in checkpoint.tensors if not part.endswith(".base_layer.weight")}
    mine = sorted(part.disk for part in adapter_parts(model, name).values())
    refuse_unplaced(folder, wanted, groups.pp.all_gather_object(mine), plan.spec.family)


def _put_on(model: nn.Module, place: Path, source: Path) -> list[str]:
    """Add the plain adapters in `source`, which has peft's format, to a split model; errors name `place`."""
    plan, groups = plan_of(model)
    with collective_errors(groups):
        kind = read_adapters(source)
        checkpoint = open_checkpoint(source / weights_name(STEM))
        wanted = {path_of(name) for name in checkpoint.tensors}
    put_on = add_lora(model, kind.rank, alpha=kind.alpha, seed=0, dropout=kind.dropout)
    with collective_errors(groups), Reader(checkpoint) as reader:
        paths = {id(part.tensor): part.path for part in adapter_parts(model).values()}
        for parent, name, adapter in adapters(model):
            if paths[id(adapter.lora_A.weight)] not in wanted:  # type: ignore[union-attr]
                setattr(parent, name, adapter.base_layer)
        _read_into(model, place, reader, "default")
    mine = sorted({part.path for part in adapter_parts(model).values()})
    refuse_unplaced(place, wanted, groups.pp.all_gather_object(mine), plan.spec.family)
    return [path for path in put_on if path in wanted]


def _read_into(model: nn.Module, place: Path, reader: Reader, name: str) -> None:
    """Fill this rank's parts of an adapter from its file."""
    _, groups = plan_of(model)
    parts, infos = adapter_parts(model, name), reader.checkpoint.tensors
    for part in parts.values():
        check_shape(place, part.disk, part.cut.shape, infos[part.disk].shape if part.disk in infos else None)
    fill = CheckpointFill(reader, infos, {key: part.source for key, part in parts.items()}, nn.Module(), None, 0)
    for key, part in parts.items():
        fill(key, part.cut, groups.part(part.cut), part.tensor.detach())


def _adapts_outside_layers(plan: Plan, source: Path) -> bool:
    """Whether plain adapters adapt a linear layer such as the head, which `add_lora` leaves out."""
    paths = {path_of(name) for name in open_checkpoint(source / weights_name(STEM)).tensors}
    return any(plan.spec.layer_of(path) is None for path in paths & (plan.spec.linears or frozenset()))


def _check_base(model: nn.Module, place: Path, reader: Reader) -> None:
    """Check that the base embeddings, which peft writes beside their adapters, are the model's."""
    plan, groups = plan_of(model)
    homes = parameter_homes(model)
    for disk, info in reader.checkpoint.tensors.items():
        name = disk.removeprefix(PREFIX).replace(".base_layer.", ".")
        if not disk.endswith(".base_layer.weight") or name not in homes:
            continue
        local, cut = getattr(*homes[name]), plan.tensor(name)
        check_shape(place, disk, cut.shape, info.shape)
        stored = torch.empty_like(local)
        source = Source((Piece(disk, cut.shape, (0,) * len(cut.shape)),))
        CheckpointFill(reader, reader.checkpoint.tensors, {name: source}, nn.Module())(
            name, cut, groups.part(cut), stored
        )
        if not torch.equal(stored, local):
            raise CheckpointError(
                f"{place}: {disk} is not the model's {name}. Use the model that these adapters were trained on."
            )


def _path_here(plan: Plan, path: str) -> str:
    """The path in transformers' model of a module in mlx-lm's model, which omits the prefix of some."""
    return next((one for one in plan.spec.modules if one == path or one.endswith(f".{path}")), path)


@dataclass(frozen=True)
class AdaptersOnDisk:
    """The unsplit adapters of all ranks as stored on disk, the same on every rank; see `save.OnDisk`.

    Attributes:
        own_parts: This rank's parts of the adapter.
        name: The adapter.
        config: The text of `adapter_config.json`.
        pieces: For each tensor, its tensor on disk.
        dtypes: For each tensor, its dtype.
    """

    own_parts: Mapping[str, AdapterPart]
    name: str
    config: str
    pieces: Mapping[str, tuple[Piece, ...]]
    dtypes: Mapping[str, torch.dtype]

    def files(self, max_shard_bytes: int = 0) -> tuple[FilePlan, ...]:
        """The one file that peft reads, whatever its size."""
        tensors = [(p.name, DTYPE_NAMES[dtype], p.shape) for n, dtype in self.dtypes.items() for p in self.pieces[n]]
        return plan_files(tensors, 1 << 62, stem=STEM)

    def own(self, model: nn.Module, plan: Plan, groups: ParallelGroups) -> dict[str, Tensor]:
        """This rank's parts of the adapters."""
        return {key: part.tensor for key, part in adapter_parts(model, self.name).items()}

    def parts(
        self, name: str, tensor: Tensor, plan: Plan, groups: ParallelGroups
    ) -> Iterator[tuple[str, list[list[Range]], Tensor]]:
        """The elements of a part that this rank owns: name on disk, ranges on disk, and values."""
        cut = self.own_parts[name].cut
        for piece in self.pieces[name]:
            overlap = piece.overlap(cut.owned_ranges(groups.part(cut)))
            if overlap is not None:
                held = piece.overlap(cut.ranges(groups.part(cut)))
                yield piece.name, overlap[0], own_part(tensor, held, overlap[0], stacked=False)

    def write_beside(self, model: nn.Module, folder: Path, tokenizer: Tokenizer | None) -> None:
        """Write the config, and the tokenizer if there is one."""
        (folder / CONFIG_NAME).write_text(self.config, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(folder)


def adapters_on_disk(model: nn.Module, base: str | None = None, name: str | None = None) -> AdaptersOnDisk:
    """An unsplit adapter of a split model as stored on disk. Every rank of the run must call it.

    Args:
        model: The split model.
        base: The base model's folder or id (default: where `model` was loaded from).
        name: The adapter, if there are several.

    Raises:
        ModelError: There are none, or several and no name, or some that are no LoRA.
    """
    plan, groups = plan_of(model)
    base = base or getattr(model.config, "_name_or_path", None) or None
    with collective_errors(groups):
        name = adapter_name(model, name)
        parts = adapter_parts(model, name)
        kinds = set() if is_peft(model) else {_kind(adapter) for _, _, adapter in adapters(model)}
        mine = [(key, part.path, part.tensor.dtype, part.source.pieces) for key, part in parts.items()]
    told: list[Any] = groups.pp.all_gather_object((mine, sorted(kinds, key=repr)))
    everywhere = sorted((one for theirs, _ in told for one in theirs), key=lambda one: one[0])
    with collective_errors(groups):
        if is_peft(model):
            config = config_text(model, name, base)
        else:
            kind = only({kind for _, theirs in told for kind in theirs})
            config = _plain_config(model, plan, kind, {path for _, path, _, _ in everywhere}, base)
    pieces = {key: there for key, _, _, there in everywhere}
    return AdaptersOnDisk(parts, name, config, pieces, {key: dtype for key, _, dtype, _ in everywhere})


def _plain_config(model: nn.Module, plan: Plan, kind: Adapters, paths: set[str], base: str | None) -> str:
    unsplit = unsplit_on_meta(model, plan)
    others = {path for path, module in unsplit.named_modules() if hasattr(module, "weight") and path not in paths}
    transposed = {type(unsplit.get_submodule(path)).__name__ == "Conv1D" for path in paths} == {True}
    return kind.to_json(base=base, targets=targets_of(paths, others), transposed=transposed)


def _kind(adapter: Any) -> Adapters:
    """The config of one of our adapters."""
    rank = int(adapter.lora_A.weight.shape[0])
    return Adapters(rank, float(adapter.scaling) * rank, adapter.dropout.p)
