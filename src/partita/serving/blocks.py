"""Cache blocks: who holds which, and which ones keep the beginning of earlier texts.

A block holds the keys and values of `block_tokens` tokens in every layer. Full blocks are found again by a digest of the
adapters that computed them and of all tokens up to their end, so a block is shared only between texts that are equal up to
there and have the same adapters. Block 0 is never given away: rows of a batch are padded with it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from partita.errors import ModelError, PlanError
from partita.serving.requests import ServeSettings


@dataclass(frozen=True)
class CacheLayout:
    """The cache of one replica.

    Attributes:
        num_blocks: Blocks that requests can hold.
        block_tokens: Tokens of a block.
        state_blocks: Blocks that each request needs beside those of its tokens, for state of fixed size.
        batched: Whether rows of several requests run in one forward. If not, each request runs in forwards of its own.
        chunked: Whether prompts are computed in chunks.
        reused: Whether blocks of earlier texts can be used for other requests.
        copied: Whether a request has a copy of the blocks that it shares, and so needs memory for these too.
        block_bytes: Bytes of a block on the rank where it takes most.
        budget_bytes: The memory of each rank for them.
        is_measured: Whether the budget is what was free, and no one's choice.
        exact_rows: The largest number of rows in a forward of next tokens with the bits of each row alone; prompts are then
            computed one by one. 0 if other rows may change the rounding.
    """

    num_blocks: int
    block_tokens: int
    state_blocks: int = 0
    batched: bool = True
    chunked: bool = True
    reused: bool = True
    copied: bool = False
    block_bytes: int = 0
    budget_bytes: int = 0
    is_measured: bool = False
    exact_rows: int = 0

    def __str__(self) -> str:
        whence = " of the memory that was free after loading" if self.is_measured else ""
        return (
            f"{self.num_blocks} blocks of {self.block_tokens} tokens ({self.block_bytes} bytes a block, {self.budget_bytes} "
            f"bytes{whence} on each rank)"
        )

    def blocks_for(self, tokens: int) -> int:
        """The number of blocks for a text of `tokens` tokens."""
        return self.state_blocks + -(-tokens // self.block_tokens)


def layout_within(
    settings: ServeSettings,
    longest: int,
    layout: CacheLayout,
    free_bytes: int | None,
    *,
    reserved: int = 0,
) -> CacheLayout:
    """The blocks that a rank's memory has room for.

    Args:
        settings: The settings, whose `cache_bytes` is the budget if it is given.
        longest: The number of tokens of the model's longest text.
        layout: What blocks are; its numbers of blocks and bytes of budget are replaced.
        free_bytes: The budget if the settings give none.
        reserved: Blocks that no request can hold.

    Raises:
        ModelError: There is no room for a request of one block.
    """
    given, block = settings.cache_bytes, max(1, layout.block_bytes)
    budget = given if given is not None else free_bytes or 0
    count, least = budget // block - reserved, 1 + layout.state_blocks
    if count < least:
        what = f"the free memory of {budget} bytes a rank" if given is None else f"cache_bytes={budget}"
        state = f", and a request {layout.state_blocks} blocks for its state" if layout.state_blocks else ""
        raise ModelError(
            f"{what} has no room for a request: a block of {layout.block_tokens} tokens needs {block} bytes{state}. Give at "
            f"least {(least + reserved) * block} bytes (--cache-bytes)."
        )
    if given is None:
        count = min(count, settings.max_sequences * layout.blocks_for(longest) * (1 + layout.copied))
        budget = (count + reserved) * block
    return replace(layout, num_blocks=count, budget_bytes=budget, is_measured=given is None)


@dataclass(frozen=True)
class Held:
    """The blocks of a text.

    Attributes:
        blocks: The blocks, in order of its tokens.
        copied: A block of another text and one of these that must have the same content before the next forward.
    """

    blocks: list[int]
    copied: tuple[int, int] | None = None


class BlockPool:
    """The blocks of one replica: free, held by requests, or kept for prompts to come and evicted when blocks are needed."""

    def __init__(self, layout: CacheLayout, *, keeps_prefixes: bool) -> None:
        """Create a pool in which all blocks are free."""
        self.layout = layout
        self.keeps_prefixes = keeps_prefixes and layout.reused
        self._free = list(range(layout.num_blocks, 0, -1))
        self._holders: dict[int, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()

    @property
    def used(self) -> int:
        """Blocks that requests hold."""
        return len(self._holders)

    @property
    def kept(self) -> int:
        """Blocks that no request holds, and that keep the beginning of an earlier text."""
        return len(self._unused)

    @property
    def available(self) -> int:
        """Blocks that `take` can give, those that it has to evict included."""
        return len(self._free) + len(self._unused)

    def match(self, ids: Sequence[int], adapter: str = "") -> list[int]:
        """The blocks in which `adapter` computed the beginning of `ids`; at least one token of `ids` is left to compute."""
        found: list[int] = []
        if self.keeps_prefixes:
            for digest in digests(ids[: len(ids) - 1], self.layout.block_tokens, adapter):
                if digest not in self._block_of:
                    break
                found.append(self._block_of[digest])
        return found

    def take(self, count: int, shared: Sequence[int] = ()) -> list[int] | None:
        """Hold the blocks `shared`, from `match`, and others up to `count`; None, and nothing is held, if too few are left."""
        unused = sum(block in self._unused for block in shared)
        if count - len(shared) > self.available - unused:
            return None
        for block in shared:
            self._unused.pop(block, None)
            self._holders[block] = self._holders.get(block, 0) + 1
        taken = [self._next() for _ in range(count - len(shared))]
        self._holders.update(dict.fromkeys(taken, 1))
        return [*shared, *taken]

    def _next(self) -> int:
        if self._free:
            return self._free.pop()
        block, _ = self._unused.popitem(last=False)
        self._forget(block)
        return block

    def release(self, blocks: Sequence[int]) -> None:
        """Give back the blocks of a request. Those that keep a text are evicted later, the end of the text first."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            del self._holders[block]
            if block in self._digest_of:
                self._unused[block] = None
            else:
                self._free.append(block)

    def keep(self, ids: Sequence[int], blocks: Sequence[int], adapter: str = "") -> None:
        """Record that the first of `blocks` hold the tokens `ids`, all of which `adapter` has computed."""
        if not self.keeps_prefixes:
            return
        for block, digest in zip(blocks, digests(ids, self.layout.block_tokens, adapter), strict=False):
            if digest not in self._block_of and block not in self._digest_of:
                self._block_of[digest], self._digest_of[block] = block, digest

    def truncate(self, blocks: Sequence[int], tokens: int) -> Held | None:
        """Forget a text after its first `tokens` tokens, and give back the blocks after them.

        Other tokens may then be appended: a last block that is not full no longer keeps the text that it had, or is replaced by
        a copy if other texts share it. None, and nothing changes, if no block is left for a copy.

        Raises:
            PlanError: The requests' state is no list of tokens.
        """
        return self._begin(blocks, tokens, self.layout.blocks_for(tokens), is_copy=False)

    def copy(self, blocks: Sequence[int], tokens: int, count: int) -> Held | None:
        """Hold the blocks of a second text that begins with the first `tokens` tokens of one.

        Both share the blocks that are full. None, and nothing changes, if too few blocks are left.

        Args:
            blocks: The blocks of the first text, which keeps them.
            tokens: The number of tokens, all of which have been computed.
            count: The number of blocks of the second text.

        Raises:
            PlanError: The requests' state is no list of tokens.
        """
        return self._begin(blocks, tokens, count, is_copy=True)

    def _begin(self, blocks: Sequence[int], tokens: int, count: int, *, is_copy: bool) -> Held | None:
        if not self.layout.batched:
            raise PlanError("the cache of this model keeps no list of tokens, so it cannot be truncated or copied.")
        full, has_rest = tokens // self.layout.block_tokens, tokens % self.layout.block_tokens > 0
        if is_copy:
            taken = self.take(count, blocks[:full])
            return None if taken is None else Held(taken, (blocks[full], taken[full]) if has_rest else None)
        kept, last = list(blocks[:count]), blocks[full] if has_rest else None
        if last is not None and self._holders[last] > 1:
            freed = sum(self._holders[block] == 1 for block in blocks[count:])
            if not self.available + freed:
                return None
            self.release(blocks[full:])
            kept[full:] = self.take(1) or []
            return Held(kept, (last, kept[full]))
        self.release(blocks[count:])
        if last in self._digest_of:
            self._forget(last)
        return Held(kept)

    def _forget(self, block: int) -> None:
        del self._block_of[self._digest_of.pop(block)]


def digests(ids: Sequence[int], size: int, adapter: str = "") -> list[bytes]:
    """For each full block of `size` tokens of `ids`, a digest of the adapters and of all tokens up to its end."""
    before, found = hashlib.sha256(adapter.encode()).digest(), []
    for start in range(0, len(ids) - size + 1, size):
        text = ",".join(map(str, ids[start : start + size]))
        before = hashlib.sha256(before + text.encode()).digest()
        found.append(before)
    return found
