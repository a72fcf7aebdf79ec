"""Saving: each rank writes its own bytes of the unsplit checkpoint, in Hugging Face's format."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from partita.checkpoint.unused import NOT_SAVED, Unused, announce_nothing
from partita.checkpoint.write import FilePlan, Writer, plan_files, write_folder
from partita.core.plan import Plan
from partita.core.sharding.split import Range
from partita.errors import ModelError
from partita.generation import Tokenizer
from partita.generation.generation_config import FILE_NAME
from partita.notes import note
from partita.quantized.find import KeptQuantized
from partita.ranks.liveness import doing
from partita.torch.collectives.collective_errors import collective_errors, gather_from_all
from partita.torch.collectives.groups import ParallelGroups
from partita.torch.model.parts import local_tensors, plan_of
from partita.torch.model.transformers_models import build_on_meta
from partita.torch.quantized.tensor import QuantizedTensor
from partita.torch.stages.mtp import attach_mtp
from partita.torch.training.kept_shards import complete, shaped, shards_of
from partita.torch.transformers_internals import code_files, has_own_code, quiet
from partita.torch.weights.adapters import adapters
from partita.torch.weights.fill import DTYPES, memory_of
from partita.torch.weights.names import Piece, pieces_for_writing, repeated_pieces

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@doing("saving the model")
@shaped
def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the unsplit model of all ranks. Every rank of the run must call it.

    The result is what transformers itself would have saved: `config.json`, `model.safetensors` or its numbered parts with
    their index, and the tokenizer. It does not depend on how the model was split. Quantized weights are copied unchanged. The
    folder is created atomically: all files are written to a temporary folder, which is then renamed.

    Args:
        model: A result of `load`, `shard` or `fresh`.
        folder: Destination; created if needed. It must not hold weights already.
        tokenizer: Tokenizer to save with it.
        max_shard_bytes: Maximum size of one file.
        progress: Called with the bytes that this rank has written and their total.

    Raises:
        CheckpointError: The folder holds a model already, or cannot be written.
        ModelError: The model has adapters that are not merged.

    Examples:
        >>> model = pt.load("./model", tp=2)
        >>> pt.save(model, "./trained")  # AutoModelForCausalLM.from_pretrained reads it
    """
    plan, groups = plan_of(model)
    disk = on_disk(model)
    with collective_errors(groups):
        files = disk.files(max_shard_bytes)

    def write(writer: Writer) -> None:
        every = disk.own(model, plan, groups)
        own = {n: t for n, t in every.items() if groups.copies(plan.tensor(n)).rank == 0}
        total = sum(tensor.numel() * tensor.itemsize for tensor in own.values())
        with closing(_complete(model, every, own)) as completed:
            for name, tensor in completed:
                for piece, take, part in disk.parts(name, tensor, plan, groups):
                    writer.write(piece, take, memory_of(part))
                if progress is not None:
                    progress(writer.bytes_written, total)
        if groups.replicas.rank == 0:
            place = groups.pp.rank * plan.mesh.tp + groups.tp.rank
            disk.unused.copy(writer.write, place, plan.mesh.pp * plan.mesh.tp)

    def take_part() -> None:
        for _ in _complete(model, disk.own(model, plan, groups), {}):
            pass

    write_folder(
        Path(folder), groups, files, lambda made: disk.write_beside(model, made, tokenizer), write,
        partial(collective_errors, groups), take_part,
    )  # fmt: skip


