"""The training objective of a model: its targets and its loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from partita.core.sharding.split import Split
from partita.errors import ModelError
from partita.torch.collectives.comm import Communicator
from partita.torch.layers.loss import vocab_parallel_cross_entropy
from partita.torch.model.balance import coefficient_of

IGNORED = -100
"""A target that does not count."""

MASKED_SHARE = 0.15
"""Fraction of tokens that a masked language model predicts (Devlin et al. 2019, 1810.04805, section 3.1)."""


def check_trainable(model: nn.Module) -> None:
    """Raise `ModelError` for a model that predicts no tokens."""
    if not (_is_causal(model) or _is_masked(model)):
        raise ModelError(
            f"{type(model).__name__} is neither a causal nor a masked language model. Only these can be trained."
        )


def _is_causal(model: nn.Module) -> bool:
    name = type(model).__name__
    return "CausalLM" in name or "LMHead" in name


def _is_masked(model: nn.Module) -> bool:
    return "MaskedLM" in type(model).__name__


def examples(model: nn.Module, rows: Tensor, step: int, seed: int, mask_token: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, both int64 `[n, length]`, of `rows` `[n, length + 1]`.

    A causal model predicts the next token; a masked one the tokens that `mask_token` replaces, which are sampled from
    seed and step alone.
    """
    inputs = rows[:, :-1]
    if _is_causal(model):
        return inputs, rows[:, 1:]
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    hidden = torch.rand(inputs.shape, generator=generator) < MASKED_SHARE
    hidden[:, 0] |= ~hidden.any(1)
    return inputs.masked_fill(hidden, mask_token), inputs.masked_fill(~hidden, IGNORED)


def loss_of(
    model: nn.Module, output: Any, targets: Tensor, split: Split | None, comm: Communicator, mtp_weight: float
) -> tuple[Tensor, Tensor | None]:
    """The summed cross-entropy of `targets` `[n, length]`, and the auxiliary loss of a router that the model asks for.

    The sum over the layers of multi-token prediction is weighted by `mtp_weight` / number of layers (2412.19437, equation 25).
    The head's columns stay on their ranks (`split`): the unsplit logits are never gathered.
    """
    auxiliary = getattr(output, "aux_loss", None)
    if auxiliary is not None:
        auxiliary = auxiliary * coefficient_of(model)
    summed = summed_cross_entropy(output.logits, targets, split, comm)
    ahead = getattr(output, "mtp_logits", [])
    for k, logits in enumerate(ahead, 1):
        summed = summed + mtp_weight / len(ahead) * summed_cross_entropy(logits, targets[:, k:], split, comm)
    return summed, auxiliary


def summed_cross_entropy(logits: Tensor, targets: Tensor, split: Split | None, comm: Communicator) -> Tensor:
    """The summed cross-entropy of `targets` `[n, length]` under `logits` `[n, length, vocab_r]`, in float32 or wider."""
    flat, goal = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    if split is None:
        wide = flat if flat.dtype == torch.float64 else flat.float()
        return F.cross_entropy(wide, goal, reduction="sum", ignore_index=IGNORED)
    return vocab_parallel_cross_entropy(flat, goal, comm, split, reduction="sum", ignore_index=IGNORED)
