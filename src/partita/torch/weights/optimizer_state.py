"""The state of any elementwise optimizer, unsplit on disk: each rank writes and reads its own byte ranges of it.

`optimizer.safetensors` has `exp_avg.NAME` for each parameter NAME on disk, and so on for every tensor of the state that has the
shape of its parameter. `optimizer.json` has the rest: step counts, and the options of each parameter group.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from partita.checkpoint.index import open_checkpoint
from partita.checkpoint.manifest import OPTIMIZER
from partita.checkpoint.read import Reader
from partita.checkpoint.write import FilePlan, Writer, plan_files, write_folder
from partita.errors import CheckpointError, ModelError
from partita.torch.collectives.collective_errors import collective_errors
from partita.torch.model.parts import plan_of
from partita.torch.weights.adapters import adapters
from partita.torch.weights.fill import DTYPES, CheckpointFill, memory_of
from partita.torch.weights.moments import StateReader, names_on_disk, state_sources, trained_parts, trained_tensors
from partita.torch.weights.peft_format import AdaptersOnDisk, adapters_on_disk
from partita.torch.weights.save import DTYPE_NAMES, OnDisk, on_disk

OPTIONS = f"{OPTIMIZER}.json"
MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class OptimizerOnDisk:
    """The state of an optimizer as stored on disk.

    Attributes:
        files: The files of its tensors, the same on every rank.
        text: The text of `optimizer.json`, the same on every rank.
        tensors: This rank's tensors, by kind and by the unsplit name of their parameter.
    """

    files: tuple[FilePlan, ...]
    text: str
    tensors: Mapping[tuple[str, str], Tensor]


def optimizer_on_disk(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    disk: OnDisk | AdaptersOnDisk,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> OptimizerOnDisk:
    """The present state of an optimizer of `model`, which `disk` stores. Every rank of the run must call it.

    Raises:
        ModelError: The state has tensors of other shapes, which no split describes; on every rank.
    """
    plan, groups = plan_of(model)
    with collective_errors(groups):
        names = _names(model, optimizer)
        own = disk.own(model, plan, groups)
        state = {name: optimizer.state.get(tensor, {}) for name, tensor in own.items() if tensor in names}
        tensors = {
            (kind, name): value
            for name, kinds in state.items()
            for kind, value in kinds.items()
            if _is_split_alike(kind, name, value, own[name])
        }
        numbers = {
            name: {kind: _number(value) for kind, value in kinds.items() if (kind, name) not in tensors}
            for name, kinds in state.items()
        }
        options = [
            {key: value for key, value in group.items() if key != "params" and _is_plain(value)}
            for group in optimizer.param_groups
        ]
        members = [[names[p] for p in group["params"] if p in names] for group in optimizer.param_groups]
        dtypes = {key: str(value.dtype).removeprefix("torch.") for key, value in tensors.items()}
    every: list[Any] = groups.pp.all_gather_object((dtypes, numbers, members))
    with collective_errors(groups):
        kept: dict[tuple[str, str], str] = {key: dtype for one, _, _ in every for key, dtype in one.items()}
        facts = [
            (f"{kind}.{piece.name}", DTYPE_NAMES[getattr(torch, dtype)], piece.shape)
            for (kind, name), dtype in sorted(kept.items())
            for piece in disk.pieces[name]
        ]
        files = plan_files(facts, max_shard_bytes, stem=OPTIMIZER)
        text = json.dumps(
            {
                "groups": [
                    {"options": one, "parameters": sorted({name for _, _, theirs in every for name in theirs[index]})}
                    for index, one in enumerate(options)
                ],
                "numbers": {name: kinds for _, one, _ in every for name, kinds in one.items()},
            }
        )
    return OptimizerOnDisk(files, text, tensors)


def save_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write the state of an optimizer into a new folder. Every rank of the run must call it.

    Args:
        model: The split model that it trains.
        optimizer: An optimizer whose state has, for each parameter, tensors of the parameter's shape, and numbers.
        folder: Destination; created if needed.

    Raises:
        ModelError: The state has tensors of other shapes, which no split describes; on every rank.
        CheckpointError: The folder holds weights already, or cannot be written.
    """
    plan, groups = plan_of(model)
    disk: OnDisk | AdaptersOnDisk = adapters_on_disk(model) if adapters(model) else on_disk(model)
    state = optimizer_on_disk(model, optimizer, disk)

    def write(writer: Writer) -> None:
        for (kind, name), tensor in state.tensors.items():
            if groups.copies(plan.cuts.get(name)).rank > 0:
                continue
            for piece, take, part in disk.parts(name, tensor, plan, groups):
                writer.write(f"{kind}.{piece}", take, memory_of(part))

    write_folder(
        folder, groups, state.files, lambda made: _write_text(made / OPTIONS, state.text), write,
        partial(collective_errors, groups),
    )  # fmt: skip


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Load what `save_optimizer` wrote, from any layout, into an optimizer of the same class. Every rank must call it.

    Raises:
        CheckpointError: The folder has no such state, or the state of other parameters; on every rank.
    """
    plan, groups = plan_of(model)
    with collective_errors(groups):
        if not (folder / OPTIONS).is_file():
            raise CheckpointError(f"{folder}: has no {OPTIONS}, so it is not the state of a split model's optimizer.")
        data = json.loads((folder / OPTIONS).read_text(encoding="utf-8"))
        if len(data["groups"]) != len(optimizer.param_groups):
            raise CheckpointError(
                f"{folder}: has {len(data['groups'])} parameter groups, but the optimizer has {len(optimizer.param_groups)}."
            )
        checkpoint = open_checkpoint(folder, stem=OPTIMIZER)
        trained, parts = trained_tensors(model, plan), trained_parts(model)
        names = _names(model, optimizer)
        unsplit, sources = state_sources(model, plan, parts, trained, None)
        for group, saved in zip(optimizer.param_groups, data["groups"], strict=True):
            group.update({key: value for key, value in saved["options"].items() if key in group})
            missing = [names[p] for p in group["params"] if p in names and names[p] not in saved["parameters"]]
            if missing:
                raise CheckpointError(
                    f"{folder}: has no state of {missing[0]}. Train the same parameters as in that run."
                )
        kinds = sorted({name.partition(".")[0] for name in checkpoint.tensors})
        with Reader(checkpoint) as reader:
            for kind in kinds:
                part = StateReader(reader, checkpoint, kind)
                fill = CheckpointFill(part, part.infos, sources, unsplit, None, 0)  # type: ignore[arg-type]
                for name, tensor in trained.items():
                    stored = names_on_disk(name, sources)
                    if tensor in names and stored[0] in part.infos:
                        value = torch.empty_like(tensor, dtype=DTYPES[part.infos[stored[0]].dtype], requires_grad=False)
                        cut = plan.tensor(name) if name in plan.spec.tensors else parts[name].cut
                        fill(name, cut, groups.part(cut), value)
                        optimizer.state[tensor][kind] = value
        for name, tensor in trained.items():
            for kind, number in data["numbers"].get(name, {}).items() if tensor in names else ():
                optimizer.state[tensor][kind] = _restored(number)


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> Mapping[Tensor, str]:
    """The unsplit name of each parameter of the optimizer on this rank."""
    plan, _ = plan_of(model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {tensor: name for name, tensor in trained_tensors(model, plan).items() if id(tensor) in held}


def _is_split_alike(kind: str, name: str, value: Any, tensor: Tensor) -> bool:
    """Whether a value is split as its parameter is. Raises `ModelError` for a tensor of another shape."""
    if not isinstance(value, Tensor) or value.numel() == 1 != tensor.numel() or value.dim() == 0:
        return False
    if value.shape != tensor.shape:
        raise ModelError(
            f"the optimizer's {kind} of {name} has the shape {list(value.shape)}, but this rank's part of the parameter has "
            f"{list(tensor.shape)}. Only state that is elementwise can be saved. Use AdamW or another elementwise optimizer."
        )
    return True


def _number(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return {"value": value.item(), "dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}


def _restored(number: Any) -> Any:
    """The inverse of `_number`. torch keeps such tensors on the CPU unless its optimizer is fused or capturable."""
    if not isinstance(number, dict):
        return number
    return torch.full(number["shape"], number["value"], dtype=getattr(torch, number["dtype"]))


def _is_plain(value: Any) -> bool:
    return (
        value is None
        or isinstance(value, (bool, int, float, str))
        or (isinstance(value, (list, tuple)) and all(_is_plain(one) for one in value))
    )


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
