"""What a model's cache takes, and whether its rows may share a forward: measured with a few short texts before serving."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from partita.core.model.spec import longest_text
from partita.errors import ModelError
from partita.generation import Sequence
from partita.notes import note
from partita.ranks.memory import machine_bytes, share_of
from partita.serving import ServeSettings
from partita.serving.blocks import CacheLayout, layout_within
from partita.torch.model.block_cache import Form, Pools, entries_of
from partita.torch.model.float64 import Float64Everywhere
from partita.torch.model.parts import plan_of
from partita.torch.model.sequences import arguments_of
from partita.torch.proof.family import dtype_of
from partita.torch.serving.adapters import ServedAdapters
from partita.torch.serving.forwards import DIVIDED, Alone, BlockForward, Through, own_entries
from partita.torch.transformers_internals import attending_by_row, attends_by_chunks, is_stateful, misplaces_padding

_LONG, _SHORT = 9, 6
"""The lengths of two short texts."""

_SLOTS = 32
_EXACT_SLOTS = 24
"""Slots of a row of the measurement of exact rows."""

_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""By dtype, the largest difference of logits that is rounding, relative to the largest logit; 0.1 for narrower dtypes."""


@dataclass(frozen=True)
class Measured:
    """The cache of a replica, and this rank's part of it; no pools where each request has a cache of its own."""

    layout: CacheLayout
    pools: Pools | None


def measure(model: nn.Module, stages: Through, settings: ServeSettings, adapters: ServedAdapters) -> Measured:
    """Measure the cache of `model` and divide the budget into blocks. Every rank calls it, in inference mode.

    Raises:
        ModelError: The budget has no room for a block.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    cp = plan_of(model)[1].cp.size
    # A chunk of the first text is divided over context parallel ranks.
    texts = [_text(model, max(_LONG, DIVIDED * cp + 4)), _text(model, _SHORT)]
    alone = [Alone(model, Sequence(0, text, 1)) for text in texts]
    expected: dict[int, Tensor] = {}
    with _precisely(model):
        stages.run(alone, lambda output, place: expected.update({place: output.logits[:, -1].clone()}))
    found = _pools_of(model, alone[0].caches)
    size = settings.block_tokens
    if _agree(model, found is not None):
        entries, forms = found or ([], {})
        trial = Pools(entries, forms, _SLOTS, device)
        with _precisely(model):
            is_equal = _is_equal(model, stages, trial, texts, expected)
        if _agree(model, is_equal):
            layout = _layout(model, settings, sum(form.bytes for form in forms.values()) * size, 1)
            pools = Pools(entries, forms, (layout.num_blocks + 1) * size, device)
            if settings.exact_rows:
                trial = Pools(entries, forms, _EXACT_SLOTS * settings.max_sequences + 1, device)
                rows = settings.max_sequences
                for name in adapters.names:
                    adapters.choose(name)
                    rows = min(rows, _exact_rows(model, stages, trial))
                layout = replace(layout, exact_rows=rows, chunked=False, reused=False)
            return Measured(layout, pools)
    if cp > 1:
        raise ModelError(
            f"{type(model).__name__} cannot share forwards between requests exactly, and the cache of a request by itself is "
            f"not distributed over ranks (cp={cp}). Use cp=1, and tp or pp in its place."
        )
    if plan_of(model)[1].rank == 0:
        note(
            f"{type(model).__name__} cannot share forwards between requests exactly, so each runs in forwards of its own."
        )
    bytes_of = [sum(_bytes(cache) for cache in one.caches.values()) for one in alone]
    token = -(-(bytes_of[0] - bytes_of[1]) // (_LONG - _SHORT))
    state = max(0, bytes_of[0] - _LONG * token)
    block = max(1, token * size, state // 64)
    return Measured(_layout(model, settings, block, 0, state_blocks=-(-state // block)), None)


def _precisely(model: nn.Module) -> AbstractContextManager[object]:
    """A context in which a model in float64 rounds nothing to float32: some families' softmax does, merged parts do not."""
    parts = plan_of(model)[1].cp.size > 1 and dtype_of(model) == torch.float64
    return Float64Everywhere() if parts else nullcontext()


def _layout(
    model: nn.Module, settings: ServeSettings, block_bytes: int, reserved: int, state_blocks: int = 0
) -> CacheLayout:
    """The layout in which the rank whose blocks are the largest keeps its budget."""
    batched = reserved > 0
    tokens = settings.block_tokens * plan_of(model)[1].cp.size
    layout = CacheLayout(
        0, tokens, _largest(model, state_blocks), batched=batched, chunked=batched, reused=batched,
        block_bytes=_largest(model, block_bytes),
    )  # fmt: skip
    free = -_largest(model, -_free_bytes(model)) if settings.cache_bytes is None else None
    return layout_within(settings, longest_text(plan_of(model)[0].spec), layout, free, reserved=reserved)


