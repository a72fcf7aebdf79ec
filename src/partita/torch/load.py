"""Loading: the model is built without weights, split as its plan says, and each rank reads its own bytes of the checkpoint."""

from __future__ import annotations

import copy
import ctypes
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from partita.checkpoint.find import find_model
from partita.checkpoint.header import TensorInfo
from partita.checkpoint.index import Checkpoint, open_checkpoint
from partita.checkpoint.manifest import check_model
from partita.checkpoint.read import Reader
from partita.core.mesh import Mesh
from partita.core.model_spec import read_ends
from partita.core.placement import Placement
from partita.core.plan import Plan, mesh_of
from partita.core.resolve import TensorPlan
from partita.errors import CheckpointError, ModelError
from partita.peers import doing
from partita.torch.apply import apply_plan
from partita.torch.finish import finish
from partita.torch.groups import ParallelGroups, init_process_group, make_groups
from partita.torch.hub import build_on_meta, quiet, read_hf_config
from partita.torch.materialize import materialize
from partita.torch.mtp import attach_mtp
from partita.torch.names import Source, convert_whole, sources_for_reading
from partita.torch.probe import plan_of_model, prove_unless_proven
from partita.torch.stage_probe import prove_stages
from partita.torch.together import together

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""torch's dtypes by their safetensors names."""

CHUNK_BYTES = 8 << 20
"""How much is read at once before it is converted and put in place."""

Progress = Callable[[int, int], None]
"""Called with the bytes of this rank that are in place and those of all."""


@doing("loading the model")
def load(
    model: str | os.PathLike[str],
    plan: Plan | None = None,
    *,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    layout: str | list[Any] | None = None,
    vpp: int | None = None,
    placement: Placement = "loop",
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    groups: ParallelGroups | None = None,
    verify: bool = True,
) -> nn.Module:
    """This rank's part of a model, called like the unsplit one, with the same results on every rank.

    Every rank of the run calls it; without a launcher the process is one rank alone. Only the own part is ever in memory.

    Args:
        model: A folder in Hugging Face's form, or a hub id.
        plan: How to split; by default made from `tp`, `pp`, `dp` and `layout`.
        tp: Tensor parallel ranks.
        pp: Pipeline stages' ranks.
        dp: Replicas.
        layout: Which layers each stage runs.
        vpp: Stages on each pipeline rank; by default as many as `layout` has, else one.
        placement: Which rank runs which stage: `loop`, or `v` for the schedule `zb-v`.
        dtype: Of the weights; by default the checkpoint's.
        device: Where they go; by default this rank's CUDA device, or the CPU.
        trust_remote_code: Whether to run code that comes with the model.
        progress: Told of every chunk that is read.
        groups: The groups of the mesh; by default made from the initialized process group.
        verify: Whether a checkpoint of a run is read whole before, by all ranks together, and compared with its manifest.

    Raises:
        PartitaError: The model cannot be split so, or is not whole on disk; on every rank.
    """
    init_process_group()
    mesh = mesh_of(plan, dp, pp, tp)
    groups = groups if groups is not None else make_groups(mesh)
    with together(groups):
        folder = find_model(model)
        if verify:
            check_model(
                folder, groups.mesh.rank(dp=groups.dp.rank, pp=groups.pp.rank, tp=groups.mp.rank), groups.mesh.size
            )
        checkpoint = open_checkpoint(folder)
        config = read_hf_config(folder, trust_remote_code=trust_remote_code)
        built = build_on_meta(config, as_dtype(dtype))
        _read_generation_config(built, folder)
        plan = choose_plan(built, plan, mesh, layout, vpp, placement)
        attach_mtp(built, plan)
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        sources, unused = sources_for_reading(built, shapes)
        _check_readable(config, plan, checkpoint, unused)
        unsplit = _for_conversion(built, sources)
    with together(groups), Reader(checkpoint) as reader:
        split = apply_plan(built, plan, groups)
        total = sum(t.numel() * t.itemsize for t in split.state_dict(keep_vars=True).values())
        fill = CheckpointFill(reader, checkpoint.tensors, sources, unsplit, progress, total)
        materialize(split, plan, groups, fill, as_device(device))
    return finish(split, plan, groups)


