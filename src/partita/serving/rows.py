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
    """What a loop needs of an engine. Every rank of a replica has one, and calls `share` and `run` in turn.

    Replicas do not wait for each other after the rows are created.
    """

    @property
    def layout(self) -> CacheLayout:
        """The cache of a replica, the same on every rank."""

    @property
    def plan(self) -> Plan:
        """The plan of the model."""

    @property
    def decides(self) -> bool:
        """Whether this is the rank that decides every step of its replica: the first of it."""

    @property
    def replica(self) -> int:
        """The index of this rank's replica."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, the same on every rank."""

    @property
    def no_images(self) -> str:
        """Why requests have no images; empty if the model takes them."""

    def settle(self, request: ServeRequest) -> Choice:
        """The request's settings, completed from the model's own.

        Raises:
            PartitaError: The request has ids or settings that the model does not take, or is too long for it.
        """

    def session(self) -> AbstractContextManager[None]:
        """The context of all steps of a loop, in its thread."""

    def share(self, data: bytes | None) -> bytes:
        """The bytes of the replica's deciding rank, on each of its ranks; `data` is None on the others."""

    def run(self, step: Step) -> Sequence[Picked]:
        """Execute this rank's part of a step of its replica.

        Returns:
            On the deciding rank what was chosen for each row that chooses, in order.
        """
