"""Sequences that are continued, and a model's inputs for their next tokens."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from collections.abc import Set as SetOf
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from partita.errors import ModelError
from partita.generation import Sequence
from partita.torch.collectives.comm import Communicator
from partita.torch.model.balance import SWITCH, asks_for_balance
from partita.torch.model.context_cache import KeptTokens
from partita.torch.transformers_internals import advance, first_positions, next_inputs


def arguments_of(model: nn.Module) -> SetOf[str]:
    """The names of the arguments of a model's forward."""
    return inspect.signature(type(model).forward).parameters.keys()


class SequenceGroup:
    """Sequences that pass through the pipeline as a group, and the model's next inputs.

    Attributes:
        caches: The cache of each stage of this rank.
        taken: How many tokens of each sequence were chosen.
    """

    def __init__(
        self,
        model: nn.Module,
        sequences: list[Sequence],
        device: torch.device,
        more: Mapping[str, Tensor] = MappingProxyType({}),
        context: Communicator | None = None,
    ) -> None:
        """Start with the prompts of `sequences`, of which the ranks of `context`, if given, keep the keys together."""
        self.model, self.sequences = model, sequences
        self.kept = None if context is None or context.size == 1 else KeptTokens(context)
        longest = max(len(s.prompt) for s in sequences)
        pads = torch.tensor([longest - len(s.prompt) for s in sequences])
        self.text = torch.tensor(
            [[s.prompt[0]] * (longest - len(s.prompt)) + s.prompt for s in sequences], device=device
        )
        columns = torch.arange(longest)
        mask = (columns >= pads.unsqueeze(1)).long().to(device)
        positions = (columns - pads.unsqueeze(1)).clamp(min=0).to(device)
        more = {name: value.to(device) for name, value in more.items()}
        takes = arguments_of(model)
        self.state: dict[str, Any] = {"use_cache": True}
        if pads.any():
            self.state["attention_mask"] = mask
        if "position_ids" in takes:
            self.state["position_ids"] = first_positions(model, self.text, mask, more, positions) if more else positions
        if "logits_to_keep" in takes:
            self.state["logits_to_keep"] = 1
        if asks_for_balance(model):
            self.state[SWITCH] = False
        self.state.update(more)
        self.caches: dict[int, Any] = {}
        self.taken = 0
        self.keeps_state = False
        self.next: dict[int, dict[str, Any]] = {}

    def inputs(self, stage: int) -> dict[str, Any]:
        """The model's inputs at `stage`.

        Raises:
            ModelError: The model returned no cache, but is called with the last token only.
        """
        if stage not in self.next:
            if self.kept is not None and stage not in self.caches:
                self.caches[stage] = self.kept.new_cache(self.model)
            cache = self.caches.get(stage)
            found = next_inputs(self.model, self.text, self.state, cache, is_first=self.taken == 0)
            if (
                self.taken
                and cache is None
                and not self.keeps_state
                and found["input_ids"].shape[1] < self.text.shape[1]
            ):
                raise ModelError(f"{type(self.model).__name__} returns no cache, so it cannot generate token by token.")
            self.next[stage] = found if self.kept is None else self.kept.split(found)
        return self.next[stage]

    def go_on(self, chosen: Tensor, output: Any) -> None:
        """Append the next token of each sequence, `[sequences]`.

        `output` is the model's, from which some families keep a state; None if the last stage is on another rank.
        """
        known = self.state.keys()
        self.state = advance(self.model, output, self.state)
        self.keeps_state = self.keeps_state or not self.state.keys() <= known
        self.text = torch.cat([self.text, chosen.view(-1, 1).to(self.text.device).clamp(min=0)], 1)
        self.taken += 1
        if self.kept is not None:
            self.kept.advance()
        self.next.clear()

    @property
    def is_done(self) -> bool:
        """Whether every sequence has ended."""
        return all(s.finish_reason for s in self.sequences)
