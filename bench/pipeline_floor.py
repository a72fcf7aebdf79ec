"""The floor: stages of a Llama by hand, and 1F1B over two of them with bare sends and receives.

    rank 0    F0 F1 B0 F2 B1 ... B(m-1)
    rank 1       F0 B0 F1 B1 ... B(m-1)

All receives are begun before anything is computed, and nothing waits for a send before the end, so no pipeline of these
stages can wait less. The stages are also what torch's own schedules are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


class HandStage(nn.Module):
    """Layers of a `LlamaForCausalLM`, with the embedding or the norm and head where they belong to the stage.

    The modules are the model's own. The angles of rotary positions are computed once, for sequences of `length`.
    """

    def __init__(self, model: Any, layers: Sequence[int], *, embeds: bool, heads: bool, length: int) -> None:
        super().__init__()
        self.embed_tokens = model.model.embed_tokens if embeds else None
        self.layers = nn.ModuleList(model.model.layers[index] for index in layers)
        self.norm = model.model.norm if heads else None
        self.lm_head = model.lm_head if heads else None
        self.angles = model.model.rotary_emb(torch.empty(0), torch.arange(length).unsqueeze(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)
        for layer in self.layers:
            x = layer(x, position_embeddings=self.angles)
        if self.norm is not None and self.lm_head is not None:
            x = self.lm_head(self.norm(x))
        return x


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy of `targets` `[n, length]` under `logits` `[n, length, vocab]`."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def first_rank(stage: HandStage, ids: Sequence[Tensor], width: int) -> None:
    """Rank 0's part of 1F1B: `ids` `[n, length]` of each micro-batch, hidden states `[n, length, width]`."""
    grads = [torch.empty(*each.shape, width) for each in ids]
    arriving = [dist.irecv(grad, 1) for grad in grads]
    made: list[Tensor] = []
    leaving = []
    for step in range(len(ids) + 1):
        if step < len(ids):
            made.append(stage(ids[step]))
            leaving.append(dist.isend(made[-1].detach(), 1))
        if step > 0:
            arriving[step - 1].wait()
            made[step - 1].backward(grads[step - 1])
            made[step - 1] = torch.empty(0)
    for work in leaving:
        work.wait()


def last_rank(stage: HandStage, targets: Sequence[Tensor], width: int) -> float:
    """Rank 1's part: the mean loss of all micro-batches, `targets` `[n, length]` each."""
    hidden = [torch.empty(*each.shape, width, requires_grad=True) for each in targets]
    arriving = [dist.irecv(x.detach(), 0) for x in hidden]
    losses, leaving = [], []
    for x, work, goal in zip(hidden, arriving, targets, strict=True):
        work.wait()
        loss = mean_loss(stage(x), goal) / len(targets)
        loss.backward()
        losses.append(loss.detach())
        leaving.append((x.grad, dist.isend(x.grad, 0)))
    for _, work in leaving:
        work.wait()
    return float(sum(losses))
