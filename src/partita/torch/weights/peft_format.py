"""LoRA adapters on disk, unsplit, in peft's format: `PeftModel.from_pretrained` reads them onto transformers' own model."""

from __future__ import annotations

import contextlib
import os
import re
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
from partita.core.sharding.cuts import TensorPlan
from partita.core.sharding.split import Range, Split
from partita.errors import CheckpointError, ModelError
from partita.generation import Tokenizer
from partita.torch.collectives.collective_errors import collective_errors
from partita.torch.collectives.groups import ParallelGroups
from partita.torch.model.parts import parameter_homes, plan_of
from partita.torch.weights.adapters import adapters, add_lora, removed_on_error
from partita.torch.weights.fill import CheckpointFill, memory_of
from partita.torch.weights.names import Piece, Source
from partita.torch.weights.save import DTYPE_NAMES, own_part, unsplit_on_meta
from partita.training.adapter_files import (
    CONFIG_NAME,
    STEM,
    Adapters,
    Side,
    name_on_disk,
    only,
    path_of,
    read_adapters,
    targets_of,
)
from partita.training.mlx_adapters import in_peft_format

_LORA = re.compile(r"(?P<path>.*)\.lora_(?P<side>[AB])(\.default)?\.weight")
_CUT_SIDE = {"column": "B", "row": "A"}


def save_adapters(model: nn.Module, folder: str | os.PathLike[str], *, base: str | None = None) -> None:
    """Write the LoRA adapters of a split model, unsplit, in peft's format. Every rank of the run must call it.

    The folder, with `adapter_config.json` and `adapter_model.safetensors`, is created atomically. It does not depend
    on how the model was split.

    Args:
        model: A model with adapters from `add_lora` or `load_adapters`.
        folder: Destination; created if needed. It must not hold weights already.
        base: The base model's folder or id for peft (default: where `model` was loaded from).

    Raises:
        ModelError: The model has no adapters, or some that are not plain LoRA of one rank and scale.
        CheckpointError: The folder holds weights already, or cannot be written.
    """
    plan, groups = plan_of(model)
    disk = adapters_on_disk(model, base)

    def write(writer: Writer) -> None:
        for name, tensor in disk.own(model, plan, groups).items():
            for piece, take, part in disk.parts(name, tensor, plan, groups):
                writer.write(piece, take, memory_of(part))

    write_folder(
        Path(folder), groups, disk.files(), lambda made: disk.write_beside(model, made, None), write,
        partial(collective_errors, groups),
    )  # fmt: skip


def load_adapters(model: nn.Module, folder: str | os.PathLike[str]) -> list[str]:
    """Add adapters that peft, `mlx_lm.lora` or `save_adapters` wrote to a split model, trainable.

    Every rank of the run must call it. Each rank reads its own part. All other parameters are frozen.

    Args:
        model: Their base model, from `load`, `shard` or `fresh`, in any layout, without adapters.
        folder: A folder with `adapter_config.json`, and `adapter_model.safetensors` or mlx-lm's `adapters.safetensors`.

    Returns:
        Paths of this rank's adapted layers.

    Raises:
        CheckpointError: There are none, or they are not plain LoRA, or not for this model; on every rank.
        ModelError: The model has adapters already.
    """
    plan, groups = plan_of(model)
    place = Path(folder)
    with contextlib.ExitStack() as stack:
        with collective_errors(groups):
            if adapters(model):
                raise ModelError(
                    "the model has adapters already. Merge them (merge_lora), or load the model without adapters."
                )
            source = stack.enter_context(in_peft_format(place, lambda path: _path_here(plan, path)))
        stack.enter_context(removed_on_error(model))
        return _put_on(model, place, source)