def shard(
    model: nn.Module,
    plan: Plan | None = None,
    *,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    layout: str | list[Any] | None = None,
    vpp: int | None = None,
    placement: Placement = "loop",
    groups: ParallelGroups | None = None,
) -> nn.Module:
    """Split a model in memory, in place; every rank calls it with an equal model. Returns the model.

    Args:
        model: An unsplit model of transformers, or any module whose paths the plan's rules name.
        plan: How to split; by default made from the model itself for what follows.
        tp: Tensor parallel ranks.
        pp: Pipeline stages' ranks.
        dp: Replicas.
        layout: Which layers each stage runs.
        vpp: Stages on each pipeline rank.
        placement: Which rank runs which stage.
        groups: The groups of the plan's mesh; by default made from the initialized process group.

    Raises:
        PartitaError: The model cannot be split so; on every rank.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model must be a module in memory, but is {model!r:.100}. load() takes a folder or a hub id.")
    mesh = mesh_of(plan, dp, pp, tp)
    groups = groups if groups is not None else make_groups(mesh)
    with together(groups):
        plan = choose_plan(model, plan, mesh, layout, vpp, placement)
        if plan.num_mtp:
            raise ModelError("a model in memory has no layers of multi-token prediction (m). Use fresh() or load().")
    with together(groups):
        split = apply_plan(model, plan, groups)
    return finish(split, plan, groups)


def choose_plan(
    model: nn.Module, plan: Plan | None, mesh: Mesh, layout: Any, vpp: int | None, placement: Placement
) -> Plan:
    """`plan`, or one made of the unsplit `model`; either is proven to be right for it.

    Raises:
        PartitaError: It is not, or there is none.
    """
    if plan is None:
        plan = plan_of_model(model, mesh, layout, vpp=vpp, placement=placement)
    else:
        prove_unless_proven(model, plan)
    prove_stages(model, plan)
    return plan


def _read_generation_config(model: nn.Module, folder: Path) -> None:
    """Give a model what lies beside it of how to generate: which ids end a text. Raises `ModelError` where it is malformed."""
    read_ends(folder)
    if getattr(model, "generation_config", None) is None or not (folder / "generation_config.json").is_file():
        return
    from transformers import GenerationConfig

    try:
        with quiet():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"{folder}/generation_config.json cannot be read: {why[:300]}") from error


def _check_readable(config: Any, plan: Plan, checkpoint: Checkpoint, unused: list[str]) -> None:
    """Refuse a checkpoint whose numbers mean something else than the model would take them for."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        data = quantization if isinstance(quantization, dict) else quantization.to_dict()
        raise ModelError(
            f"{checkpoint.folder} is quantized ({data.get('quant_method', 'unknown method')}), which cannot be split on torch "
            "yet. Save it dequantized (transformers: model.dequantize()), and load that."
        )
    for name in unused:
        module, _, attribute = name.rpartition(".")
        if any(t.name == f"{module}.weight" for t in plan.spec.module_tensors(module)):
            raise ModelError(
                f"{checkpoint.folder}: tensor {name} belongs to {module}, but the model has no {attribute} there. The config "
                "does not belong to this checkpoint, or it is of a kind that cannot be read."
            )


