"""The parts of `verify` that both engines share: the training steps, the prompts, and the skipped comparisons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from partita.core.mesh import Mesh
from partita.core.plan import Plan
from partita.errors import ModelError, PlanError
from partita.generation import Generation, Sampling
from partita.proof.report import Collected, IsTie, first_line, no_tie, token_rows
from partita.training import TrainSettings

NEW_TOKENS = 12
"""New tokens for each prompt."""

SEQUENCE_LENGTH = 8
"""Tokens of a training sequence."""

EPSILON = 1e-4
"""AdamW divides a gradient by its own size plus this: a much smaller value would amplify the rounding of small gradients."""

Generate = Callable[[list[list[int]], Sampling], list[Generation]]


def verification_settings(
    steps: int, microbatches: int, replicas: int, schedule: str | None, group_size: int | None, zero: int = 0
) -> TrainSettings:
    """The training steps that are compared: one sequence for each micro-batch and replica.

    Raises:
        PlanError: The settings contradict each other.
    """
    return TrainSettings(
        steps=max(steps, 1), batch_size=microbatches * replicas, sequence_length=SEQUENCE_LENGTH, microbatches=microbatches,
        warmup_steps=1, learning_rate=1e-3, epsilon=EPSILON, schedule=schedule, group_size=group_size,
        zero=zero,
    )  # fmt: skip


def unsplit_settings(settings: TrainSettings) -> TrainSettings:
    """The same steps for the unsplit model: no schedule, no shards, and every micro-batch of every replica one of its own.

    So a router's auxiliary loss is the mean over the same micro-batches.
    """
    return replace(settings, schedule=None, group_size=None, zero=0, microbatches=settings.batch_size)


def level_of(zero: int | None, plan: Plan | None, mesh: Mesh) -> int:
    """The level of the compared training steps: the one given, else the plan's, if it has any effect.

    Raises:
        PlanError: A level is given, and there are no replicas to share states.
    """
    replicas = mesh.dp * mesh.cp
    if zero and replicas == 1:
        raise PlanError(
            f"zero={zero} distributes states over replicas (dp and cp), but the mesh {mesh} has one. Use dp=2 or more, or "
            "leave zero out."
        )
    if zero is None and plan is not None and plan.settings is not None and replicas > 1:
        return plan.settings.zero or 0
    return zero or 0


def expect_all(found: Collected, steps: int) -> None:
    """Record a skip for each kind of comparison that has neither a row nor a reason."""
    found.expect("module", "output", "gradient", "tokens", *(("loss", "parameter") if steps else ()))


def compare_tokens(
    found: Collected,
    ids: Callable[[], Sequence[Any]],
    unsplit: Generate,
    split: Generate,
    refuse: Callable[[], None],
    is_tie: IsTie = no_tie,
) -> None:
    """Compare how both models continue two prompts of different lengths.

    Args:
        found: The comparisons so far.
        ids: Returns two rows of ids, lists of Python integers.
        unsplit: Continues prompts with the unsplit model.
        split: Continues them with the split one.
        refuse: Raises `ModelError` if the split model cannot generate.
        is_tie: As in `token_rows`.
    """
    sampling = Sampling(NEW_TOKENS, temperature=0.0, ignore_eos=True, use_generation_config=False)
    try:
        first, second, *_ = ids()
        prompts = [first[:6], second]
        expected = unsplit(prompts, sampling)
    except Exception as error:
        found.skip("tokens", why=f"the unsplit model does not generate: {first_line(error)}")
        return
    try:
        refuse()
    except ModelError as error:
        found.skip("tokens", why=first_line(error))
        return
    found.add(token_rows(prompts, expected, split(prompts, sampling), is_tie))