def _put_on(model: nn.Module, place: Path, source: Path) -> list[str]:
    """Add the adapters in `source`, which has peft's format, to a split model; errors name `place`."""
    plan, groups = plan_of(model)
    with collective_errors(groups):
        kind = read_adapters(source)
        checkpoint = open_checkpoint(source / weights_name(STEM))
        wanted = {path_of(name) for name in checkpoint.tensors}
    put_on = add_lora(model, kind.rank, alpha=kind.alpha, seed=0)
    with collective_errors(groups), Reader(checkpoint) as reader:
        paths = {id(tensor): _parsed(name)["path"] for name, tensor in adapter_tensors(model)}
        for parent, name, adapter in adapters(model):
            if paths[id(adapter.lora_A.weight)] not in wanted:  # type: ignore[union-attr]
                setattr(parent, name, adapter.base_layer)
        tensors = dict(adapter_tensors(model))
        sources = adapter_sources(tensors, plan, groups)
        _check_shapes(place, sources, {name: info.shape for name, info in checkpoint.tensors.items()})
        fill = CheckpointFill(reader, checkpoint.tensors, sources, nn.Module(), None, 0)
        for name, tensor in tensors.items():
            fill(name, adapter_cut(name, tensor, plan, groups), groups.tp.rank, tensor.detach())
    mine = sorted({_parsed(name)["path"] for name in tensors})
    placed = {path for theirs in groups.pp.all_gather_object(mine) for path in theirs}  # type: ignore[attr-defined]
    if wanted - placed:
        raise CheckpointError(
            f"{place}: adapts {min(wanted - placed)}, which is not a linear layer inside the layers of {plan.spec.family}. Add "
            "these adapters with peft."
        )
    return [path for path in put_on if path in wanted]


def _path_here(plan: Plan, path: str) -> str:
    """The path in transformers' model of a module in mlx-lm's model, which omits the prefix of some."""
    return next((one for one in plan.spec.modules if one == path or one.endswith(f".{path}")), path)


def _check_shapes(folder: Path, sources: Mapping[str, Source], there: Mapping[str, tuple[int, ...]]) -> None:
    for source in sources.values():
        for piece in source.pieces:
            found = there.get(piece.name)
            if found != piece.shape:
                raise CheckpointError(
                    f"{folder}: {piece.name} must be {list(piece.shape)} for this model; got "
                    f"{'no such tensor' if found is None else list(found)}. Use the model that these adapters were trained on."
                )


