"""The auxiliary loss that balances the load of a router's experts, over any mesh, as transformers computes it.

Letters: E experts, of which each token goes to k; G groups of tokens.

    n [G, E]    how often the tokens of a group go to each expert, summed over the layers that have a router
    p [G, E]    the router's probability of each expert, summed over the same tokens and layers
    N [G]       the number of terms in each sum of p
    loss        the mean over groups of E sum_e (n_e / N) (p_e / N)

Both sums add up over layers: a stage adds its layers' sums to those that it receives and sends two small tensors on, whatever
the number of layers and tokens. The product of two means is not linear in the batch, so the loss depends on what a group is.

    scope `microbatch`    G = 1: all tokens of a micro-batch, as transformers does with a batch
    scope `sequence`      G = batch: each sequence by itself, so that neither mesh nor micro-batches change the loss

Sources: 2101.03961, equations 4 to 6; for sequences 2412.19437, section 2.1.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from partita.errors import ModelError
from partita.torch.transformers_internals import text_config_of

SWITCH = "output_router_logits"
"""The argument of a forward, and the entry of a config, that asks a model of transformers for its auxiliary loss."""


@dataclass(frozen=True)
class Balance:
    """The auxiliary loss of one model.

    Attributes:
        experts: Number of experts, E.
        top_k: Experts per token, k.
        routers: The routers of this rank, each with the index of its logits `[tokens, E]` in its output.
        scope: `microbatch` or `sequence`.
    """

    experts: int
    top_k: int
    routers: tuple[tuple[nn.Module, int], ...]
    scope: str = "microbatch"

    @contextmanager
    def recorded(self) -> Iterator[list[Tensor]]:
        """Collect the logits `[tokens, E]` of the routers that run inside the context, in the order of execution."""
        logits: list[Tensor] = []
        handles = [
            router.register_forward_hook(partial(_record, logits, place)) for router, place in self.routers
        ]  # fmt: skip
        try:
            yield logits
        finally:
            for handle in handles:
                handle.remove()

    def sums(
        self, logits: Sequence[Tensor], inputs: Mapping[str, Any], received: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor]:
        """n and p, each `[G, E]`, of all layers so far: the sums `received` plus those of `logits`, each `[tokens, E]`.

        `inputs` are the model's; padding that their attention mask excludes does not count.
        """
        rows = next(value for name in ("input_ids", "inputs_embeds") if (value := inputs.get(name)) is not None)
        groups = rows.shape[0] if self.scope == "sequence" else 1
        mask = inputs.get("attention_mask")
        kept = None if mask is None else mask.reshape(-1, 1).float()
        counts = probabilities = torch.zeros(groups, self.experts, device=rows.device)
        if received:
            counts, probabilities = received
        for one in logits:
            chances = torch.softmax(one, -1)
            chosen = chances.topk(self.top_k, -1).indices.view(groups, -1)
            # transformers sums in float32. Sums of sequences must not depend on their place in a micro-batch either.
            wide = chances if self.scope == "sequence" and one.dtype == torch.float64 else chances.float()
            weight = torch.ones_like(chosen, dtype=torch.float32)
            if kept is not None:
                wide = wide * kept
                weight = kept.repeat_interleave(self.top_k).view(groups, -1)
            counts = counts + torch.zeros_like(counts).scatter_add_(1, chosen, weight)
            probabilities = probabilities + wide.view(groups, -1, self.experts).sum(1)
        return counts, probabilities

    def loss(self, counts: Tensor, probabilities: Tensor) -> Tensor:
        """The auxiliary loss, without its coefficient, of n and p, each `[G, E]`, of all layers."""
        counts = counts.detach()
        terms = counts.sum(-1, keepdim=True) / self.top_k
        return (self.experts * (counts / terms * (probabilities / terms)).sum(-1)).mean()


def _record(logits: list[Tensor], place: int, module: nn.Module, args: Any, output: Any) -> None:
    logits.append(output[place] if isinstance(output, tuple) else output)


def asks_for_balance(model: nn.Module) -> bool:
    """Whether the config of `model` asks for the auxiliary loss of its routers."""
    return bool(getattr(text_config_of(getattr(model, "config", None)), SWITCH, False))


def coefficient_of(model: nn.Module) -> float:
    """Weight of the auxiliary loss of `model` relative to the cross-entropy.

    Raises:
        ModelError: Neither the model nor its config defines it.
    """
    names = ("router_aux_loss_coef", "aux_loss_coef")
    for holder in (model, text_config_of(getattr(model, "config", None))):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int | float):
                return float(value)
    raise ModelError(
        f"{type(model).__name__} has an auxiliary loss, but no weight for it ({names[0]}). Set {SWITCH} to False "
        "in the config."
    )