def _for_conversion(built: nn.Module, sources: Mapping[str, Source]) -> nn.Module:
    """The unsplit model that transformers' converters ask, where one is needed: `built` is about to be split."""
    return copy.deepcopy(built) if any(source.converter is not None for source in sources.values()) else built


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A torch dtype of its name.

    Raises:
        ModelError: It is not a floating dtype that models are made of.
    """
    names = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype is None or dtype == "auto":
        return None
    found = names.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found not in names.values():
        raise ModelError(f"dtype must be one of {', '.join(names)}, but is {dtype}.")
    return found


def as_device(device: torch.device | str | None) -> torch.device:
    """The device that is meant: this rank's CUDA device where there is one and none is named, else the CPU.

    Raises:
        ModelError: It is none that is here.
    """
    if device is not None:
        try:
            found = torch.device(device)
            torch.empty(0, device=found)
        except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
            raise ModelError(
                f"device must be one that torch has here (cpu{', cuda' if torch.cuda.is_available() else ''}, ...), but is "
                f"{str(device)!r}. Leave it out for the usual one."
            ) from error
        if found.type == "meta":
            raise ModelError(
                "device must be one with memory for weights, but is 'meta'. Leave it out for the usual one."
            )
        return found
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


class CheckpointFill:
    """Fills local tensors from the byte ranges of a checkpoint."""

    def __init__(
        self,
        reader: Reader,
        infos: Mapping[str, TensorInfo],
        sources: Mapping[str, Source],
        unsplit: nn.Module,
        progress: Progress | None,
        total_bytes: int,
    ) -> None:
        self.reader, self.infos, self.sources, self.unsplit = reader, infos, sources, unsplit
        self.progress, self.total_bytes = progress, total_bytes
        self.done_bytes = 0

    def __call__(self, name: str, cut: TensorPlan, rank: int, local: Tensor) -> None:
        """Fill the part that tensor rank `rank` holds of tensor `name`."""
        source = self.sources.get(name)
        if source is None:
            folder = self.reader.checkpoint.folder
            raise CheckpointError(
                f"tensor {name} of the model is not in {folder}. The checkpoint is of another model, or not whole."
            )
        if source.converter is not None:
            whole = convert_whole(source, name, {n: self._read_whole(n) for n, _ in source.inputs}, self.unsplit)
            for dim, ranges in enumerate(cut.ranges(rank)):
                whole = torch.cat([whole.narrow(dim, a, b - a) for a, b in ranges], dim)
            local.copy_(whole)
            return
        for piece in source.pieces:
            overlap = piece.overlap(cut.ranges(rank))
            if overlap is not None:
                take, put = overlap
                there = local
                for dim, (a, b) in enumerate(put):
                    there = there.narrow(dim, a, b - a)
                self._read(piece.name, take, there.squeeze(0) if piece.stacked else there)

    def _read_whole(self, name: str) -> Tensor:
        info = self.infos[name]
        whole = torch.empty(info.shape, dtype=_dtype(info))
        self._read(name, [[(0, size)] for size in info.shape], whole)
        return whole

    def _read(self, name: str, take: list[list[tuple[int, int]]], there: Tensor) -> None:
        """Read ranges of a tensor on disk into a view of a local one, a chunk of its first dim at a time."""
        info = self.infos[name]
        dtype = _dtype(info)
        is_other_kind = dtype.itemsize == 1 or dtype.is_floating_point != there.dtype.is_floating_point
        if is_other_kind and dtype != there.dtype:
            raise CheckpointError(
                f"{info.file}: tensor {name} is {info.dtype}, which without its scales is not the model's {there.dtype}. "
                "Save it dequantized, and load that."
            )
        direct = dtype == there.dtype and there.is_contiguous() and there.device.type == "cpu"
        if direct or there.dim() == 0:
            into = there if direct else torch.empty(there.shape, dtype=dtype)
            self.reader.read(name, take, memory_of(into))
            if not direct:
                there.copy_(into)
        else:
            row_bytes = max(1, math.prod(there.shape[1:]) * dtype.itemsize)
            rows = max(1, CHUNK_BYTES // row_bytes)
            buffer = torch.empty((min(rows, there.shape[0]), *there.shape[1:]), dtype=dtype)
            done = 0
            for piece in _in_steps(take[0], rows):
                count = sum(b - a for a, b in piece)
                into = buffer[:count]
                self.reader.read(name, [piece, *take[1:]], memory_of(into))
                there[done : done + count].copy_(into)
                done += count
        if self.progress is not None:
            self.done_bytes += there.numel() * there.itemsize
            self.progress(self.done_bytes, self.total_bytes)


def _dtype(info: TensorInfo) -> torch.dtype:
    try:
        return DTYPES[info.dtype]
    except KeyError:
        raise CheckpointError(f"{info.file}: tensor {info.name}: torch has no dtype for {info.dtype}.") from None


def _in_steps(ranges: list[tuple[int, int]], rows: int) -> list[list[tuple[int, int]]]:
    """Ranges cut so that each step has at most `rows` elements."""
    steps: list[list[tuple[int, int]]] = []
    room = 0
    for start, stop in ranges:
        while start < stop:
            if room == 0:
                steps.append([])
                room = rows
            end = min(stop, start + room)
            steps[-1].append((start, end))
            room -= end - start
            start = end
    return steps


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor as writable memory; the tensor must outlive it."""
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    size = tensor.numel() * tensor.itemsize
    if size == 0:
        return memoryview(bytearray())
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")
