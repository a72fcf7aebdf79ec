"""Saving: each rank writes its own bytes of the unsplit checkpoint, in Hugging Face's form."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from partita.checkpoint.write import Writer, create_files, plan_files, write_index
from partita.core.plan import Plan
from partita.core.split import Range
from partita.errors import CheckpointError, ModelError
from partita.text import Tokenizer
from partita.torch.adapt import adapters
from partita.torch.apply import local_tensors, plan_of
from partita.torch.hub import build_on_meta, quiet
from partita.torch.load import DTYPES, memory_of
from partita.torch.mtp import attach_mtp, repeated_pieces
from partita.torch.names import pieces_for_writing
from partita.torch.together import together

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the unsplit model that the ranks hold together; every rank of the run calls it.

    The result is what transformers itself would have saved: `config.json`, `model.safetensors` or its numbered parts with
    their index, and the tokenizer. It does not depend on how the model was split.

    Args:
        model: A model that `load`, `shard` or `fresh` made.
        folder: Where to; made if it is not there. It must not hold weights already.
        tokenizer: Saved with it.
        max_shard_bytes: Largest size of one file.
        progress: Called with the bytes that this rank has written and will write.

    Raises:
        CheckpointError: The folder holds a model already, or cannot be written.
        ModelError: The model has adapters that are not merged.
    """
    plan, groups = plan_of(model)
    if adapters(model):
        raise ModelError(
            "the model has LoRA adapters, which are no part of a checkpoint. Call merge_lora(model) first."
        )
    path = Path(folder)
    tensors = {n: t for n, t in local_tensors(model, plan).items() if plan.spec.tensors[n].tied_to is None}
    dtypes: dict[str, torch.dtype] = {}
    for part in groups.pp.comm.all_gather_object({name: tensor.dtype for name, tensor in tensors.items()}):
        dtypes.update(part)  # type: ignore[call-overload]
    config = _plain_config(model, plan, next(iter(dtypes.values())))
    # Of copies on several stages the owner's is written.
    names = {n: t for n, t in tensors.items() if plan.copies.get(n, (groups.pp.rank,))[0] == groups.pp.rank}
    with together(groups):
        unsplit = build_on_meta(config)
        attach_mtp(unsplit, plan)
        pieces = repeated_pieces(unsplit, plan, pieces_for_writing(unsplit))
        on_disk = [
            (piece.name, DTYPE_NAMES[dtypes[name]], piece.shape)
            for name in plan.spec.tensors
            if name in dtypes
            for piece in pieces[name]
        ]
        files = plan_files(on_disk, max_shard_bytes)
    first = torch.distributed.get_rank() == 0 if groups.mesh.size > 1 else True
    with together(groups):
        if first:
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be made: {error.strerror}. Choose another folder.") from error
            create_files(path, files)
            write_index(path, files)
            with quiet():
                config.save_pretrained(path)
                generation = getattr(model, "generation_config", None)
                if generation is not None:
                    with contextlib.suppress(ValueError):
                        generation.save_pretrained(path)
            if tokenizer is not None:
                tokenizer.save(path)
    with together(groups):
        if groups.dp.rank == 0:
            with Writer(path, files) as writer:
                total = sum(t.numel() * t.itemsize for t in names.values())
                for name, tensor in names.items():
                    cut = plan.tensor(name)
                    ranges, owned = cut.ranges(groups.mp.rank), cut.owned_ranges(groups.mp.rank)
                    for piece in pieces[name]:
                        overlap = piece.overlap(owned)
                        if overlap is not None:
                            take, _ = overlap
                            part = _own_part(tensor, ranges, piece.overlap(ranges), take, piece.start, piece.stacked)
                            writer.write(piece.name, take, memory_of(part))
                    if progress is not None:
                        progress(writer.bytes_written, total)


def _own_part(
    tensor: Tensor,
    ranges: tuple[tuple[Range, ...], ...],
    held: tuple[list[list[Range]], list[Range]] | None,
    take: list[list[Range]],
    start: tuple[int, ...],
    stacked: bool,
) -> Tensor:
    """The elements of a local tensor that go to the ranges `take` of a piece on disk: those this rank owns of what it holds."""
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


def _place(held: list[Range], span: Range) -> tuple[int, int]:
    """Where `span` begins among the ranges `held` one behind the other, and its length."""
    offset = 0
    for a, b in held:
        if a <= span[0] and span[1] <= b:
            return offset + span[0] - a, span[1] - span[0]
        offset += b - a
    raise AssertionError(f"{span} is not in {held}")


def _plain_config(model: nn.Module, plan: Plan, dtype: torch.dtype) -> Any:
    config: Any = model.config
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    return config
