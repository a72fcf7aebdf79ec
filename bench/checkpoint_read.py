"""What a fresh rank does to read a checkpoint, once, into memory that was never touched."""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from bench.checkpoint_write import CHUNK_BYTES, MOMENTS, as_dtensors
from bench.process import counted, resident_bytes, start_peak

OURS = "Partita, building the model too"
ALONE = "Partita"
VERIFIED = "Partita, the same, digests compared first"
DCP = "torch DCP"
COPY = "safetensors load_file and a copy, one process"
MAPPED = "safetensors load_file, one process (mapped, not read)"
FLOOR = "by hand: each rank reads its half"

WAIT = (COPY, MAPPED)
"""For these the first rank works alone."""


def read(name: str, ours: Path, theirs: Path, with_moments: bool) -> dict[str, float] | None:
    """One measurement, then a look at whether what was read is right. None on ranks that only wait.

    Args:
        name: Who reads.
        ours: A checkpoint of a run, of which safetensors reads the files as well.
        theirs: The same state as DCP wrote it.
        with_moments: Whether AdamW's moments are read too.
    """
    import torch.distributed as dist
    import torch.distributed.checkpoint  # noqa: F401  (imports are no part of reading)
    import transformers.models.llama.modeling_llama  # noqa: F401

    import partita.torch.train  # noqa: F401

    readers: dict[str, Callable[[], dict[str, Any]]] = {
        OURS: lambda: _ours(ours, with_moments, verify=False),
        VERIFIED: lambda: _ours(ours, with_moments, verify=True),
        DCP: _dcp(ours, theirs, with_moments) if name == DCP else dict,
        COPY: lambda: _copied(ours, with_moments),
        MAPPED: lambda: _mapped(ours, with_moments),
        FLOOR: lambda: _half(ours, with_moments),
    }
    before = start_peak()
    dist.barrier()
    facts = None
    if name not in WAIT or dist.get_rank() == 0:
        reading: list[float] = []
        read_before, start = counted("rchar"), time.perf_counter()
        with _timed(reading):
            found = readers[name]()
        seconds = time.perf_counter() - start
        growth, rchar = resident_bytes("VmHWM") - before, counted("rchar") - read_before
        own = sum(tensor.numel() * tensor.itemsize for tensor in found.values())
        facts = {"seconds": seconds, "reading": sum(reading), "growth": growth, "read": rchar, "own": own}
        if name != FLOOR:
            _check(name, ours, found, with_moments)
    dist.barrier()
    return facts


@contextlib.contextmanager
def _timed(seconds: list[float]) -> Iterator[None]:
    """Note how long our parts take that allocate and read; the model is built and its split proven outside of these."""
    loading = importlib.import_module("partita.torch.load")  # the name alone is the function's
    moments = importlib.import_module("partita.torch.weights.moments")

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            seconds.append(time.perf_counter() - start)
            return result

        return call

    with (
        mock.patch.object(loading, "materialize", timed(loading.materialize)),
        mock.patch.object(moments, "restore_optimizer", timed(moments.restore_optimizer)),
    ):
        yield


def _ours(folder: Path, with_moments: bool, *, verify: bool) -> dict[str, Any]:
    import torch.distributed as dist

    from partita.checkpoint.manifest import check_contents, read_manifest
    from partita.torch import load
    from partita.torch.model.parts import local_tensors, plan_of
    from partita.torch.train import TrainSettings, make_optimizer
    from partita.torch.weights import moments

    if verify:
        check_contents(folder, read_manifest(folder), dist.get_rank(), dist.get_world_size())
    model = load(folder, tp=dist.get_world_size())
    plan, groups = plan_of(model)
    parameters = local_tensors(model, plan)
    found = {name: tensor.detach() for name, tensor in parameters.items()}
    if with_moments:
        optimizer = make_optimizer(model, TrainSettings(), groups)
        assert optimizer is not None
        moments.restore_optimizer(model, optimizer, folder)
        for kind in MOMENTS:
            found |= {f"{kind}.{name}": optimizer.state[tensor][kind] for name, tensor in parameters.items()}
    return found


def _dcp(folder: Path, theirs: Path, with_moments: bool) -> Callable[[], dict[str, Any]]:
    """The shapes are found before the clock starts; memory is taken behind it."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    plan, shapes = _shapes(folder)

    def load() -> dict[str, Any]:
        state: dict[str, Any] = {}
        for kind in ("model", *MOMENTS) if with_moments else ("model",):
            local = {name: torch.empty(shape) for name, shape in shapes.items()}
            state[kind] = as_dtensors(local, plan, dist.get_rank())
        dcp.load(state, checkpoint_id=theirs)
        return {
            name if kind == "model" else f"{kind}.{name}": tensor.to_local()
            for kind, tensors in state.items()
            for name, tensor in tensors.items()
        }

    return load


def _shapes(folder: Path) -> tuple[Any, dict[str, list[int]]]:
    """The plan at tp, and the local shape of every tensor."""
    import torch.distributed as dist

    from partita.core.mesh import Mesh
    from partita.torch.model.transformers_models import build_on_meta, read_hf_config
    from partita.torch.proof.family import plan_of_model

    plan = plan_of_model(build_on_meta(read_hf_config(folder), None), Mesh(1, 1, dist.get_world_size()), None)
    cut = {name: plan.tensor(name).ranges(dist.get_rank()) for name in plan.spec.tensors}
    return plan, {name: [sum(b - a for a, b in one) for one in ranges] for name, ranges in cut.items()}


def _files(folder: Path, with_moments: bool) -> list[Path]:
    return [folder / "model.safetensors", *([folder / "optimizer.safetensors"] if with_moments else [])]


def _mapped(folder: Path, with_moments: bool) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for file in _files(folder, with_moments) for name, tensor in load_file(file).items()}


def _copied(folder: Path, with_moments: bool) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in _mapped(folder, with_moments).items()}


def _half(folder: Path, with_moments: bool) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    from partita.torch.weights.fill import memory_of

    found = {}
    for file in _files(folder, with_moments):
        size = file.stat().st_size // dist.get_world_size()
        found[file.name] = torch.empty(size, dtype=torch.uint8)
        data = memory_of(found[file.name])
        fd = os.open(file, os.O_RDONLY)
        for start in range(0, size, CHUNK_BYTES):
            os.preadv(fd, [data[start : start + CHUNK_BYTES]], dist.get_rank() * size + start)
        os.close(fd)
    return found


def _check(name: str, folder: Path, found: dict[str, Any], with_moments: bool) -> None:
    import torch
    import torch.distributed as dist

    plan, _ = _shapes(folder)
    for key, whole in _mapped(folder, with_moments).items():
        if name not in WAIT:
            kind = next((kind for kind in MOMENTS if key.startswith(f"{kind}.")), None)
            cut = plan.tensor(key.removeprefix(f"{kind}."))
            for dim, ranges in enumerate(cut.ranges(dist.get_rank())):
                whole = torch.cat([whole.narrow(dim, a, b - a) for a, b in ranges], dim)
        assert torch.equal(found[key], whole), f"{name}: {key}"
