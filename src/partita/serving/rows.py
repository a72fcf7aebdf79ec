"""The engine's part of serving: "run these rows"."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from partita.core.plan import Plan
from partita.generation import Tokenizer
from partita.generation.choice import Choice
from partita.serving.blocks import CacheLayout
from partita.serving.message import Step
from partita.serving.requests import ServeRequest


@dataclass(frozen=True)
class Picked:
    """The token that was chosen for a row.

    Attributes:
        token: Its id; a code of `generation.sample.choose`, which is negative, if logits were not finite.
        logprob: Its log probability.
        top: The most likely tokens with theirs.
    """

    token: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


class Rows(Protocol):
    """What a loop needs of an engine. Every rank of the run has one, and calls `share` and `run` in turn."""

    @property
    def layout(self) -> CacheLayout:
        """The cache of a replica, the same on every rank."""

    @property
    def plan(self) -> Plan:
        """The plan of the model."""

    @property
    def decides(self) -> bool:
        """Whether this is the rank that decides every step: the first of the run."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, the same on every rank."""

    def settle(self, request: ServeRequest) -> Choice:
        """The request's settings, completed from the model's own.

        Raises:
            PartitaError: The request has ids or settings that the model does not take, or is too long for it.
        """

    def session(self) -> AbstractContextManager[None]:
        """The context of all steps of a loop, in its thread."""

    def share(self, data: bytes | None) -> bytes:
        """The bytes of the deciding rank, on every rank; `data` is None on the others."""

    def run(self, steps: Sequence[Step]) -> list[list[Picked]]:
        """Execute the step of this rank's replica. Returns what was chosen in each replica's step, in order of its rows."""
