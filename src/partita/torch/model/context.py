"""Context parallel ranks: each runs the model on its own positions of every sequence, and attention sees those of all ranks.

    [1] the ids are those of the rank's chunks, with their true positions
    [2] the family's own functions make the mask of these rows over the keys of all ranks
    [3] keys and values are gathered before the family's own attention, and their gradients reduce-scattered after it

Everything else of a transformer treats each token by itself. What does not, such as a convolution or a recurrence, is found
before use (`proof.context`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from partita.core.sharding.context import Chunks, chunks_of, positions_of
from partita.errors import ModelError
from partita.torch.collectives.comm import Communicator
from partita.torch.collectives.mappings import all_gather
from partita.torch.transformers_internals import hook_attention

CONTEXT = "partita_context"
"""The entry of a forward's inputs that holds its `Context`, if the other inputs are those of this rank's positions."""

_HERE = "_partita_context"
_current: ContextVar[Context | None] = ContextVar("context", default=None)


@dataclass(frozen=True)
class Context:
    """The sequences of a forward, of which this rank has some positions.

    Attributes:
        comm: The context parallel ranks.
        positions: The position of every token of the unsplit sequences `[n or 1, length]`.
        chunks: The chunks of every rank.
    """

    comm: Communicator
    positions: Tensor
    chunks: tuple[Chunks, ...]

    @classmethod
    def of(cls, inputs: Mapping[str, Any], comm: Communicator) -> Context:
        """The context of unsplit `inputs`.

        Raises:
            PlanError: The sequences have fewer tokens than there are ranks.
        """
        ids = inputs["input_ids"]
        length = ids.shape[1]
        given = inputs.get("position_ids")
        positions = torch.arange(length, device=ids.device)[None] if given is None else given
        return cls(comm, positions, _chunks(length, comm.size))

    def own(self, tensor: Tensor) -> Tensor:
        """This rank's positions of `tensor` `[n, length, ...]`."""
        return torch.cat([tensor[:, start:stop] for start, stop in self.chunks[self.comm.rank]], 1)

    def split(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of this rank's forward; an attention mask stays that of all keys."""
        positions = self.own(self.positions.expand(inputs["input_ids"].shape[0], -1))
        return {**inputs, "input_ids": self.own(inputs["input_ids"]), "position_ids": positions, CONTEXT: self}


def split_context(model: nn.Module, comm: Communicator) -> None:
    """Let the attention of `model` see the keys of all ranks of `comm` in forwards whose inputs have a `Context`."""
    if comm.size == 1:
        return
    hook_attention(_attention, _mask_arguments, _positions, _mask)
    for module in model.modules():
        module.__dict__[_HERE] = comm


@contextmanager
def context_of(inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The inputs of a model's own forward, inside the context that `inputs` have, if any."""
    given = dict(inputs)
    context = given.pop(CONTEXT, None)
    if context is None:
        yield given
        return
    token = _current.set(context)
    try:
        yield given
    finally:
        _current.reset(token)


def current_context() -> Context | None:
    """The context of the forward that runs, if it has one."""
    return _current.get()


def own_rows(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """`inputs` with an attention mask of this rank's positions only."""
    context, mask = _current.get(), inputs.get("attention_mask")
    if context is None or mask is None:
        return inputs
    return {**inputs, "attention_mask": context.own(mask)}


@functools.lru_cache(256)
def _chunks(length: int, ranks: int) -> tuple[Chunks, ...]:
    return chunks_of(length, ranks)


def _sizes(chunks: tuple[Chunks, ...]) -> tuple[int, ...]:
    return tuple(sum(stop - start for start, stop in own) for own in chunks)


@functools.lru_cache(256)
def _order(chunks: tuple[Chunks, ...], device: torch.device) -> Tensor:
    """The positions in the order in which the ranks' parts are gathered."""
    return torch.tensor([position for own in chunks for position in positions_of(own)], device=device)


def _attention(
    compute: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """The attention `compute` of a family, with the keys and values of all ranks `[n, heads, length, width]`.

    The mask is as wide as the unsplit sequence, which tells a forward of this rank's positions, also when it is recomputed.
    """
    comm: Communicator | None = module.__dict__.get(_HERE)
    if comm is None:
        return compute(module, query, key, value, *args, **kwargs)
    mask = args[0] if args else kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-1] > key.shape[2]:
        sizes = _sizes(_chunks(mask.shape[-1], comm.size))
        key, value = (all_gather(one.contiguous(), comm, 2, sizes) for one in (key, value))
    elif _current.get() is not None:
        raise ModelError(
            f"{type(module).__name__} attends without a mask over the keys of all ranks, so its sequences cannot be split. Use "
            "cp=1."
        )
    return compute(module, query, key, value, *args, **kwargs)


def _mask_arguments(inputs_embeds: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What a mask is made from: embeddings, of which only the shape counts, and positions, both of the unsplit sequences."""
    context = _current.get()
    if context is None:
        return inputs_embeds, positions
    rows = inputs_embeds.shape[0]
    wide = inputs_embeds.new_empty((rows, context.positions.shape[1], 1))
    return wide, None if positions is None else context.positions.expand(rows, -1)


def _positions(positions: Tensor) -> Tensor:
    """The positions of the unsplit sequences, in a forward of some of them."""
    context = _current.get()
    return positions if context is None else context.positions.expand(positions.shape[0], -1)


def _mask(make: Callable[..., Any], **given: Any) -> Any:
    """The mask that `make` returns for this rank's rows, its columns in the order of the gathered keys."""
    context = _current.get()
    if context is None:
        return make(**given)
    given |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    rows = [
        make(**{**given, "q_length": stop - start, "q_offset": given.get("q_offset", 0) + start})
        for start, stop in context.chunks[context.comm.rank]
    ]
    if not all(isinstance(mask, Tensor) and mask.dim() == 4 for mask in rows):
        raise ModelError(
            "the model's attention takes no mask of rows and keys, so cp must be 1. Use attention sdpa or eager."
        )
    return torch.cat(rows, 2)[..., _order(context.chunks, rows[0].device)]
