"""Context parallel ranks: each runs the model on its own positions of every sequence, and attention sees those of all ranks.

    [1] the ids are those of the rank's chunks, with their true positions
    [2] the family's own functions make the mask of these rows over the keys of all ranks
    [3] where the mask is causal, perhaps in a window, and nothing else, keys and values travel around the ranks
        (`layers.ring_attention`), and no mask is in memory
    [4] elsewhere they are gathered before the family's own attention, and their gradients reduce-scattered after it; backward
        gathers again and recomputes the attention

While a text is continued, every rank computes the new tokens, and the keys of earlier ones are distributed (`context_cache`):

    [5] the mask has the columns of the rank's own keys; each rank attends these, and the parts are merged
        (`layers.merged_attention`)
    [6] of many tokens, each rank computes its own, and the queries of all are gathered for [5]

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
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from partita.core.sharding.context import Chunks, chunks_of, positions_of
from partita.errors import ModelError
from partita.torch.collectives.comm import Communicator
from partita.torch.collectives.mappings import all_gather
from partita.torch.layers.merged_attention import merged_attention
from partita.torch.layers.ring_attention import Ring, ring_attention
from partita.torch.model.float64 import recomputed_alike
from partita.torch.transformers_internals import (
    EAGER,
    SDPA,
    hook_attention,
    is_causal_mask,
    is_plain_sdpa,
    mask_window,
)

CONTEXT = "partita_context"
"""The entry of a forward's inputs that holds its `Context`, if the other inputs are those of this rank's positions."""

_HERE = "_partita_context"
_current: ContextVar[Context | SharedTokens | None] = ContextVar("context", default=None)


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


@dataclass(frozen=True)
class SharedTokens:
    """A forward of tokens whose keys and those of earlier tokens are distributed over the ranks.

    Attributes:
        comm: The context parallel ranks.
        own: int64, the columns whose keys this rank has, in order: `[own keys]`, or `[n, own keys]` if texts differ in them.
        length: The number of columns, those of the forward included.
        is_key: Which of `own` are keys, `[n, own keys]`; the others are hidden (default: all).
        rows: For each rank those of the forward's tokens that it computes (default: every rank computes all).
        positions: With `rows`, the positions of all tokens of the forward `[n, tokens]`.
    """

    comm: Communicator
    own: Tensor
    length: int
    is_key: Tensor | None = None
    rows: tuple[tuple[int, ...], ...] | None = None
    positions: Tensor | None = None

    def split(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs of this rank's forward."""
        return {**inputs, CONTEXT: self}


def split_context(model: nn.Module, comm: Communicator) -> None:
    """Let the attention of `model` see the keys of all ranks of `comm` in forwards whose inputs have a `Context`."""
    if comm.size == 1:
        return
    hook_attention(_attention, _mask_arguments, _positions, _mask, lambda module: _HERE in module.__dict__)
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
    """The context of the forward that runs, if it has one in which sequences are split."""
    context = _current.get()
    return context if isinstance(context, Context) else None


def own_rows(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """`inputs` with an attention mask of this rank's positions only."""
    context, mask = current_context(), inputs.get("attention_mask")
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
    name: str,
    compute: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The attention `compute` of a family, with the keys and values of all ranks `[n, heads, length, width]`.

    The mask is as wide as the unsplit sequence, which tells a forward of this rank's positions, also when it is recomputed.
    """
    comm: Communicator | None = module.__dict__.get(_HERE)
    if comm is None:
        return compute(module, query, key, value, *args, **kwargs)
    mask, *more = args or (kwargs.pop("attention_mask", None),)
    shared = _current.get()
    if isinstance(shared, SharedTokens):
        return _merged(name, shared, module, query, key, value, mask, *more, **kwargs), None
    if isinstance(mask, DeferredMask):
        if not more and is_plain_sdpa(name, kwargs) and _fits_ring(module, query, key, value, mask.shape[2]):
            scaling = kwargs.get("scaling")
            scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
            return ring_attention(
                query, key, value, Ring(comm, _chunks(mask.shape[-1], comm.size), mask.window, scale)
            ), None
        mask = mask.whole()
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-1] > key.shape[2]:
        sizes = _sizes(_chunks(mask.shape[-1], comm.size))

        def gathered(query: Tensor, key: Tensor, value: Tensor) -> Any:
            key, value = (all_gather(one.contiguous(), comm, 2, sizes) for one in (key, value))
            return compute(module, query, key, value, mask, *more, **kwargs)

        if not torch.is_grad_enabled():
            return gathered(query, key, value)
        # Gathered again in backward: all keys of every layer at once would take the memory that cp saves.
        return checkpoint(gathered, query, key, value, use_reentrant=False, **recomputed_alike())
    if _current.get() is not None:
        raise ModelError(
            f"{type(module).__name__} attends without a mask over the keys of all ranks, so its sequences cannot be split. Use "
            "cp=1."
        )
    return compute(module, query, key, value, mask, *more, **kwargs)


def _merged(
    name: str, shared: SharedTokens, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any,
    dropout: float = 0.0, scaling: float | None = None, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """The attention of rows that every rank has, with the keys and values of this rank `[n, heads, own keys, width]`."""
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    groups = getattr(module, "num_key_value_groups", 1)
    known = name in (SDPA, EAGER) and kwargs.get("position_bias") is None and not dropout
    if not known or query.dim() != 4 or query.shape[1] != groups * key.shape[1]:
        raise ModelError(
            f"the attention of {type(module).__name__} ({name}) is not known to be the same in parts, so keys cannot be "
            "distributed over ranks. Use attention sdpa or eager, or cp=1."
        )
    if mask is None and query.shape[2] > 1:
        raise ModelError(
            f"{type(module).__name__} attends without a mask over the keys of all ranks, so its keys cannot be distributed. "
            "Use cp=1."
        )
    if isinstance(mask, Tensor):
        # A layer with a window has the last of the rank's keys.
        mask = mask[..., mask.shape[-1] - key.shape[2] :]
    sizes = None
    if shared.rows is not None:
        sizes = tuple(map(len, shared.rows))
        query = shared.comm.all_gather(query.contiguous(), 2, sizes)
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    return merged_attention(query, key, value, mask, scale, shared.comm, softcap=softcap, sinks=sinks, sizes=sizes)


def _fits_ring(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, rows: int) -> bool:
    """Whether these are the queries, keys and values of the same `rows`, whose heads are grouped as the module says."""
    groups = getattr(module, "num_key_value_groups", 1)
    same = query.dim() == 4 and key.shape[:3] == value.shape[:3] and key.shape[0] == query.shape[0]
    shaped = same and key.shape[2] == query.shape[2] == rows and query.shape[1] == groups * key.shape[1]
    return shaped and key.shape[3] == query.shape[3] and query.is_floating_point()


def _mask_arguments(inputs_embeds: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What a mask is made from: embeddings, of which only the shape counts, and positions, both of the unsplit sequences."""
    context = _current.get()
    if context is None or context.positions is None:
        return inputs_embeds, positions
    rows = inputs_embeds.shape[0]
    wide = inputs_embeds.new_empty((rows, context.positions.shape[1], 1))
    return wide, None if positions is None else context.positions.expand(rows, -1)


def _positions(positions: Tensor) -> Tensor:
    """The positions of the unsplit sequences, in a forward of some of them."""
    context = current_context()
    return positions if context is None else context.positions.expand(positions.shape[0], -1)


def _mask(name: str, make: Callable[..., Any], **given: Any) -> Any:
    """The mask that `make` returns for this rank's rows, its columns in the order of the gathered keys."""
    context = _current.get()
    if context is None:
        return make(**given)
    if isinstance(context, SharedTokens):
        return _own_columns(name, make, context, given)
    whole = functools.partial(_whole_mask, make, context, given)
    return DeferredMask(context, given, whole) if name == SDPA and _is_plainly_causal(context, given) else whole()


def _own_columns(name: str, make: Callable[..., Any], shared: SharedTokens, given: Mapping[str, Any]) -> Tensor | None:
    """The columns of this rank's keys of the mask that `make` returns, its rows in the order in which the ranks' are gathered.

    None if the forward's only row sees all keys.
    """
    if (given["kv_length"], given.get("kv_offset", 0)) != (shared.length, 0):
        raise ModelError("the model's mask is not as wide as the text, so its keys cannot be distributed. Use cp=1.")
    padding, window = given.get("attention_mask"), mask_window(given["mask_function"])
    is_causal = is_causal_mask(given["mask_function"]) and not given.get("use_vmap", False)
    has_one_row = given["q_length"] == 1 and shared.length <= (window or shared.length)
    all_keys = shared.is_key is None or bool(shared.is_key.all())
    if name == SDPA and is_causal and has_one_row and all_keys and (padding is None or bool(padding.all())):
        return None
    mask = _tensor_mask(make(**_without_skips(given)))
    if shared.rows is not None:
        mask = mask[:, :, [row for rows in shared.rows for row in rows]]
    own = shared.own.to(mask.device)
    if own.dim() == 1:
        return mask[..., own]
    count = own.shape[0]
    mask = mask.expand(count, -1, -1, -1)
    mask = mask.gather(-1, own[:, None, None].expand(-1, *mask.shape[1:3], -1))
    if shared.is_key is None:
        return mask
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return mask.masked_fill(~shared.is_key.to(mask.device)[:, None, None], hidden)


def _without_skips(given: Mapping[str, Any]) -> dict[str, Any]:
    return {**given, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}


def _tensor_mask(mask: Any) -> Tensor:
    """`mask`, if it is one of rows and columns."""
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise ModelError(
            "the model's attention takes no mask of rows and keys, so cp must be 1. Use attention sdpa or eager."
        )
    return mask


def _is_plainly_causal(context: Context, given: Mapping[str, Any]) -> bool:
    """Whether a mask is causal, perhaps in a window, and nothing else: no padding, no documents, no cache."""
    length, padding = context.positions.shape[1], given.get("attention_mask")
    square = given["q_length"] == given["kv_length"] == length
    offset = bool(given.get("q_offset", 0)) or bool(given.get("kv_offset", 0)) or given.get("use_vmap", False)
    if not square or offset or not is_causal_mask(given.get("mask_function")):
        return False
    return padding is None or (padding.shape[-1] == length and bool(padding.all()))


def _whole_mask(make: Callable[..., Any], context: Context, given: Mapping[str, Any]) -> Tensor:
    given = _without_skips(given)
    rows = [
        _tensor_mask(make(**{**given, "q_length": stop - start, "q_offset": given.get("q_offset", 0) + start}))
        for start, stop in context.chunks[context.comm.rank]
    ]
    return torch.cat(rows, 2)[..., _order(context.chunks, rows[0].device)]


class DeferredMask(Tensor):
    """A causal mask `[n, 1, own rows, length]` that takes memory only if its values are used.

    Attributes:
        window: How many tokens each token sees at most (default: all before it).
    """

    window: int | None
    _make: Callable[[], Tensor]
    _made: Tensor | None

    @staticmethod
    def __new__(cls, context: Context, given: Mapping[str, Any], make: Callable[[], Tensor]) -> DeferredMask:
        """The mask that `make` returns, whose arguments are `given`."""
        rows = _sizes(context.chunks)[context.comm.rank]
        nothing = torch.empty((), dtype=torch.bool, device=given.get("device", "cpu"))
        self = nothing.expand(given["batch_size"], 1, rows, given["kv_length"]).as_subclass(cls)
        self.window, self._make, self._made = mask_window(given["mask_function"]), make, None
        return self

    def whole(self) -> Tensor:
        """The mask itself."""
        if self._made is None:
            self._made = self._make()
        return self._made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what needs no values, and replace the mask by its values in all other calls."""
        kwargs = kwargs or {}
        if func in _NEEDS_NO_VALUES:
            return super().__torch_function__(func, types, args, kwargs)
        args, kwargs = tree_map(lambda one: one.whole() if isinstance(one, DeferredMask) else one, (args, kwargs))
        return func(*args, **kwargs)


_NEEDS_NO_VALUES = {
    Tensor.dim, Tensor.size, Tensor.is_floating_point,
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "requires_grad", "is_cuda", "layout")),
}  # fmt: skip
