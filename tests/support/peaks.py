"""The largest bytes of tensors at once."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile


@contextmanager
def measured() -> Iterator[list[int]]:
    """A list that has the largest bytes of the context's tensors at once after it has ended."""
    torch.set_num_threads(1)
    gc.collect()
    found: list[int] = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield found
    used = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            used += event.nbytes()
            peak = max(peak, used)
    found.append(peak)
