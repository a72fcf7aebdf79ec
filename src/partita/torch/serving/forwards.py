"""Forwards of a step: of rows whose earlier tokens are in blocks, or of one text with a cache of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from partita.core.sharding.context import tokens_held
from partita.generation import Sequence
from partita.schedule.fit import forward_only
from partita.torch.collectives.comm import Communicator
from partita.torch.model.balance import SWITCH, asks_for_balance
from partita.torch.model.block_cache import Place, Pools, block_cache
from partita.torch.model.context import SharedTokens
from partita.torch.model.parts import plan_of
from partita.torch.model.sequences import SequenceGroup, arguments_of
from partita.torch.stages.cut import is_cut
from partita.torch.stages.pipeline import Pipeline
from partita.torch.transformers_internals import cache_argument

DIVIDED = 2
"""So many new tokens for each context parallel rank are divided; fewer are computed by every rank."""


class Forward(Protocol):
    """A forward of the model through all stages."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of its ids, the same on every rank."""

    def inputs(self, stage: int) -> dict[str, Any]:
        """The model's inputs at `stage`."""

    def keep_cache(self, stage: int, cache: Any) -> None:
        """Keep the cache that the layers of `stage` used."""

    def keep_output(self, output: Any) -> None:
        """Keep the model's output, from which some families keep a state."""


class Through:
    """Runs forwards through the stages of a model."""

    def __init__(self, model: nn.Module) -> None:
        """Run forwards of `model`, a split model."""
        self._model, self._plan = model, plan_of(model)[0]
        self._pipelines: dict[int, Pipeline] = {}

    def run(self, forwards: SequenceOf[Forward], finish: Callable[[Any, int], None]) -> None:
        """Run all forwards; every rank of the replica calls it with forwards of the same shapes.

        Args:
            forwards: The forwards.
            finish: Called on the last stage with the model's output and the index of the forward.
        """
        count = len(forwards)
        if count not in self._pipelines:
            self._pipelines[count] = Pipeline(self._model, forward_only(self._plan, count))
        pipeline = self._pipelines[count]
        pipeline.run(
            lambda stage, place: forwards[place].inputs(stage),
            finish,
            key=lambda place: forwards[place].shape,
            keep_cache=lambda stage, place, cache: forwards[place].keep_cache(stage, cache),
        )
        pipeline.flush()


class BlockForward:
    """A forward of rows whose earlier tokens are in the pools; rows with fewer new tokens than others are padded before them.

    Context parallel ranks keep token t of a text on rank t mod cp. Each computes its own of the new tokens if all rows have
    them at the same places and each rank has `DIVIDED` of them; otherwise every rank computes all.

    Attributes:
        shape: The shape of the new ids on this rank, with their padding.
        lengths: The number of tokens of each row, new ones included.
        last: The context parallel rank that computes the last token; None if every rank does.
    """

    def __init__(
        self, model: nn.Module, pools: Pools, ids: list[list[int]], texts: SequenceOf[tuple[Tensor, int]]
    ) -> None:
        """Place the tokens `ids` of each of `texts`: the slots of its tokens on this rank, and the number of earlier ones."""
        count, cp = max(map(len, ids)), plan_of(model)[1].cp
        starts = [start for _, start in texts]
        pads = torch.tensor([count - len(new) for new in ids])[:, None]
        lengths = [start + len(new) for start, new in zip(starts, ids, strict=True)]
        self.lengths = lengths
        columns = max(lengths)
        held = [tokens_held(length, cp.rank, cp.size) for length in lengths]
        before = [tokens_held(start, cp.rank, cp.size) for start in starts]
        # Some families cannot expand the keys of no token.
        read = torch.zeros(len(ids), max(1, *held), dtype=torch.int64)
        for row, ((slots, _), own) in enumerate(zip(texts, held, strict=True)):
            read[row, read.shape[1] - own :] = slots[:own]
        write = torch.cat([slots[a:b] for (slots, _), a, b in zip(texts, before, held, strict=True)])
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        is_new = torch.arange(count) >= pads
        positions = (torch.arange(count) - pads + torch.tensor(starts)[:, None]) * is_new
        given = torch.tensor([[0] * (count - len(new)) + new for new in ids])
        kept, context = None, None
        self.last: int | None = None
        if cp.size > 1:
            context = _distributed(cp, read > 0, lengths, positions)
            kept = ((positions % cp.size == cp.rank) & is_new).view(-1).nonzero().view(-1)
            if context.rows is not None:
                own_rows = list(context.rows[cp.rank])
                given, positions, kept = given[:, own_rows], positions[:, own_rows], None
                self.last = (columns - 1) % cp.size
        else:
            write = torch.full(is_new.shape, pools.unread).masked_scatter_(is_new, write).view(-1)
        self.model, self.pools, self.shape, self._context = model, pools, tuple(given.shape), context
        self.place = Place(
            read.to(device), write.to(device), columns - count, columns, None if kept is None else kept.to(device)
        )
        self.given: dict[str, Any] = {
            "input_ids": given.to(device),
            "position_ids": positions.to(device),
            "use_cache": True,
        }
        if min(lengths) < columns:
            left = columns - torch.tensor(lengths, device=device)
            self.given["attention_mask"] = (torch.arange(columns, device=device) >= left[:, None]).long()
        if "logits_to_keep" in arguments_of(model):
            self.given["logits_to_keep"] = 1
        if asks_for_balance(model):
            self.given[SWITCH] = False

    def inputs(self, stage: int) -> dict[str, Any]:
        """The model's inputs at `stage`."""
        self.pools.lengths = self.lengths
        cache = block_cache(self.pools, self.place, own_entries(self.model, stage, len(self.pools.entries)))
        given = {**self.given, cache_argument(self.model): cache}
        return given if self._context is None else self._context.split(given)

    def keep_cache(self, stage: int, cache: Any) -> None:
        """Do nothing: the pools have the new keys and values."""

    def keep_output(self, output: Any) -> None:
        """Do nothing: a text's state is its keys and values."""


