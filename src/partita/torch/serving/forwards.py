"""Forwards of a step: of rows whose earlier tokens are in blocks, or of one text with a cache of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from partita.generation import Sequence
from partita.schedule.fit import forward_only
from partita.torch.model.balance import SWITCH, asks_for_balance
from partita.torch.model.block_cache import Place, Pools, block_cache
from partita.torch.model.parts import plan_of
from partita.torch.model.sequences import SequenceGroup, arguments_of
from partita.torch.stages.cut import is_cut
from partita.torch.stages.pipeline import Pipeline
from partita.torch.transformers_internals import cache_argument


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

    Attributes:
        shape: The shape of the new ids, with their padding.
        lengths: The number of tokens of each row, new ones included.
    """

    def __init__(
        self, model: nn.Module, pools: Pools, ids: list[list[int]], texts: SequenceOf[tuple[Tensor, int]]
    ) -> None:
        """Place the tokens `ids` of each of `texts`: the slots of its tokens, and the number of earlier ones."""
        count = max(map(len, ids))
        pads = [count - len(new) for new in ids]
        lengths = [start + len(new) for new, (_, start) in zip(ids, texts, strict=True)]
        self.lengths = lengths
        columns = max(*lengths, count)
        read = torch.zeros(len(ids), columns, dtype=torch.int64)
        for row, ((slots, _), length) in enumerate(zip(texts, lengths, strict=True)):
            read[row, columns - length :] = slots[:length]
        write = torch.full((len(ids), count), pools.unread)
        positions = torch.zeros(len(ids), count, dtype=torch.int64)
        for row, ((slots, start), length, pad) in enumerate(zip(texts, lengths, pads, strict=True)):
            write[row, pad:] = slots[start:length]
            positions[row, pad:] = torch.arange(start, length)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.model, self.pools, self.shape = model, pools, (len(ids), count)
        self.place = Place(read.to(device), write.view(-1).to(device), columns - count)
        self.given: dict[str, Any] = {
            "input_ids": torch.tensor([[0] * pad + new for pad, new in zip(pads, ids, strict=True)], device=device),
            "position_ids": positions.to(device),
            "use_cache": True,
        }
        if min(lengths) < columns:
            before = columns - torch.tensor(lengths, device=device)
            self.given["attention_mask"] = (torch.arange(columns, device=device) >= before[:, None]).long()
        if "logits_to_keep" in arguments_of(model):
            self.given["logits_to_keep"] = 1
        if asks_for_balance(model):
            self.given[SWITCH] = False

    def inputs(self, stage: int) -> dict[str, Any]:
        """The model's inputs at `stage`."""
        self.pools.lengths = self.lengths
        cache = block_cache(self.pools, self.place, own_entries(self.model, stage, len(self.pools.entries)))
        return {**self.given, cache_argument(self.model): cache}

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


def own_entries(model: nn.Module, stage: int, entries: int) -> frozenset[int]:
    """The entries of the model's cache that the layers of `stage` fill."""
    plan, _ = plan_of(model)
    return frozenset(plan.stage_at(stage).layers if is_cut(plan) else range(entries))
