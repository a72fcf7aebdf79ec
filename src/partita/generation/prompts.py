"""The prompts of `generate`: texts or ids, and their checks."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import Any

from partita.errors import PlanError
from partita.generation.choice import Choice
from partita.generation.tokenizer import Tokenizer, load_tokenizer

Prompts = Sequence[str | Sequence[int]]
"""Texts, or the ids of each."""


def encoded(
    prompts: Prompts, tokenizer: Tokenizer | None, folder: str | os.PathLike[str] | None
) -> tuple[list[list[int]], Tokenizer | None]:
    """The ids of each prompt, and the tokenizer; for texts it is the one in `folder` if none is given.

    Args:
        prompts: Texts or ids.
        tokenizer: The caller's tokenizer.
        folder: Where the model was loaded from, if anywhere.

    Raises:
        PlanError: Texts have no tokenizer, a prompt is empty, or is neither text nor ids.
    """
    if isinstance(prompts, str) or not prompts:
        raise PlanError("prompts must contain at least one prompt. Give a list of texts, or of lists of ids.")
    if tokenizer is None and any(isinstance(prompt, str) for prompt in prompts):
        if folder is None or not os.path.isdir(folder):
            raise PlanError(
                "prompts are texts, but the model was not loaded from a folder with a tokenizer. Give tokenizer=."
            )
        tokenizer = load_tokenizer(folder)
    ids: list[list[int]] = []
    for place, prompt in enumerate(prompts):
        one: Any = tokenizer.encode(prompt) if isinstance(prompt, str) and tokenizer is not None else prompt
        if not isinstance(one, Sequence) or not all(isinstance(i, int) for i in one):
            raise PlanError(f"prompt {place} must be a text or ids; got {one!r:.60}. Use tensor.tolist() for a tensor.")
        if not one:
            raise PlanError(f"prompt {place} is empty: it must have at least one token.")
        ids.append(list(one))
    return ids, tokenizer


def check_ids(
    prompts: Sequence[Sequence[int]],
    choice: Choice,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    unchecked: Collection[int] = (),
) -> None:
    """Check what the vocabulary and the tokenizer decide.

    Args:
        prompts: The ids of each prompt.
        choice: The settled sampling settings.
        tokenizer: The tokenizer, if there is one.
        vocab_size: Number of ids of the model; 0 if unknown.
        unchecked: Numbers of prompts whose placeholder ids, for an image, may be outside the vocabulary.

    Raises:
        PlanError: An id is outside the vocabulary, or `stop` is given without a tokenizer.
    """
    limit = vocab_size or 1 << 62
    for place, prompt in enumerate(prompts):
        strange = [i for i in prompt if not 0 <= i < limit]
        if strange and place not in unchecked:
            raise PlanError(
                f"prompt {place} contains the id {strange[0]}, but the model has ids 0 to {vocab_size - 1}."
            )
    strange = [i for i, _ in choice.logit_bias if not 0 <= i < limit]
    if strange:
        raise PlanError(f"logit_bias names the id {strange[0]}, but the model has ids 0 to {vocab_size - 1}.")
    if choice.stop and tokenizer is None:
        raise PlanError("stop needs a tokenizer to decode the text.")
