"""Write one checkpoint in the background, in a thread of each rank.

    rank 0: create files   write own bytes     flush them, digest files     rank 0: manifest, rename
          begun -------------^  written ----------^         digested ---------^

The threads wait for each other by small files, marks, in the folder being written. They use no collectives: these belong to
the main thread, and would interleave with those of training in a different order on each rank.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from partita.checkpoint.durable import failing_as, write_all
from partita.checkpoint.index import index_name
from partita.checkpoint.manifest import MANIFEST_NAME, Digest, Manifest, deal, digest, digest_of, digests
from partita.checkpoint.read import Range
from partita.checkpoint.run_folder import RunFolder
from partita.checkpoint.write import FilePlan, Writer, create_files, write_index
from partita.errors import CheckpointError
from partita.ranks.liveness import ME

POLL_S = 0.01
"""Seconds between checks for a mark."""

_MARKS = ".marks"


@dataclass(frozen=True)
class Part:
    """A piece of a tensor on disk: its name there, the ranges of each dim, and a copy of its bytes in C order.

    Constant data needs no copy: `data` then reads the bytes when they are written.
    """

    name: str
    ranges_by_dim: Sequence[Sequence[Range]]
    data: memoryview | Callable[[], memoryview]
    owner: object = None
    """An object that must live as long as `data`."""


@dataclass
class Job:
    """The work of one rank for one checkpoint.

    Attributes:
        run: The run's folder.
        step: The step after which it is saved.
        keep: Number of newest checkpoints to keep.
        rank: This rank.
        ranks: Number of ranks.
        files: All files of tensors, by the prefix of their names.
        parts: The parts that this rank writes; each is released after it.
        small: Other files, on the first rank.
        stopped: Set to end the work before it is done.
        bytes_written: Bytes of the parts written so far.
    """

    run: RunFolder
    step: int
    keep: int | None
    rank: int
    ranks: int
    files: Mapping[str, tuple[FilePlan, ...]]
    parts: list[Part]
    small: Mapping[str, bytes]
    stopped: threading.Event = field(default_factory=threading.Event)
    bytes_written: int = 0

    @property
    def partial(self) -> Path:
        """The folder in which it is written."""
        return self.run.partial(self.step)

    def do(self) -> None:
        """Write the checkpoint with the other ranks. If this raises CheckpointError, the folder has no new checkpoint."""
        plan = [file for files in self.files.values() for file in files]
        if self.rank == 0:
            self._make(plan)
        self._wait_for(["begun"])
        with Writer(self.partial, plan) as writer:
            self._order(plan)
            while self.parts:
                part = self.parts.pop()
                self._go_on()
                writer.write(part.name, part.ranges_by_dim, part.data() if callable(part.data) else part.data)
            self.bytes_written = writer.bytes_written
            self._mark(f"written-{self.rank}")
            with ThreadPoolExecutor(1) as flush:  # the disk is slow, and digests do not need it
                flushed = flush.submit(writer.finish)
                found = self._digest(plan)
                flushed.result()
        self._mark(f"digested-{self.rank}", json.dumps(found))
        if self.rank == 0:
            self._publish(plan)

    def _order(self, plan: list[FilePlan]) -> None:
        """Sort the parts by position on disk, starting elsewhere on each rank: writers of one file block each other."""
        places = {name: (file.name, info.start_bytes) for file in plan for name, info in file.tensors.items()}
        self.parts.sort(key=lambda part: places[part.name], reverse=True)  # the last part is written first
        first = len(self.parts) * self.rank // self.ranks
        self.parts[:] = self.parts[len(self.parts) - first :] + self.parts[: len(self.parts) - first]

    def _digest(self, plan: list[FilePlan]) -> dict[str, tuple[int, str]]:
        """The size and the SHA-256 of this rank's share of the files, which all ranks have written."""
        self._wait_for([f"written-{rank}" for rank in range(self.ranks)])
        names = deal({file.name: file.size_bytes for file in plan}, self.ranks)[self.rank]
        return {name: (one.size_bytes, one.sha256) for name, one in digests(self.partial, names).items()}

    def _make(self, plan: list[FilePlan]) -> None:
        """Create everything but the data."""
        partial = self.partial
        with failing_as(partial, "cannot be created"):
            (partial / _MARKS).mkdir(parents=True)
        create_files(partial, plan)
        for stem, files in self.files.items():
            write_index(partial, files, stem=stem)
        write_all(partial, self.small)
        self._mark("begun")

    def _publish(self, plan: list[FilePlan]) -> None:
        self._wait_for([f"digested-{rank}" for rank in range(self.ranks)])
        found: dict[str, Digest] = {}
        for rank in range(self.ranks):
            told = json.loads((self.partial / _MARKS / f"digested-{rank}").read_text())
            found.update({name: Digest(*one) for name, one in told.items()})
        for file in plan:
            if found[file.name].size_bytes != file.size_bytes:
                self._refuse_changed(file.name)
        for name, data in self.small.items():
            if digest(self.partial / name) != (there := digest_of(data)):
                self._refuse_changed(name)
            found[name] = there
        indices = [index_name(stem) for stem, files in self.files.items() if len(files) > 1]
        found.update(digests(self.partial, indices))
        with failing_as(self.partial, "cannot be finished"):
            shutil.rmtree(self.partial / _MARKS)
            (self.partial / MANIFEST_NAME).write_text(Manifest(found).to_json(), encoding="utf-8")
        self.run.publish(self.step, self.keep)

    def _refuse_changed(self, name: str) -> NoReturn:
        raise CheckpointError(f"{self.partial / name}: was changed while it was written")

    def _mark(self, name: str, text: str = "") -> None:
        mark = self.partial / _MARKS / name
        new = mark.with_name(f"{name}.new")
        with failing_as(mark, "cannot be written"):
            new.write_text(text)
            os.replace(new, mark)

    def _wait_for(self, names: list[str]) -> None:
        """Wait until other ranks have written their marks."""
        left = [self.partial / _MARKS / name for name in names]
        while left := [mark for mark in left if not mark.exists()]:
            self._go_on()
            time.sleep(POLL_S)

    def _go_on(self) -> None:
        if self.stopped.is_set():
            raise CheckpointError("the run has ended before it was written")


class BackgroundWrite:
    """A job in its own thread.

    Attributes:
        job: The job.
        held_s: Seconds for which training has been paused for it.
        error: The error of the job, or None.
        is_done: Whether the job is done.
    """

    def __init__(self, job: Job, held_s: float) -> None:
        """Start the job, after training has been paused for `held_s` seconds."""
        self.job, self.held_s = job, held_s
        self.error: str | None = None
        self.is_done = False
        self.start_s = time.perf_counter() - held_s
        self.end_s = self.start_s
        self.thread = threading.Thread(target=self._do, name=f"save step {job.step}", daemon=True)
        self.thread.start()

    def _do(self) -> None:
        ME.aside = f"writing the checkpoint of step {self.job.step}"
        try:
            self.job.do()
            self.end_s = time.perf_counter()
            self.is_done = True
        except Exception as error:
            self.error = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        finally:
            ME.aside = ""

    @property
    def seconds(self) -> float:
        """The seconds since training was first paused for it."""
        return self.end_s - self.start_s

    def stop(self) -> None:
        """End the thread, even before its work is done, and wait for it."""
        self.job.stopped.set()
        self.thread.join()
