"""What a rank does to write: it holds the same state in every contestant's form, and each writes it in its turn.

The state is a Llama's weights, and where they are asked for AdamW's moments: local tensors for Partita, the same memory as
DTensors for torch's distributed checkpoint (DCP), and on the first rank the whole tensors for safetensors.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from bench.process import counted, resident_bytes, start_peak

OURS = "Partita"
SMALL_FILES = "Partita, files of 256 MiB"
BARE = "Partita without digests"
DCP = "torch DCP"
DCP_ASYNC = "torch DCP async_save"
COPY = "safetensors save_file, one process"
FLOOR = "by hand: each rank pwrites its half"

CHUNK_BYTES = 8 << 20
SMALL_FILE_BYTES = 256 << 20
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class _Held:
    """What this rank holds from one turn to the next: everything that is written, in each contestant's form."""

    model: Any = None
    savers: dict[str, Any] = field(default_factory=dict)
    reports: list[Any] = field(default_factory=list)
    sharded: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    whole: Mapping[str, Any] = field(default_factory=dict)
    half: Any = None
    gloo: Any = None
    step: int = 0


_held = _Held()


def set_up(source: Path, run: Path | None) -> int:
    """Load the model of `source`, with moments where there is a `run` to save into; the bytes of the rank's own part."""
    import numpy as np
    import torch
    import torch.distributed as dist

    from partita.torch import load
    from partita.torch.model.parts import local_tensors, plan_of
    from partita.torch.train import TrainSettings, make_optimizer, make_saver
    from partita.training.saving import Saves
    from partita.training.state import TrainingState

    model = load(source, tp=dist.get_world_size())
    plan, groups = plan_of(model)
    parameters = local_tensors(model, plan)
    kinds = {"model": {name: tensor.detach() for name, tensor in parameters.items()}}
    if run is not None:
        optimizer = make_optimizer(model, TrainSettings(), groups)
        assert optimizer is not None
        for place, kind in enumerate(MOMENTS, 2):
            kinds[kind] = {name: tensor * place for name, tensor in kinds["model"].items()}
            for name, tensor in parameters.items():
                optimizer.state[tensor][kind] = kinds[kind][name]
        state = TrainingState.of(TrainSettings(), np.arange(1000))
        for name, saves in (
            (OURS, Saves(run, every=1)),
            (SMALL_FILES, Saves(run, every=1, max_shard_bytes=SMALL_FILE_BYTES)),
        ):
            _held.savers[name] = make_saver(model, optimizer, saves, state, _held.reports.append)
    _held.model, _held.gloo = model, dist.new_group(backend="gloo")
    _held.sharded = {kind: as_dtensors(local, plan, groups.tp.rank) for kind, local in kinds.items()}
    _held.whole = _unsplit()
    _held.half = torch.ones(_total_bytes() // dist.get_world_size(), dtype=torch.uint8)
    return sum(tensor.nbytes for local in kinds.values() for tensor in local.values())


def as_dtensors(local: Mapping[str, Any], plan: Any, rank: int) -> dict[str, Any]:
    """Local tensors as torch's tensor parallelism would hold them."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    made = {}
    for name, tensor in local.items():
        cut = [dim for dim, size in enumerate(plan.spec.tensors[name].shape) if tensor.shape[dim] != size]
        made[name] = DTensor.from_local(tensor, mesh, [Shard(cut[0]) if cut else Replicate()], run_check=False)
    return made


def empty_like(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """DTensors alike, in memory that was never touched."""
    import torch
    from torch.distributed.tensor import DTensor

    def made(tensor: Any) -> Any:
        local = torch.empty(tensor.to_local().shape, dtype=tensor.dtype)
        return DTensor.from_local(local, tensor.device_mesh, tensor.placements, run_check=False)

    return {name: made(tensor) for name, tensor in tensors.items()}


def _unsplit() -> dict[str, Any]:
    """On the first rank the whole tensors, as they are called on disk."""
    import torch.distributed as dist

    whole = {}
    for kind, tensors in _held.sharded.items():
        for name, tensor in tensors.items():
            full = tensor.full_tensor()
            if dist.get_rank() == 0:
                whole[name if kind == "model" else f"{kind}.{name}"] = full.clone()
    return whole


def _total_bytes() -> int:
    return sum(t.numel() * t.itemsize for tensors in _held.sharded.values() for t in tensors.values())


def write(name: str, place: Path, is_durable: bool) -> dict[str, float] | None:
    """One contestant's turn, into a folder that is not there: seconds, and what it costs. None on ranks that only wait.

    What earlier turns have left for the disk to do is done before.
    """
    import torch.distributed as dist

    if dist.get_rank() == 0:
        os.sync()
    before = start_peak()
    dist.barrier()
    facts = None
    if name != COPY or dist.get_rank() == 0:
        written, start = counted("wchar"), time.perf_counter()
        with contextlib.nullcontext() if is_durable else mock.patch("os.fsync"):
            more = _WRITERS[name](place)
        seconds = time.perf_counter() - start
        growth = resident_bytes("VmHWM") - before
        facts = {"seconds": seconds, "growth": growth, "written": counted("wchar") - written, **more}
    dist.barrier()
    return facts


def _save(place: Path) -> dict[str, float]:
    from partita.torch import save

    told = [0]
    save(_held.model, place, progress=lambda done, total: told.append(done))
    return {"written": float(told[-1])}


def _save_run(name: str) -> dict[str, float]:
    """By the saver of a run, which writes in the background."""
    saver = _held.savers[name]
    _held.step += 1
    start = time.perf_counter()
    saver.after(_held.step)
    held = time.perf_counter() - start
    saver.wait()
    return {"held": held, "written": float(_held.reports.pop().bytes_written)}


def _ours(place: Path) -> dict[str, float]:
    return _save_run(OURS) if _held.savers else _save(place)


def _bare(place: Path) -> dict[str, float]:
    from partita.checkpoint import manifest

    with mock.patch.object(manifest, "digest", lambda file: manifest.Digest(file.stat().st_size, "")):
        return _save_run(OURS)


def _dcp(place: Path) -> dict[str, float]:
    import torch.distributed.checkpoint as dcp

    dcp.save({kind: dict(tensors) for kind, tensors in _held.sharded.items()}, checkpoint_id=place)
    return {}


def _dcp_async(place: Path) -> dict[str, float]:
    import torch.distributed.checkpoint as dcp

    start = time.perf_counter()
    state: dict[str, Any] = {kind: dict(tensors) for kind, tensors in _held.sharded.items()}
    future: Any = dcp.async_save(state, checkpoint_id=place, process_group=_held.gloo)
    held = time.perf_counter() - start
    future.result()
    return {"held": held}


def _copy(place: Path) -> dict[str, float]:
    from safetensors.torch import save_file

    place.mkdir(parents=True)
    save_file(dict(_held.whole), place / "model.safetensors", {"format": "pt"})
    with open(place / "model.safetensors", "rb") as file:
        os.fsync(file.fileno())
    return {}


def _by_hand(place: Path) -> dict[str, float]:
    import torch.distributed as dist

    from partita.torch.weights.fill import memory_of

    size, rank = _held.half.numel(), dist.get_rank()
    if rank == 0:
        place.mkdir(parents=True)
        fd = os.open(place / "bytes", os.O_WRONLY | os.O_CREAT)
        os.posix_fallocate(fd, 0, size * dist.get_world_size())
        os.close(fd)
    dist.barrier()
    fd, data = os.open(place / "bytes", os.O_WRONLY), memory_of(_held.half)
    for start in range(0, size, CHUNK_BYTES):
        os.pwrite(fd, data[start : start + CHUNK_BYTES], rank * size + start)
    os.fsync(fd)
    os.close(fd)
    dist.barrier()
    return {}


_WRITERS: dict[str, Callable[[Path], dict[str, float]]] = {
    OURS: _ours,
    SMALL_FILES: lambda place: _save_run(SMALL_FILES),
    BARE: _bare,
    DCP: _dcp,
    DCP_ASYNC: _dcp_async,
    COPY: _copy,
    FLOOR: _by_hand,
}


def check(name: str, source: Path, place: Path) -> None:
    """Raise AssertionError unless what a contestant wrote is what the ranks hold."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import load_file

    if name in (DCP, DCP_ASYNC):
        found = {kind: empty_like(tensors) for kind, tensors in _held.sharded.items()}
        dcp.load(found, checkpoint_id=place)
        for kind, tensors in _held.sharded.items():
            for one, tensor in tensors.items():
                assert torch.equal(found[kind][one].to_local(), tensor.to_local()), f"{name}: {kind} of {one}"
    elif name != FLOOR and dist.get_rank() == 0:
        read = {one: tensor for file in place.glob("*.safetensors") for one, tensor in load_file(file).items()}
        assert read.keys() == _held.whole.keys(), f"{name}: {sorted(read.keys() ^ _held.whole.keys())[:3]}"
        assert all(torch.equal(read[one], tensor) for one, tensor in _held.whole.items()), name
        if name == OURS:
            mine, theirs = place / "model.safetensors", source / "model.safetensors"
            assert mine.read_bytes() == theirs.read_bytes(), "Partita: the file depends on the layout"


def remove(place: Path) -> None:
    """On the first rank: remove what was written."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        shutil.rmtree(place)
    dist.barrier()


def next_step() -> int:
    """The step of the next save of a run."""
    return _held.step + 1
