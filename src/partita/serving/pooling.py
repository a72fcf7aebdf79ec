"""How a folder's tokens become one vector: the modules of sentence-transformers that come with a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from partita.checkpoint.header import parse_json
from partita.errors import ModelError

Kind = Literal["cls", "max", "mean", "mean_sqrt_len", "weightedmean", "lasttoken"]
Vectors = np.ndarray[Any, np.dtype[np.floating[Any]]]

_MODES: Mapping[str, Kind] = {
    "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max", "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len", "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}  # fmt: skip
"""The keys of a Pooling module's config, in the order in which sentence-transformers joins their results."""


@dataclass(frozen=True)
class Pooling:
    """How hidden states become a vector.

    Attributes:
        kinds: The poolings whose results are joined.
        normalizes: Whether the vector is divided by its length.
        is_given: Whether the folder says so; otherwise it is the mean.
        lowers: Whether texts are made lower-case first.
        prefix: What is put before each text.
        most_tokens: The largest number of tokens of a text; 0 for what the model takes.
    """

    kinds: tuple[Kind, ...] = ("mean",)
    normalizes: bool = False
    is_given: bool = False
    lowers: bool = False
    prefix: str = ""
    most_tokens: int = 0

    def pool(self, hidden: Vectors) -> Vectors:
        """`[rows, tokens, width]`, all tokens of texts, to `[rows, len(kinds) * width]`."""
        vectors = np.concatenate([_pooled(hidden, kind) for kind in self.kinds], -1)
        return self.normalized(vectors) if self.normalizes else vectors

    @staticmethod
    def normalized(vectors: Vectors) -> Vectors:
        """Vectors `[..., width]` divided by their lengths."""
        return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12))


def _pooled(hidden: Vectors, kind: Kind) -> Vectors:
    count = hidden.shape[1]
    if kind == "cls":
        return hidden[:, 0]
    if kind == "lasttoken":
        return hidden[:, -1]
    if kind == "max":
        return np.asarray(hidden.max(1))
    if kind == "weightedmean":
        weights = np.arange(1, count + 1, dtype=hidden.dtype)
        return np.asarray((hidden * weights[None, :, None]).sum(1) / weights.sum())
    total = hidden.sum(1)
    return np.asarray(total / (count if kind == "mean" else np.sqrt(hidden.dtype.type(count))))


def read_pooling(folder: Path) -> Pooling:
    """How the model in `folder` pools: by its `modules.json`, else the mean.

    Raises:
        ModelError: The folder has a module that this server does not have.
    """
    found = _read(folder / "modules.json", is_list=True)
    if found is None:
        return Pooling()
    modules, settings = found["modules"], dict[str, Any]()
    for module in modules if isinstance(modules, list) else []:
        kind = str(module.get("type", "")).rpartition(".")[2] if isinstance(module, dict) else ""
        if kind == "Pooling":
            settings["kinds"] = _kinds(folder / str(module.get("path", "")) / "config.json")
        elif kind == "Normalize":
            settings["normalizes"] = True
        elif kind != "Transformer":
            raise ModelError(
                f"{folder / 'modules.json'}: embeddings need modules of the types Transformer, Pooling and Normalize; got "
                f"{kind or module!r:.60}. Use sentence-transformers for this model."
            )
    if "kinds" not in settings:
        raise ModelError(f"{folder / 'modules.json'}: embeddings need a module of the type Pooling, but there is none.")
    text = _read(folder / "sentence_bert_config.json") or {}
    most = text.get("max_seq_length")
    return Pooling(
        **settings, is_given=True, lowers=text.get("do_lower_case") is True, prefix=_prefix(folder),
        most_tokens=most if type(most) is int and most > 0 else 0,
    )  # fmt: skip


def _kinds(file: Path) -> tuple[Kind, ...]:
    data = _read(file)
    if data is None:
        raise ModelError(f"{file} does not exist, but it must say how tokens are pooled.")
    named = data.get("pooling_mode")
    found = tuple(kind for key, kind in _MODES.items() if data.get(key) is True)
    if named is not None:
        names = [named] if isinstance(named, str) else named
        found = tuple(kind for kind in get_args(Kind) if kind in names)
    if not found or (named is not None and len(found) != (1 if isinstance(named, str) else len(named))):
        raise ModelError(f"{file}: the pooling must be of {', '.join(get_args(Kind))}; got {named or data!r:.100}.")
    if data.get("include_prompt") is False and _prefix(file.parents[1]):
        raise ModelError(
            f"{file}: include_prompt=false with a default prompt is not supported. Remove the default prompt."
        )
    return found


def _prefix(folder: Path) -> str:
    """The prompt that sentence-transformers puts before every text by default."""
    data = _read(folder / "config_sentence_transformers.json") or {}
    prompts = data.get("prompts")
    return str((prompts if isinstance(prompts, dict) else {}).get(data.get("default_prompt_name")) or "")


def _read(file: Path, *, is_list: bool = False) -> dict[str, Any] | None:
    """The object in a JSON file, a list under the key `modules`; None if the file does not exist."""
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}.") from error
    return dict(parse_json(b'{"modules": ' + raw + b"}" if is_list else raw, f"{file}: the file"))
