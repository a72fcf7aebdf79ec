"""The torch engine's part of a loop that gives vectors: the last hidden states of texts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from partita.core.sharding.experts import why_not_alone
from partita.errors import ModelError
from partita.serving.embedding import Batch
from partita.serving.pooling import Vectors
from partita.torch.model.modes import mode_set
from partita.torch.model.parts import plan_of
from partita.torch.serving.sharing import shared
from partita.torch.transformers_internals import fills_masks


class TorchEncoder:
    """Runs forwards of whole texts on this rank.

    Attributes:
        plan: The plan of the model.
        decides: Whether this is the first rank of its replica.
        most_tokens: The largest number of tokens of a text; 0 if there is none.
    """

    def __init__(self, model: nn.Module) -> None:
        """Use a split model, whose head, if any, is left out.

        Raises:
            ModelError: The model has a head and pipeline stages.
        """
        self.plan, self.groups = plan_of(model)
        body: Any = getattr(model, "base_model", model)
        if self.plan.mesh.pp > 1 and body is not model:
            raise ModelError(
                f"embeddings of {type(model).__name__} leave its head out, which does not work with pipeline stages: "
                f"--pp must be 1, but is {self.plan.mesh.pp}. Use --tp {self.plan.mesh.pp}."
            )
        if self.plan.mesh.cp > 1:
            raise ModelError(
                f"texts of embeddings are not split over ranks (cp={self.plan.mesh.cp}). Use cp=1, and tp or dp in its place."
            )
        if why := why_not_alone(self.plan.mesh):
            raise ModelError(why)
        self.model, self.body = model, body
        self.decides = self.groups.is_first_of_replica
        self.most_tokens = max(0, self.plan.spec.positions - _first_position(model))
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def share(self, data: bytes | None) -> bytes:
        """The bytes of the replica's deciding rank, on each of its ranks."""
        return shared(self.groups, data)

    def hidden(self, batches: Sequence[Batch], pool: Callable[[Vectors], Vectors]) -> list[Vectors]:
        """For each batch `pool` of its last hidden states; see `Encoder`."""
        found = []
        options = {"use_cache": False} if "use_cache" in inspect.signature(self.body.forward).parameters else {}
        with mode_set(self.model, training=False), torch.inference_mode():
            for batch in batches:
                states = self._states(torch.tensor(batch, device=self.device), options)
                wide = torch.float64 if states.dtype == torch.float64 else torch.float32
                found.append(pool(states.to(wide).cpu().numpy()))
        return found

    def _states(self, ids: Tensor, options: dict[str, Any]) -> Tensor:
        output = self.body(input_ids=ids, **options)
        states: Any = getattr(output, "last_hidden_state", None)
        if states is None or states.dim() != 3:
            raise ModelError(f"{type(self.body).__name__} has no last hidden states, so it gives no embeddings.")
        result: Tensor = states
        return result


def is_encoder(model: nn.Module) -> bool:
    """Whether a model fills in masked words, so that each token sees the whole text."""
    return fills_masks(getattr(model, "config", None))


def _first_position(model: nn.Module) -> int:
    """The number of positions that a table has for padding, before the first of a text."""
    for path, module in model.named_modules():
        table: Any = getattr(module, "embedding", module)
        padding = getattr(table, "padding_idx", None)
        if path.endswith(("position_embeddings", "embed_positions")) and padding is not None:
            return int(padding) + 1
    return 0
