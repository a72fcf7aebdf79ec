"""LoRA adapters on disk in peft's format: names and config, the same for both engines.

Source: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from partita.checkpoint.header import parse_json, reason
from partita.errors import CheckpointError, ModelError

STEM = "adapter_model"
"""The prefix of the name of the adapter file; peft reads one file."""

CONFIG_NAME = "adapter_config.json"

Side = Literal["A", "B"]
"""`lora_A [rank, in]` or `lora_B [out, rank]`."""

_PREFIX = "base_model.model."
_NAME = re.compile(re.escape(_PREFIX) + r"(?P<path>.+)\.lora_(?P<side>[AB])\.weight")

_PLAIN: Mapping[str, Any] = {
    "use_dora": False, "use_rslora": False, "bias": "none", "lora_bias": False, "rank_pattern": {}, "alpha_pattern": {},
    "modules_to_save": None, "trainable_token_indices": None, "target_parameters": None,
}  # fmt: skip
"""The values of peft's config for a plain adapter, which are also those of missing keys."""


@dataclass(frozen=True)
class Adapters:
    """The config of plain LoRA adapters.

    Attributes:
        rank: Rows of `lora_A`.
        alpha: The scale is `alpha / rank`.
    """

    rank: int
    alpha: float

    def to_json(self, *, base: str | None, targets: list[str], transposed: bool) -> str:
        """The text of `adapter_config.json`.

        Args:
            base: The model of the adapters.
            targets: The names that match the adapted modules (see `targets_of`).
            transposed: Whether all their weights are stored as `[in, out]`.
        """
        data = {
            "base_model_name_or_path": base,
            "bias": "none",
            "fan_in_fan_out": transposed,
            "inference_mode": True,
            "init_lora_weights": True,
            "lora_alpha": int(self.alpha) if self.alpha == int(self.alpha) else self.alpha,
            "lora_dropout": 0.0,
            "peft_type": "LORA",
            "r": self.rank,
            "target_modules": targets,
            "task_type": "CAUSAL_LM",
        }
        return json.dumps(data, indent=2, sort_keys=True) + "\n"


def only(kinds: Collection[Adapters]) -> Adapters:
    """The only kind of adapters among those of a model.

    Raises:
        ModelError: There are none, or several.
    """
    if not kinds:
        raise ModelError("the model has no LoRA adapters to save. Add some with add_lora(model, rank).")
    if len(set(kinds)) > 1:
        found = sorted({(kind.rank, kind.alpha) for kind in kinds})
        raise ModelError(f"all adapters must have one rank and alpha, but there are {found}.")
    return next(iter(kinds))


def name_on_disk(path: str, side: Side) -> str:
    """The name on disk of one side of a module's adapter."""
    return f"{_PREFIX}{path}.lora_{side}.weight"


def path_of(name: str) -> str:
    """The module of one side of an adapter, from its name on disk.

    Raises:
        CheckpointError: It does not belong to a plain adapter.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise CheckpointError(
            f"{name} does not belong to a plain LoRA adapter of a linear layer. Only those can be read."
        )
    return match["path"]


def targets_of(paths: Collection[str], others: Collection[str]) -> list[str]:
    """Names that match the adapted modules and none of the `others`: the last parts of their paths if these suffice."""
    ends = {path.rpartition(".")[2] for path in paths}
    return sorted(paths if any(path.rpartition(".")[2] in ends for path in others) else ends)


def is_of_mlx_lm(folder: Path) -> bool:
    """Whether a folder holds adapters that `mlx_lm.lora` wrote.

    Raises:
        CheckpointError: The folder holds no adapters.
    """
    return "fine_tune_type" in _read_config(folder)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_NAME
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read: {reason(error)}. Give a folder that holds adapters in peft's or mlx-lm's format."
        ) from error
    return dict(parse_json(raw, f"{file}: the config"))


def read_adapters(folder: Path) -> Adapters:
    """The config of adapters that peft, `mlx_lm.lora` or Partita wrote.

    Raises:
        CheckpointError: There is none, or it is not of plain LoRA adapters of one rank.
    """
    file, data = folder / CONFIG_NAME, _read_config(folder)
    if "fine_tune_type" in data:
        return _of_mlx_lm(file, data)
    if data.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type must be LORA, but is {data.get('peft_type')!r}.")
    for name, plain in _PLAIN.items():
        if data.get(name, plain) not in (plain, None, {}, []):
            raise CheckpointError(
                f"{file}: only plain LoRA can be read, with {name} = {plain!r}, but it is {data[name]!r}."
            )
    rank, alpha = data.get("r"), data.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        raise CheckpointError(f"{file}: must have a whole r and a number lora_alpha, but has {rank!r} and {alpha!r}.")
    return Adapters(rank, float(alpha))


def _of_mlx_lm(file: Path, data: Mapping[str, Any]) -> Adapters:
    if data["fine_tune_type"] != "lora":
        raise CheckpointError(
            f"{file}: only plain LoRA can be read, with fine_tune_type = 'lora', but it is {data['fine_tune_type']!r}. "
            "Fuse the model with mlx_lm.fuse and load the result."
        )
    parameters = data.get("lora_parameters")
    given = parameters if isinstance(parameters, Mapping) else {}
    rank, scale = given.get("rank"), given.get("scale")
    if type(rank) is not int or rank < 1 or not isinstance(scale, int | float):
        raise CheckpointError(
            f"{file}: lora_parameters must have a whole rank and a number scale, but has {rank!r} and {scale!r}."
        )
    return Adapters(rank, round(float(scale) * rank, 9))
