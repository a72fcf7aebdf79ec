"""The generation settings of a checkpoint, as transformers reads them: `generation_config.json`, else `config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from partita.errors import ModelError

FILE_NAME = "generation_config.json"

REFUSED: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "num_return_sequences": (1,), "diversity_penalty": (0,),
    "guidance_scale": (1,), "sequence_bias": (), "encoder_repetition_penalty": (1,), "encoder_no_repeat_ngram_size": (0,),
    "remove_invalid_values": (False,), "exponential_decay_length_penalty": (), "max_time": (), "watermarking_config": (),
    "penalty_alpha": (0,), "dola_layers": (), "constraints": (), "force_words_ids": (), "token_healing": (False,),
}  # fmt: skip
"""Unsupported settings that change the generated tokens, with the values that have no effect."""

REFUSED_SAMPLING: Mapping[str, tuple[Any, ...]] = {
    "typical_p": (1,), "epsilon_cutoff": (0,), "eta_cutoff": (0,), "top_h": (),
}  # fmt: skip
"""The same for settings that are used only for sampling."""

USED = (
    "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids",
    "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "eos_token_id", "max_length",
    "max_new_tokens", "min_length", "min_new_tokens", "stop_strings",
)  # fmt: skip
"""Settings that are supported."""


def read_generation(folder: Path) -> dict[str, Any]:
    """The generation settings of a checkpoint in `folder`, without those that are null.

    If `generation_config.json` exists, `config.json` is ignored, even for the end tokens.

    Raises:
        ModelError: The file is malformed.
    """
    file = folder / FILE_NAME
    if file.is_file():
        return _checked({name: value for name, value in _read(file).items() if value is not None}, file)
    file = folder / "config.json"
    return _checked(generation_of_config(_read(file)), file) if file.is_file() else {}


def generation_of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The generation settings in a model's config, or in that of its decoder if it has none."""
    inner = next((config[key] for key in ("decoder", "generator", "text_config") if config.get(key)), config)
    names = (*USED, *REFUSED, *REFUSED_SAMPLING)
    found = {n: config.get(n, inner.get(n)) if config.get(n) is not None else inner.get(n) for n in names}
    return {name: value for name, value in found.items() if value is not None}


def end_tokens(settings: Mapping[str, Any]) -> frozenset[int]:
    """The ids that end a text."""
    named = settings.get("eos_token_id")
    return frozenset([named] if isinstance(named, int) else named or ())


def _read(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not JSON: {error}.") from error
    if not isinstance(data, dict):
        raise ModelError(f"{file} must be a JSON object, but is {data!r:.100}.")
    return data


def _checked(settings: dict[str, Any], file: Path) -> dict[str, Any]:
    named = settings.get("eos_token_id")
    ends = named if isinstance(named, list) else [] if named is None else [named]
    if not all(type(i) is int for i in ends):
        raise ModelError(f"{file}: eos_token_id must be an id or a list of ids, but is {named!r:.100}.")
    return settings
