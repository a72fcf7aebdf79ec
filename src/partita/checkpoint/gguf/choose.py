"""Which GGUF files of a repository make up the model that a user names as `owner/name:Q4_K_M`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from partita.checkpoint.gguf.file import SUFFIX
from partita.checkpoint.header import brief
from partita.errors import ModelError

PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
"""The name of a file that is a part of a model."""

_BESIDE = re.compile(r"(^|[-_./])(mmproj|imatrix)", re.IGNORECASE)
"""Files beside a model: projectors of images, and what quantizers measured."""


def models_of(names: Iterable[str]) -> dict[str, list[str]]:
    """The models among the names of files: all parts of each in order, by the name of the first."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in sorted(name for name in names if name.lower().endswith(SUFFIX) and not name.startswith(".")):
        match = PART.fullmatch(name)
        found.setdefault((match[1], match[3]) if match else (name, ""), []).append(name)
    return {parts[0]: parts for parts in found.values()}


def choose(repository: str, names: Iterable[str], wanted: str) -> list[str]:
    """The files of the model that `wanted` names: a file, or a part of a file's name between `-`, `.`, `_` or `/`.

    Args:
        repository: `owner/name`, for errors.
        names: The paths of its files.
        wanted: What the user wrote after the colon; empty if there is only one model.

    Raises:
        ModelError: There is none, or there are several.
    """
    models = {first: parts for first, parts in models_of(names).items() if not _BESIDE.search(first)}
    found = _matching(models, wanted)
    if len(found) == 1:
        return models[found[0]]
    known = ", ".join(brief(first) for first in models)
    if not models:
        raise ModelError(
            f"{repository} holds no GGUF file. Give {repository} without {wanted!r}, or another repository."
        )
    if not found:
        raise ModelError(f"{repository} has no GGUF file named {wanted!r}. Its models are {known}.")
    named = "" if not wanted else f" named {wanted!r}"
    raise ModelError(
        f"{repository} holds {len(found)} models{named} as GGUF files: {', '.join(map(brief, found))}. Name one after a colon: "
        f"{repository}:{found[0]}"
    )


def _matching(models: Mapping[str, list[str]], wanted: str) -> list[str]:
    if not wanted:
        return list(models)
    exact = [first for first, parts in models.items() if wanted in parts]
    return exact or _with_part(models, wanted, "-./") or _with_part(models, wanted, "-./_")


def _with_part(models: Iterable[str], wanted: str, separators: str) -> list[str]:
    """The names in which `wanted` is a part between separators; Q4_K_M has the parts of Q4_K only where `_` separates."""
    pattern = re.compile(rf"(^|[{separators}]){re.escape(wanted)}([{separators}]|$)", re.IGNORECASE)
    return [first for first in models if pattern.search(first)]
