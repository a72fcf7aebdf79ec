"""Write a checkpoint with all ranks: one rank creates the files, then every rank writes its own pieces into them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType

from partita.checkpoint.durable import appear, failing_as, partial_of, start_partial
from partita.checkpoint.header import DTYPE_BITS, TensorInfo, brief, encode_header, reason, tensor_bytes
from partita.checkpoint.index import MODEL, index_name, weights_name
from partita.checkpoint.mapped_writes import has_windows, is_short, write_runs
from partita.checkpoint.read import Range, byte_runs, flat_bytes
from partita.checkpoint.run_lock import RunLock
from partita.errors import CheckpointError
from partita.ranks.groups import AxisGroups, Communicator

_METADATA = {"format": "pt"}  # transformers rejects files without it


@dataclass(frozen=True)
class FilePlan:
    """A file to write: its first bytes, and the position of each tensor's data. `file` of each tensor is just `name`."""

    name: str
    header: bytes
    tensors: Mapping[str, TensorInfo]
    size_bytes: int


def plan_files(
    tensors: Iterable[tuple[str, str, Sequence[int]]], max_shard_bytes: int, *, stem: str = MODEL
) -> tuple[FilePlan, ...]:
    """Distribute tensors, each a (name, dtype, shape), over files in the given order, the same on every rank.

    A file takes tensors up to `max_shard_bytes` of data in total; a larger tensor has a file of its own.
    One file is `model.safetensors`, more are `model-00001-of-0000N.safetensors`, or whatever `stem` is in place of
    `model`. Within a file the widest dtypes come first, as the safetensors library does it, so all data is aligned.
    Raises CheckpointError if the format does not support a tensor.
    """
    if max_shard_bytes <= 0:
        raise CheckpointError(f"max_shard_bytes must be above 0, but is {max_shard_bytes}")
    shards: list[list[tuple[str, str, Sequence[int]]]] = [[]]
    shard_bytes = 0
    names: set[str] = set()
    for name, dtype, shape in tensors:
        size_bytes = tensor_bytes(f"tensor {brief(name)}", dtype, shape)
        if name in names:
            raise CheckpointError(f"tensor {brief(name)} occurs twice; names must differ")
        names.add(name)
        if shards[-1] and shard_bytes + size_bytes > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append((name, dtype, shape))
        shard_bytes += size_bytes
    return tuple(_plan_file(_file_name(stem, n, len(shards)), shard) for n, shard in enumerate(shards, 1))


def index_json(plan: Sequence[FilePlan]) -> str:
    """The text of `model.safetensors.index.json`, as Hugging Face writes it."""
    total = sum(info.nbytes for file in plan for info in file.tensors.values())
    weight_map = {name: file.name for file in plan for name in file.tensors}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"


def create_files(folder: str | os.PathLike[str], plan: Sequence[FilePlan]) -> None:
    """Write the headers of all files, and reserve space for their data. One rank does this, before any rank writes.

    Raises CheckpointError if the folder already holds weights, which a reader would mix with these, or if the files
    cannot be created, such as on a full disk; then none is left behind.
    """
    place = Path(folder)
    created: list[Path] = []
    file = place
    try:
        place.mkdir(parents=True, exist_ok=True)
        refuse_weights(place)
        for one in plan:
            file = place / one.name
            fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            created.append(file)
            try:
                _write_all(fd, memoryview(one.header), 0)
                _reserve(fd, one.size_bytes)
            finally:
                os.close(fd)
    except OSError as error:
        for made in created:
            made.unlink(missing_ok=True)
        raise CheckpointError(f"{file}: cannot be created: {reason(error)}") from error


def refuse_weights(folder: Path) -> None:
    """Raise CheckpointError if a folder already holds weights, which a reader would mix with others."""
    old = (
        sorted(name for name in os.listdir(folder) if name.endswith((".safetensors", index_name())))
        if folder.exists()
        else []
    )
    if old:
        raise CheckpointError(
            f"{folder}: must hold no weights before a save, but holds {brief(old)}: remove them or save elsewhere"
        )


def write_index(folder: str | os.PathLike[str], plan: Sequence[FilePlan], *, stem: str = MODEL) -> None:
    """Write the index of a plan of several files; one file needs none. Raises CheckpointError if that fails."""
    if len(plan) < 2:
        return
    file = Path(folder) / index_name(stem)
    try:
        with open(file, "wb") as opened:
            opened.write(index_json(plan).encode())
            opened.flush()
            os.fsync(opened.fileno())
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be written: {reason(error)}") from error