@dataclass(frozen=True)
class AdaptersOnDisk:
    """The unsplit adapters of all ranks as stored on disk, the same on every rank; see `save.OnDisk`.

    Attributes:
        config: The text of `adapter_config.json`.
        pieces: For each tensor, its tensor on disk.
        dtypes: For each tensor, its dtype.
    """

    config: str
    pieces: Mapping[str, tuple[Piece, ...]]
    dtypes: Mapping[str, torch.dtype]

    def files(self, max_shard_bytes: int = 0) -> tuple[FilePlan, ...]:
        """The one file that peft reads, whatever its size."""
        tensors = [(p.name, DTYPE_NAMES[dtype], p.shape) for n, dtype in self.dtypes.items() for p in self.pieces[n]]
        return plan_files(tensors, 1 << 62, stem=STEM)

    def own(self, model: nn.Module, plan: Plan, groups: ParallelGroups) -> dict[str, Tensor]:
        """This rank's parts of the adapters."""
        return dict(adapter_tensors(model))

    def parts(
        self, name: str, tensor: Tensor, plan: Plan, groups: ParallelGroups
    ) -> Iterator[tuple[str, list[list[Range]], Tensor]]:
        """The elements of a part that this rank owns: name on disk, ranges on disk, and values."""
        cut = adapter_cut(name, tensor, plan, groups)
        for piece in self.pieces[name]:
            overlap = piece.overlap(cut.owned_ranges(groups.tp.rank))
            if overlap is not None:
                held = piece.overlap(cut.ranges(groups.tp.rank))
                yield piece.name, overlap[0], own_part(tensor, held, overlap[0], stacked=False)

    def write_beside(self, model: nn.Module, folder: Path, tokenizer: Tokenizer | None) -> None:
        """Write the config, and the tokenizer if there is one."""
        (folder / CONFIG_NAME).write_text(self.config, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save(folder)


def adapters_on_disk(model: nn.Module, base: str | None = None) -> AdaptersOnDisk:
    """The unsplit adapters of a split model as stored on disk. Every rank of the run must call it.

    Raises:
        ModelError: There are none, or some that are not plain LoRA of one rank and scale.
    """
    plan, groups = plan_of(model)
    with collective_errors(groups):
        tensors = dict(adapter_tensors(model))
        kinds = sorted({_kind(adapter) for _, _, adapter in adapters(model)}, key=lambda kind: (kind.rank, kind.alpha))
        sources = adapter_sources(tensors, plan, groups)
        mine = [(name, tensor.dtype, sources[name].pieces) for name, tensor in tensors.items()]
    told: list[Any] = groups.pp.all_gather_object((mine, kinds))
    everywhere = sorted((one for theirs, _ in told for one in theirs), key=lambda one: one[0])
    with collective_errors(groups):
        kind = only({kind for _, theirs in told for kind in theirs})
        paths = {_parsed(name)["path"] for name, _, _ in everywhere}
        unsplit = unsplit_on_meta(model, plan)
        others = {path for path, module in unsplit.named_modules() if hasattr(module, "weight") and path not in paths}
        config = kind.to_json(
            base=base or getattr(model.config, "_name_or_path", None) or None,
            targets=targets_of(paths, others),
            transposed={type(unsplit.get_submodule(path)).__name__ == "Conv1D" for path in paths} == {True},
        )
    pieces = {name: there for name, _, there in everywhere}
    return AdaptersOnDisk(config, pieces, {name: dtype for name, dtype, _ in everywhere})


def adapter_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The adapters' parts on this rank, by unsplit name.

    Raises:
        ModelError: Some adapters are not plain LoRA.
    """
    for name, (module, attribute) in parameter_homes(model).items():
        if ".lora_" in name:
            if _LORA.fullmatch(name) is None:
                raise ModelError(f"{name} is not part of a plain LoRA adapter. Only plain LoRA can be saved.")
            yield name, getattr(module, attribute)


def adapter_sources(tensors: Mapping[str, Tensor], plan: Plan, groups: ParallelGroups) -> dict[str, Source]:
    """Where each of the adapters' parts is stored on disk: each is one tensor."""
    sources = {}
    for name, tensor in tensors.items():
        match = _parsed(name)
        side: Side = "A" if match["side"] == "A" else "B"
        shape = adapter_cut(name, tensor, plan, groups).shape
        sources[name] = Source((Piece(name_on_disk(match["path"], side), shape, (0,) * len(shape)),))
    return sources


def adapter_cut(name: str, tensor: Tensor, plan: Plan, groups: ParallelGroups) -> TensorPlan:
    """How a part is split: of a column layer `lora_B [out, rank]` along its rows, of a row layer `lora_A [rank, in]`."""
    match = _parsed(name)
    module = plan.modules.get(match["path"])
    split: Split | None = None
    if module is not None and groups.tp.size > 1 and _CUT_SIDE.get(module.style) == match["side"]:
        split = module.split
    if split is None:
        return TensorPlan(name, tuple(tensor.shape))
    dim = 0 if match["side"] == "B" else 1
    shape = (*tensor.shape[:dim], split.size, *tensor.shape[dim + 1 :])
    return TensorPlan(name, tuple(shape), dim, split)


def _parsed(name: str) -> re.Match[str]:
    match = _LORA.fullmatch(name)
    assert match is not None
    return match


def _kind(adapter: Any) -> Adapters:
    """Rank and alpha of an adapter, ours or peft's."""
    scaling, side = adapter.scaling, adapter.lora_A
    if isinstance(scaling, dict):
        if set(scaling) != {"default"}:
            raise ModelError(f"only one adapter per layer, named `default`, can be saved; got {sorted(scaling)}.")
        scaling, side = scaling["default"], side["default"]
    rank = int(side.weight.shape[0])
    return Adapters(rank, float(scaling) * rank)
