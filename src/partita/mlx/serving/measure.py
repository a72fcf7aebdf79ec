"""What a model's cache takes, and whether prompts may be computed in chunks and share blocks: measured before serving."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from partita.core.model.spec import longest_text
from partita.mlx.mlx_lm_internals import is_state, state_bytes, token_bytes, window_of
from partita.mlx.model.block_cache import Blocks, TextCache, forgets
from partita.mlx.model.parts import plan_of
from partita.mlx.model.rotary import RotaryEmbedding
from partita.mlx.serving.forwards import Forward, Through, forwards_of
from partita.notes import note
from partita.ranks.memory import machine_bytes, share_of
from partita.serving import ServeSettings
from partita.serving.blocks import CacheLayout, layout_within

_TOKENS, _BLOCK = 9, 3
"""The lengths of a short text, and of a block of it."""

_CLOSE = {mx.float64: 1e-9, mx.float32: 1e-3}
"""By dtype, the largest difference of logits that is rounding, relative to the largest logit; 0.1 for narrower dtypes."""


@dataclass(frozen=True)
class Measured:
    """The cache of a replica, and whether it has entries with a window."""

    layout: CacheLayout
    forgets: bool


def measure(model: nn.Module, stages: Through, settings: ServeSettings) -> Measured:
    """Measure the cache of `model` and divide the budget into blocks. Every rank calls it.

    Raises:
        ModelError: The budget has no room for a block.
    """
    ids = _text(model)
    text = TextCache(stages.new_caches())
    expected = _logits(stages, text, [ids])
    chunked = not settings.exact_rows and _agree(model, _takes_chunks(text))
    if chunked:
        parts = TextCache(stages.new_caches())
        chunked = _agree(model, _is_close(expected, _logits(stages, parts, [ids[:_BLOCK], ids[_BLOCK:]])))
    why = _why_unshared(model, text, settings.block_tokens) if chunked else "may depend on where parts of a text end"
    keeps = settings.keep_prefixes and not settings.exact_rows
    reused = keeps and _agree(model, not why)
    if reused and not _agree(model, _is_close(expected, _shared(stages, ids))):
        why, reused = "does not have the values of a text's beginning after its end", False
    if keeps and why and plan_of(model)[1].rank == 0:
        note(f"the beginnings of earlier prompts are not reused: the cache of {stages.plan.spec.family} {why}.")
    # Where entries forget tokens, the blocks of a running text are held beside its own cache.
    copies = 2 if reused and forgets(text) else 1
    block = copies * settings.block_tokens * sum(token_bytes(leaf) for leaf in text.leaves)
    state = sum(state_bytes(leaf) for leaf in text.leaves)
    layout = _layout(model, settings, max(1, block, state // 64), state, chunked=chunked, reused=reused)
    return Measured(layout, forgets(text))


def _takes_chunks(text: TextCache) -> bool:
    """Whether the classes of a cache's entries are known not to depend on where the parts of a prompt end."""
    return all(window_of(leaf) is not None or is_state(leaf) for leaf in text.leaves)


def _why_unshared(model: nn.Module, text: TextCache, block_tokens: int) -> str:
    """Why blocks cannot be taken from a text and given to another; empty if they can."""
    windows = [window_of(leaf) for leaf in text.leaves]
    if None in windows:
        return "has a state that belongs to one length of a text"
    if any(0 < window < block_tokens for window in windows if window):
        return f"has a window of fewer than {block_tokens} tokens, those of a block"
    if any(isinstance(module, RotaryEmbedding) and module.form.limit is not None for module in model.modules()):
        return "has keys whose rotary frequencies depend on the length of the text"
    return ""


def _shared(stages: Through, ids: list[int]) -> list[mx.array]:
    """The logits after `ids` of a text that takes its first tokens from another."""
    blocks = Blocks(_BLOCK, forgets=False)
    first = TextCache(stages.new_caches(), (1,))
    blocks.start(first)
    stages.run([Forward(first, ids[:_BLOCK], chooses=False)], lambda logits: None)
    text = TextCache(stages.new_caches(len(ids)), (1, 2, 3), 1)
    blocks.start(text)
    return _logits(stages, text, [ids[_BLOCK:]])


def _logits(stages: Through, text: TextCache, parts: list[list[int]]) -> list[mx.array]:
    """The logits after the last of `parts`; none on a rank without the last stage."""
    found: list[mx.array] = []
    count = len(parts)
    forwards = [one for i, ids in enumerate(parts) for one in forwards_of(text, ids, chooses=i + 1 == count)]
    stages.run(forwards, found.append)
    mx.eval(found)
    return found


def _is_close(expected: list[mx.array], found: list[mx.array]) -> bool:
    """Whether logits differ by rounding only; true where no logits are."""
    if not expected:
        return True
    a, b = (np.array(x.astype(mx.float64 if x.dtype == mx.float64 else mx.float32)) for x in (expected[0], found[0]))
    return bool(np.abs(a - b).max() <= _CLOSE.get(expected[0].dtype, 0.1) * np.abs(a).max())


def _text(model: nn.Module) -> list[int]:
    vocabulary = plan_of(model)[0].spec.vocab_size or _TOKENS + 1
    return [1 + (3 * i) % max(1, min(vocabulary - 1, 24)) for i in range(_TOKENS)]


def _layout(
    model: nn.Module, settings: ServeSettings, block_bytes: int, state_bytes: int, *, chunked: bool, reused: bool
) -> CacheLayout:
    """The layout in which the rank whose blocks are the largest keeps its budget."""
    block = _largest(model, block_bytes)
    layout = CacheLayout(
        0, settings.block_tokens, _largest(model, -(-state_bytes // block)), batched=False, chunked=chunked, reused=reused,
        copied=reused, block_bytes=block,
    )  # fmt: skip
    free = -_largest(model, -_free_bytes(model)) if settings.cache_bytes is None else None
    return layout_within(settings, longest_text(plan_of(model)[0].spec), layout, free)


def _free_bytes(model: nn.Module) -> int:
    """This rank's share of the free memory of its machine."""
    host = platform.node()
    hosts = [host]
    for comm in plan_of(model)[1].axes:
        hosts = [name for names in comm.all_gather_object(hosts) for name in names]
    return share_of(*machine_bytes(), hosts.count(host))


def _agree(model: nn.Module, value: bool) -> bool:
    """Whether `value` is true on every rank."""
    return _largest(model, int(not value)) == 0


def _largest(model: nn.Module, value: int) -> int:
    """The largest value of any rank."""
    for comm in plan_of(model)[1].axes:
        value = max(comm.all_gather_object(value))
    return value