class Alone:
    """The forwards of one text with a cache of its own, as `generate` runs it: the whole prompt, then token by token."""

    def __init__(
        self,
        model: nn.Module,
        sequence: Sequence,
        more: Mapping[str, Tensor] = MappingProxyType({}),
        pools: Pools | None = None,
    ) -> None:
        """Start with the prompt of `sequence`, which has `more` inputs beside its ids; other texts may be in `pools`."""
        plan, groups = plan_of(model)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._first = plan.stage_index(groups.pp.rank, 0)
        self._group = SequenceGroup(model, [sequence], device, more)
        self._pools = pools
        self._output: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the new ids."""
        return tuple(self._group.inputs(self._first)["input_ids"].shape)

    @property
    def caches(self) -> dict[int, Any]:
        """The cache of each of this rank's stages."""
        return self._group.caches

    def inputs(self, stage: int) -> dict[str, Any]:
        """The model's inputs at `stage`."""
        if self._pools is not None:
            self._pools.lengths = []
        return self._group.inputs(stage)

    def keep_cache(self, stage: int, cache: Any) -> None:
        """Keep the cache of a stage."""
        self._group.caches[stage] = cache

    def keep_output(self, output: Any) -> None:
        """Keep the model's output until the next token is known."""
        self._output = output

    def advance(self, token: int) -> None:
        """Append the next token."""
        self._group.go_on(torch.tensor([token]), self._output)


def _distributed(cp: Communicator, is_key: Tensor, lengths: SequenceOf[int], positions: Tensor) -> SharedTokens:
    """What the ranks have of a forward of tokens at `positions` `[rows, count]` of texts of `lengths` tokens, these included.

    `is_key` `[rows, keys]` tells padding on the left from this rank's keys.
    """
    columns, (_, count), keys = max(lengths), positions.shape, is_key.shape[1]
    own = torch.zeros(is_key.shape, dtype=torch.int64)
    for row, length in enumerate(lengths):
        held = int(is_key[row].sum())
        own[row, keys - held :] = columns - length + cp.rank + cp.size * torch.arange(held)
    if count < DIVIDED * cp.size or bool((positions != positions[0]).any()):
        return SharedTokens(cp, own, columns, is_key)
    start = columns - count
    rows = tuple(tuple(range((rank - start) % cp.size, count, cp.size)) for rank in range(cp.size))
    return SharedTokens(cp, own, columns, is_key, rows, positions)


def own_entries(model: nn.Module, stage: int, entries: int) -> frozenset[int]:
    """The entries of the model's cache that the layers of `stage` fill."""
    plan, _ = plan_of(model)
    return frozenset(plan.stage_at(stage).layers if is_cut(plan) else range(entries))