class Writer:
    """Writes pieces of tensors into files that `create_files` made, from any number of threads.

    A context manager: leaving it without an error calls `finish`, after which the data is on disk.
    """

    def __init__(self, folder: str | os.PathLike[str], plan: Sequence[FilePlan]) -> None:
        self.folder = Path(folder)
        self.bytes_written = 0
        self._tensors = {name: info for file in plan for name, info in file.tensors.items()}
        self._sizes_bytes = {file.name: file.size_bytes for file in plan}
        self._fds: dict[str, int] = {}
        self._with_windows: set[str] = set()
        self._lock = threading.Lock()

    def write(self, name: str, ranges_by_dim: Sequence[Sequence[Range]], data: memoryview) -> None:
        """Write a piece of tensor `name` from `data`, in C order; the ranges are as for `Reader.read`.

        Raises CheckpointError if there is no such tensor, if the ranges or `data` do not fit it, or if the system
        cannot write.
        """
        info = self._tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{self.folder}: tensor {brief(name)} is not in this plan, which has {len(self._tensors)} tensors: "
                f"{brief(list(self._tensors)[:4])} and so on"
            )
        runs = byte_runs(info, ranges_by_dim)
        data = flat_bytes(info, data, runs.size_bytes, "data")
        fd = self._open(info.file.name)
        done = 0
        try:
            if is_short(runs) and info.file.name in self._with_windows:
                write_runs(fd, runs, data)
            else:
                for start, run_bytes in runs:
                    _write_all(fd, data[done : done + run_bytes], start)
                    done += run_bytes
        except OSError as error:
            raise CheckpointError(
                f"{self.folder / info.file}: tensor {brief(name)}: cannot be written: {reason(error)}"
            ) from error
        with self._lock:
            self.bytes_written += runs.size_bytes

    def finish(self) -> None:
        """Flush everything that was written to disk. Raises CheckpointError if that fails."""
        with self._lock:
            for name, fd in self._fds.items():
                try:
                    os.fsync(fd)
                except OSError as error:
                    raise CheckpointError(f"{self.folder / name}: cannot be flushed: {reason(error)}") from error

    def close(self) -> None:
        """Close the files, finished or not."""
        with self._lock:
            while self._fds:
                os.close(self._fds.popitem()[1])

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()

    def _open(self, name: str) -> int:
        with self._lock:
            if name in self._fds:
                return self._fds[name]
            file = self.folder / name
            try:
                fd = os.open(file, os.O_RDWR | os.O_CLOEXEC)
            except OSError as error:
                raise CheckpointError(
                    f"{file}: cannot be opened to write: {reason(error)}: one rank must call create_files first"
                ) from error
            file_bytes = os.fstat(fd).st_size
            if file_bytes != self._sizes_bytes[name]:
                os.close(fd)
                raise CheckpointError(
                    f"{file}: must have the plan's {self._sizes_bytes[name]} bytes, but has {file_bytes}: "
                    "every rank must use the plan of create_files"
                )
            self._fds[name] = fd
            if has_windows(fd):
                self._with_windows.add(name)
            return fd


def _plan_file(name: str, tensors: Sequence[tuple[str, str, Sequence[int]]]) -> FilePlan:
    ordered = sorted(tensors, key=lambda one: -DTYPE_BITS[one[1]])
    header, offsets = encode_header(ordered, _METADATA)
    infos = {one: TensorInfo(Path(name), one, dtype, tuple(shape), *offsets[one]) for one, dtype, shape in ordered}
    size_bytes = max((end for _, end in offsets.values()), default=len(header))
    return FilePlan(name, header, MappingProxyType(infos), size_bytes)


def _file_name(stem: str, number: int, count: int) -> str:
    return weights_name(stem) if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.safetensors"


def _reserve(fd: int, size_bytes: int) -> None:
    """Set the size of the file, and reserve its space if the system can, so that a full disk is detected now."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size_bytes)
            return
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
    os.ftruncate(fd, size_bytes)


def _write_all(fd: int, data: memoryview, start_bytes: int) -> None:
    while data:
        done = os.pwrite(fd, data, start_bytes)
        data = data[done:]
        start_bytes += done


def write_folder(
    path: Path,
    groups: AxisGroups[Communicator],
    files: Sequence[FilePlan],
    beside: Callable[[Path], None],
    write: Callable[[Writer], None],
    collective: Callable[[], AbstractContextManager[None]],
    others: Callable[[], None] = lambda: None,
) -> None:
    """Write a folder of safetensors files that appears at `path` complete or not at all; every rank must call this.

    Args:
        path: The folder to write.
        groups: This rank's groups; ranks with the first copy of a tensor write.
        files: The planned files, the same on every rank.
        beside: Writes the other files of the folder, on the first rank.
        write: Writes a rank's own parts.
        collective: Makes a block at whose end every rank raises what one of them raised in it.
        others: What the ranks that do not write do meanwhile.

    Raises:
        CheckpointError: The folder already holds weights, another save is writing it, or it cannot be written; on every rank.
    """
    with contextlib.ExitStack() as lock:
        with collective():
            partial = partial_of(path)
            if groups.rank == 0:  # two saves to one folder would write into the same files
                lock.enter_context(RunLock(path, file=partial.with_name(f"{partial.name}.lock")))
        try:
            with collective():
                if groups.rank == 0:
                    with failing_as(path, "cannot be created"):
                        refuse_weights(path)
                    start_partial(path)
                    create_files(partial, files)
                    write_index(partial, files)
                    beside(partial)
            with collective():
                if groups.writes:
                    with Writer(partial, files) as writer:
                        write(writer)
                else:
                    others()
            with collective():
                if groups.rank == 0:
                    appear(partial, path)
        except Exception:
            if groups.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise
