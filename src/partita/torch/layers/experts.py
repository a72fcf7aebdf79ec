"""The experts of a rank, complete or in parts: inside a tensor group, which has all tokens, or with tokens sent to them."""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from partita.core.sharding.split import Split, deal
from partita.errors import ModelError
from partita.torch.collectives.comm import Communicator
from partita.torch.collectives.mappings import exchange, gather_from, scatter_to

_STATE = "_partita_experts"


class OwnExperts:
    """The experts of one rank, of those of a module of transformers.

    Letters: N tokens, H features, k experts of each token, E experts, of which rank r holds E_r; M_r pairs of a token and one
    of its experts that rank r holds.

        forward     y_r [N, H] = sum over k of weights [N, k] * expert_index(x [N, H]), for the E_r experts of the rank only
        backward    gradients of x and of weights that are partial, and complete ones of the rank's experts

    The module's own forward computes M_r tokens with one expert each, so that any family and any of transformers' kernels
    will do.
    Source: GShard, Lepikhin et al. 2020, 2006.16668.

    Attributes:
        start: The first expert of the rank.
        stop: The expert after its last one.
        copies: Neighbours in the group that hold the same experts, each a part of their inner width (etp).
        names: The names of the module's arguments: tokens, indexes, weights.
    """

    def __init__(self, module: nn.Module, comm: Communicator, split: Split) -> None:
        """Describe the experts of this rank, of those in `module`.

        Raises:
            ModelError: The module is not called with tokens, the indexes of their experts and weights.
        """
        self.copies = comm.size // split.parts
        ((self.start, self.stop),) = split.ranges(comm.rank // self.copies)
        self.names = tuple(inspect.signature(type(module).forward).parameters)[1:]
        if len(self.names) != 3:
            raise ModelError(
                f"{type(module).__name__} takes ({', '.join(self.names)}), but experts can be distributed only if they take "
                "tokens, the indexes of their experts and weights. Use tp without ep."
            )

    def __call__(self, module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The sum of the outputs of this rank's experts for each token."""
        shape, width = x.shape, x.shape[-1]
        chosen = _chosen(module, x, index, weights)
        return self._sum(module, x.reshape(-1, width), index.reshape(-1, chosen), weights.reshape(-1, chosen)).view(
            shape
        )

    def _sum(self, module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The same for `x` `[N, H]`, `index` and `weights` `[N, k]`."""
        chosen, index, weights = index.shape[1], index.reshape(-1), weights.reshape(-1)
        (pairs,) = ((index >= self.start) & (index < self.stop)).nonzero(as_tuple=True)
        outputs = _computed(module, x[pairs // chosen], index[pairs] - self.start, weights[pairs])
        return _placed(outputs, pairs, x, chosen)


class SentExperts(OwnExperts):
    """The experts of one rank, to which other ranks send their tokens; the ranks fold over those of a stage.

    Letters as in `OwnExperts`; R ranks hold the experts together. Where `copies` of them hold parts of the same experts, each
    pair goes to all of these, and their outputs are summed. N_t of the N tokens of a tensor group, whose T ranks all
    have them, are those of tensor rank t, so that each token is sent once. M_rs pairs go from rank r to rank s.

        scatter      x [N, H], index and weights [N, k]        ->  those of N_t tokens
        order        the N_t k pairs by their expert, and so by the rank that holds it
        exchange     x [sum_s M_rs, H], weights, indexes       ->  [sum_s M_sr, H]: the tokens of the rank's experts
        compute      the module's own forward with one expert for each
        exchange     the weighted outputs back                 ->  [sum_s M_rs, H]
        sum          over the k experts of each token          ->  y [N_t, H]
        gather       over the tensor group                     ->  y [N, H]

        backward     each exchange in the other direction: the gradients of x and weights are those of the rank's own tokens,
                     those of its experts are over the tokens of all R ranks

    Source: "MoE Parallel Folding", Liu et al. 2025, 2504.14960; GShard, Lepikhin et al. 2020, 2006.16668.

    Attributes:
        comm: The R ranks.
        tp: The tensor group.
    """

    def __init__(self, module: nn.Module, comm: Communicator, split: Split, tp: Communicator) -> None:
        """Describe the experts of this rank, of those in `module`.

        Raises:
            ModelError: As for `OwnExperts`.
        """
        super().__init__(module, comm, split)
        self.comm, self.tp, self.experts = comm, tp, split.size
        self._starts = [ranges[0][0] for ranges in split.by_rank]

    def _sum(self, module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        parts = deal(x.shape[0], self.tp.size, allow_empty=True)
        x, weights = scatter_to(x, self.tp, 0, parts), scatter_to(weights, self.tp, 0, parts)
        index = index.narrow(0, sum(parts[: self.tp.rank]), parts[self.tp.rank])
        chosen, index, weights = index.shape[1], index.reshape(-1), weights.reshape(-1)
        # Some routers mark pairs that no expert computes by an index beyond the experts.
        by_expert, order = index.where((index >= 0) & (index < self.experts), self.experts).sort(stable=True)
        starts = torch.tensor([*self._starts, self.experts], dtype=by_expert.dtype, device=index.device)
        counts = torch.searchsorted(by_expert, starts).diff()
        table = self.comm.all_gather(counts.repeat_interleave(self.copies).unsqueeze(0), 0).tolist()
        sent, received = table[self.comm.rank], [row[self.comm.rank] for row in table]
        own = order[: sum(sent[:: self.copies])]
        pairs = self._repeated(own, sent)
        tokens, scales = exchange((x[pairs // chosen], weights[pairs]), self.comm, sent, received)
        experts = self.comm.all_to_all(index[pairs], sent, received) - self.start
        (outputs,) = exchange((_computed(module, tokens, experts, scales),), self.comm, received, sent)
        return gather_from(_placed(self._summed(outputs, sent), own, x, chosen), self.tp, 0, parts)

    def _repeated(self, pairs: Tensor, sent: list[int]) -> Tensor:
        """The pairs in the order of the ranks that they are sent to, `sent` to each."""
        if self.copies == 1:
            return pairs
        return torch.cat([one for one in pairs.split(sent[:: self.copies]) for _ in range(self.copies)])

    def _summed(self, outputs: Tensor, sent: list[int]) -> Tensor:
        """The outputs of each pair, summed over the parts of its expert."""
        if self.copies == 1:
            return outputs
        parts = outputs.split(sent)
        return torch.cat([torch.stack(parts[at : at + self.copies]).sum(0) for at in range(0, len(parts), self.copies)])


def _chosen(module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> int:
    """The number of experts of each token.

    Raises:
        ModelError: There is not one index and one weight for each token and expert.
    """
    tokens = x.numel() // x.shape[-1]
    if index.is_floating_point() or index.shape != weights.shape or index.numel() % tokens:
        raise ModelError(
            f"{type(module).__name__} got indexes {tuple(index.shape)} ({index.dtype}) and weights {tuple(weights.shape)} "
            f"for tokens {tuple(x.shape)}, but ep needs one index and weight for each token and expert. Use tp without ep."
        )
    return index.numel() // tokens


def _placed(outputs: Tensor, pairs: Tensor, x: Tensor, chosen: int) -> Tensor:
    """The outputs of `pairs` of a token and one of its `chosen` experts, summed for each token of `x` `[N, H]`."""
    # Not added to the tokens, which is in no fixed order on GPUs.
    placed = x.new_zeros(x.shape[0] * chosen, x.shape[1]).index_copy(0, pairs, outputs.to(x.dtype))
    return placed.view(x.shape[0], chosen, x.shape[1]).sum(1)


def _computed(module: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The module's own forward `[M, H]` for M tokens, each with the expert `index` [M].

    Without tokens, it computes one of zeros: a rank that gets no tokens takes part in backward all the same.
    """
    count = x.shape[0]
    if count == 0:
        x, index, weights = (torch.cat([t, t.new_zeros(1, *t.shape[1:])]) for t in (x, index, weights))
    output: Tensor = type(module).forward(module, x, index[:, None], weights[:, None])
    return output.reshape(-1, x.shape[-1])[:count]


def distribute_experts(module: nn.Module, comm: Communicator, split: Split, tp: Communicator, *, sends: bool) -> None:
    """Make a module of fused experts compute only this rank's, whose tensors it is about to hold.

    Args:
        module: The module.
        comm: The ranks that hold the experts together, in groups of neighbours with the same experts.
        split: The experts of each group.
        tp: The tensor group, whose ranks have the same tokens.
        sends: Whether tokens are sent to their experts; otherwise `comm` is the tensor group, which sums the outputs.
    """
    vars(module)[_STATE] = SentExperts(module, comm, split, tp) if sends else OwnExperts(module, comm, split)
    for name, value in vars(module).items():
        if "expert" in name and type(value) is int and value == split.size:
            vars(module)[name] = split.local_size(comm.rank // (comm.size // split.parts))
    module.forward = MethodType(_forward, module)


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    own: OwnExperts = vars(module)[_STATE]
    given = dict(zip(own.names, args, strict=False)) | kwargs
    return own(module, *(given[name] for name in own.names))