def _complete(
    model: nn.Module, every: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> Generator[tuple[str, Tensor], None, None]:
    """The tensors `own` with all their elements, one at a time.

    It takes part in gathering `every` tensor, also when it is closed early, so that one rank's error does not block the others.
    """
    if not shards_of(model):
        yield from own.items()
        return
    left = iter(every.items())
    try:
        for name, tensor in left:
            value = complete(model, tensor)
            if name in own:
                yield name, value
    finally:
        for _, tensor in left:
            complete(model, tensor)


@dataclass(frozen=True)
class OnDisk:
    """The unsplit model as stored on disk, the same on every rank.

    Attributes:
        config: The transformers config to save with it.
        pieces: For each tensor of the model, the tensors on disk that hold it.
        dtypes: For each saved tensor, its dtype; for tied tensors under the first name.
        unused: Tensors to copy from the checkpoint that the model was loaded from.
    """

    config: Any
    pieces: Mapping[str, tuple[Piece, ...]]
    dtypes: Mapping[str, torch.dtype]
    unused: Unused

    def files(self, max_shard_bytes: int) -> tuple[FilePlan, ...]:
        """The files of its weights."""
        tensors = [(p.name, DTYPE_NAMES[dtype], p.shape) for n, dtype in self.dtypes.items() for p in self.pieces[n]]
        return plan_files([*tensors, *self.unused.facts()], max_shard_bytes)

    def own(self, model: nn.Module, plan: Plan, groups: ParallelGroups) -> dict[str, Tensor]:
        """The local tensors whose owned parts this rank writes. Of copies on several stages, only the owner's is written."""
        return {
            name: tensor
            for name, tensor in local_tensors(model, plan).items()
            if name in self.dtypes and plan.copies.get(name, (groups.pp.rank,))[0] == groups.pp.rank
        }

    def parts(
        self, name: str, tensor: Tensor, plan: Plan, groups: ParallelGroups
    ) -> Iterator[tuple[str, list[list[Range]], Tensor]]:
        """The elements of a local tensor that this rank owns, for each tensor on disk: name, ranges on disk, and values."""
        cut = plan.tensor(name)
        held = groups.part(cut)
        ranges, owned = cut.ranges(held), cut.owned_ranges(held)
        for piece in self.pieces[name]:
            overlap = piece.overlap(owned)
            if overlap is not None:
                take, _ = overlap
                yield piece.name, take, own_part(tensor, piece.overlap(ranges), take, stacked=piece.stacked)

    def write_beside(self, model: nn.Module, folder: Path, tokenizer: Tokenizer | None) -> None:
        """Write the files beside the weights: configs and the tokenizer."""
        with quiet():
            self.config.save_pretrained(folder)
            _copy_code(model, folder)
            generation = getattr(model, "generation_config", None)
            if generation is not None:
                # save_pretrained rejects some settings that from_pretrained accepts: sampling settings without do_sample.
                generation.to_json_file(folder / FILE_NAME, use_diff=True, keys_to_pop=["compile_config"])
        if tokenizer is not None:
            tokenizer.save(folder)


def on_disk(model: nn.Module) -> OnDisk:
    """The unsplit model of all ranks as stored on disk. Every rank of the run must call it.

    Raises:
        ModelError: The model has adapters that are not merged.
    """
    plan, groups = plan_of(model)
    if adapters(model):
        raise ModelError("the model has LoRA adapters, which a checkpoint cannot hold. Call merge_lora(model) first.")
    frozen: KeptQuantized | None = getattr(model, "partita_quantized", None)
    mine = {
        n: t.dtype
        for n, t in local_tensors(model, plan).items()
        if plan.spec.tensors[n].tied_to is None and not (frozen and isinstance(t, QuantizedTensor))
    }
    dtypes: dict[str, torch.dtype] = {}
    for part in groups.pp.all_gather_object(mine):
        dtypes.update(part)  # type: ignore[call-overload]
    config = _plain_config(model, next(iter(dtypes.values())))
    with collective_errors(groups):
        unsplit = unsplit_on_meta(model, plan, config)
        pieces = repeated_pieces(unsplit, plan, pieces_for_writing(unsplit))
    saved = {name: dtypes[name] for name in plan.spec.tensors if name in dtypes}
    unused = getattr(model, "partita_unused", Unused()).without({p.name for name in saved for p in pieces[name]})
    if frozen:
        # A weight that could not stay quantized in memory has not changed either.
        saved = {n: dtype for n, dtype in saved.items() if not frozen.weights & {p.name for p in pieces[n]}}
        unused = unused.joined(frozen.files)
        config = copy.deepcopy(config)
        config.quantization_config = dict(frozen.settings)
        if groups.rank == 0:
            note(f"quantized weights ({frozen.form}) are saved unchanged.")
    missing = next(filter(None, gather_from_all(groups, unused.missing())), "")
    if missing and frozen:
        raise ModelError(
            f"{missing}, so the quantized weights cannot be saved. Call dequantize(model) to save their values."
        )
    if missing:
        config, unused = copy.deepcopy(config), Unused()
        announce_nothing(config)
        if groups.rank == 0:
            note(NOT_SAVED.format(missing))
    return OnDisk(config, pieces, saved, unused)


def unsplit_on_meta(model: nn.Module, plan: Plan, config: Any = None) -> nn.Module:
    """The unsplit form of `model` without weights, with the plan's prediction layers; `config` overrides its config."""
    cls = type(model) if has_own_code(model) else None
    unsplit = build_on_meta(model.config if config is None else config, cls=cls)
    attach_mtp(unsplit, plan)
    return unsplit


def own_part(
    tensor: Tensor,
    held: tuple[list[list[Range]], list[Range]] | None,
    take: list[list[Range]],
    *,
    stacked: bool,
) -> Tensor:
    """The elements of a local tensor that this rank owns within the ranges `take` of a piece on disk."""
    assert held is not None
    have, put = held
    part = tensor.detach()
    for dim, (a, b) in enumerate(put):
        part = part.narrow(dim, a, b - a)
    if stacked:
        part = part.squeeze(0)
    for dim, (mine, owned) in enumerate(zip(have, take, strict=True)):
        if mine != owned:
            part = torch.cat([part.narrow(dim, *_place(mine, span)) for span in owned], dim)
    return part.contiguous().cpu()


def _copy_code(model: nn.Module, folder: Path) -> None:
    """Copy the code that came with a model and its config, since the saved config names it."""
    for value in (model, model.config):
        files = code_files(value)
        for file in files:
            target = folder / file.relative_to(files[0].parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def _place(held: list[Range], span: Range) -> tuple[int, int]:
    """The start of `span` within the concatenated ranges `held`, and its length."""
    offset = 0
    for a, b in held:
        if a <= span[0] and span[1] <= b:
            return offset + span[0] - a, span[1] - span[0]
        offset += b - a
    raise AssertionError(f"{span} is not in {held}")


def _plain_config(model: nn.Module, dtype: torch.dtype) -> Any:
    config: Any = model.config
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    return config