def _free_bytes(model: nn.Module) -> int:
    """This rank's share of the free memory of its device, or of its machine."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if device.type != "cuda":
        return share_of(*machine_bytes(), ranks)
    torch.cuda.empty_cache()
    return share_of(*torch.cuda.mem_get_info(device), -(-ranks // torch.cuda.device_count()))


def _pools_of(model: nn.Module, caches: dict[int, Any]) -> tuple[list[bool], dict[int, Form]] | None:
    """The entries of the model's cache and the forms of this rank's layers; None if rows cannot share a forward."""
    if not {"attention_mask", "position_ids"} <= arguments_of(model):
        return None
    if is_stateful(model) or misplaces_padding(model) or attends_by_chunks(model.config):
        return None
    entries: list[bool] = []
    forms: dict[int, Form] = {}
    for stage, cache in caches.items():
        found = entries_of(cache) if cache is not None and hasattr(cache, "layers") else None
        if found is None or (entries and found != entries):
            return None
        entries = found
        for index in own_entries(model, stage, len(entries)):
            if index < len(entries) and cache.layers[index].is_initialized:
                if cache.layers[index].keys.dim() != 4:
                    return None
                forms[index] = Form.of(cache.layers[index])
    return (entries, forms) if entries else None


def _is_equal(
    model: nn.Module, stages: Through, pools: Pools, texts: list[list[int]], expected: dict[int, Tensor]
) -> bool:
    """Whether both texts in chunks, and then in one batch, give the logits of each alone; true where no logits are."""
    long, short = map(len, texts)
    slots = [torch.arange(_SLOTS - 1, _SLOTS - 1 - _LONG, -1), torch.arange(1, 1 + 2 * short, 2)]
    steps = [
        [(0, 0, long - 4)], [(0, long - 4, 3), (1, 0, 2)], [(1, 2, short - 3)], [(0, long - 1, 1), (1, short - 1, 1)],
    ]  # fmt: skip
    found: dict[int, Tensor] = {}
    try:
        for step in steps:
            ids = [texts[text][start : start + count] for text, start, count in step]
            forward = BlockForward(model, pools, ids, [(slots[text], start) for text, start, _ in step])
            stages.run([forward], lambda output, place: found.update({place: output.logits[:, -1].clone()}))
    except Exception:
        # With stages or context parallel ranks, the others would wait for this one.
        if plan_of(model)[0].num_stages > 1 or plan_of(model)[1].cp.size > 1:
            raise
        return False
    if not expected:
        return True
    close = _CLOSE.get(found[0].dtype, 0.1)
    both = torch.cat([expected[0], expected[1]]).double()
    return bool((found[0].double() - both).abs().max() <= close * both.abs().max())


def _exact_rows(model: nn.Module, stages: Through, pools: Pools) -> int:
    """The largest number of rows up to which each row of a forward of next tokens has the very logits of the row alone."""
    most = (len(next(iter(pools.keys.values()))) - 1) // _EXACT_SLOTS if pools.keys else 1
    most = _largest(model, most)
    lengths = [2 + 5 * row % (_EXACT_SLOTS - 2) for row in range(most)]
    slots = [torch.arange(1 + row * _EXACT_SLOTS, 1 + (row + 1) * _EXACT_SLOTS) for row in range(most)]

    def logits_of(rows: list[int]) -> Tensor | None:
        found: list[Tensor] = []
        ids = [[_token(model, 7 * row + lengths[row])] for row in rows]
        forward = BlockForward(model, pools, ids, [(slots[row], lengths[row]) for row in rows])
        with attending_by_row(lambda: pools.lengths):
            stages.run([forward], lambda output, place: found.append(output.logits[:, -1].clone()))
        return found[0] if found else None

    for row in range(most):
        ids = [_token(model, 3 * row + i) for i in range(lengths[row])]
        stages.run([BlockForward(model, pools, [ids], [(slots[row], 0)])], lambda output, place: None)
    alone = [logits_of([row]) for row in range(most)]
    for count in range(2, most + 1):
        rows = [(row + count) % most for row in range(count)]
        found = logits_of(rows)
        same = found is None or all(torch.equal(found[i], alone[row][0]) for i, row in enumerate(rows))  # type: ignore[index]
        if not _agree(model, same):
            return count - 1
    return most


def _token(model: nn.Module, number: int) -> int:
    return number % max(1, plan_of(model)[0].spec.vocab_size or 1)


def _text(model: nn.Module, length: int) -> list[int]:
    vocabulary = plan_of(model)[0].spec.vocab_size or length + 1
    return [1 + (3 * i + length) % max(1, min(vocabulary - 1, 24)) for i in range(length)]


def _bytes(cache: Any) -> int:
    """The bytes of all tensors that a cache refers to."""
    found: dict[int, int] = {}
    pending: list[Any] = [cache]
    seen: set[int] = set()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            found[id(value)] = value.numel() * value.itemsize
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, (list, tuple)):
            pending += value
        elif type(value).__module__.startswith("transformers") and hasattr(value, "__dict__"):
            pending += vars(value).values()
    return sum(found.values())


def _agree(model: nn.Module, value: bool) -> bool:
    """Whether `value` is true on every rank."""
    return _largest(model, int(not value)) == 0


def _largest(model: nn.Module, value: int) -> int:
    """The largest value of any rank."""
    number = torch.tensor([value], dtype=torch.int64)
    for comm in plan_of(model)[1].axes:
        comm.all_reduce_(number, dist.ReduceOp.MAX)
    return int(number)
