"""LoRA adapters on disk in peft's format: names and config, the same for both engines.

Source: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from partita.checkpoint.header import parse_json, reason
from partita.checkpoint.index import open_checkpoint, weights_name
from partita.checkpoint.run_folder import ADAPTERS_NAME, RunFolder, is_run_folder
from partita.core.model.spec import ModelSpec
from partita.errors import CheckpointError, ModelError

STEM = "adapter_model"
"""The prefix of the name of the adapter file; peft reads one file."""

CONFIG_NAME = "adapter_config.json"

Side = Literal["A", "B", "m"]
"""`lora_A [rank, in]`, `lora_B [out, rank]` or DoRA's magnitudes `[out]`."""

MAGNITUDE = "lora_magnitude_vector"
"""Name of DoRA's magnitudes on disk."""

PREFIX = "base_model.model."
"""What peft writes before the names of the unsplit model."""

_NAME = re.compile(re.escape(PREFIX) + r"(?P<path>.+)\.lora_(?P<side>[AB])\.weight")

_PLAIN: Mapping[str, Any] = {
    "use_dora": False, "bias": "none", "lora_bias": False, "rank_pattern": {}, "alpha_pattern": {},
    "modules_to_save": None, "trainable_token_indices": None, "target_parameters": None,
}  # fmt: skip
"""The values of peft's config for a plain adapter, which are also those of missing keys."""

_READ_BY_PATTERNS = ("use_dora", "rank_pattern", "alpha_pattern")
"""What `adapter_patterns` reads besides."""


@dataclass(frozen=True)
class Adapters:
    """The config of plain LoRA adapters.

    Attributes:
        rank: Rows of `lora_A`.
        alpha: The scale is `alpha / rank`.
        dropout: Probability with which training drops an input of `lora_A`.
        dora: Whether the norms of the weight's rows are trained as well.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    dora: bool = False

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
            "lora_dropout": self.dropout,
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
    return f"{PREFIX}{path}.{MAGNITUDE}" if side == "m" else f"{PREFIX}{path}.lora_{side}.weight"


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


def lora_alpha(rank: int, alpha: float | None, *, rslora: bool) -> float | None:
    """The alpha for a scale of `alpha / rank` that gives the scale of rank-stabilized LoRA, `alpha / sqrt(rank)`.

    Source: rsLoRA (Kalajdzievski 2023, 2312.03732).
    """
    return (alpha if alpha is not None else rank) * math.sqrt(rank) if rslora and rank > 0 else alpha


def is_target(path: str, targets: Collection[str] | None) -> bool:
    """Whether a module's path ends with one of the names, as peft matches `target_modules`; None matches all."""
    return targets is None or any(f".{path}".endswith(f".{name}") for name in targets)


def refuse_unmatched(targets: Collection[str] | None, adapted: Collection[str], spec: ModelSpec) -> None:
    """Raise `ModelError` if no linear layer was adapted, or none of one of the names in `targets`."""
    unmatched = [name for name in targets or () if not any(is_target(path, [name]) for path in adapted)]
    if adapted and not unmatched:
        return
    where = f"inside {spec.layers or 'the model'}"
    if targets is None:
        raise ModelError(f"{spec.family}: no linear layer was found {where} to adapt.")
    inside = {path.rpartition(".")[2] for path in spec.linears or adapted if spec.layer_of(path) is not None}
    raise ModelError(
        f"{spec.family} has no linear layer {', '.join(unmatched)} {where} to adapt. Its linear layers are "
        f"{', '.join(sorted(inside))}."
    )


def refuse_adapted(adapted: bool) -> None:
    """Raise `ModelError` for a model that has adapters already."""
    if adapted:
        raise ModelError("the model has adapters already. Merge them (merge_lora), or load the model without adapters.")


def check_shape(folder: Path, name: str, expected: tuple[int, ...], found: tuple[int, ...] | None) -> None:
    """Raise `CheckpointError` if a tensor in the adapters' file has another shape than the model needs, or is missing."""
    if found != expected:
        raise CheckpointError(
            f"{folder}: {name} must be {list(expected)} for this model; got "
            f"{'no such tensor' if found is None else list(found)}. Use the model that these adapters were trained on."
        )


def refuse_unplaced(folder: Path, wanted: Collection[str], placed: Iterable[Any], family: str) -> None:
    """Raise `CheckpointError` if some of the adapters have no place in the model.

    Args:
        folder: The adapters.
        wanted: What the file holds.
        placed: For each stage, what it placed.
        family: The model's family.
    """
    left = set(wanted) - {one for theirs in placed for one in theirs}
    if left:
        raise CheckpointError(
            f"{folder}: adapts {min(left)}, which is not a linear layer inside the layers of {family}. Add these adapters to "
            "the unsplit model with peft, merge them, and split the result."
        )


def is_of_mlx_lm(folder: Path) -> bool:
    """Whether a folder holds adapters that `mlx_lm.lora` wrote.

    Raises:
        CheckpointError: The folder holds no adapters.
    """
    return "fine_tune_type" in read_config(folder)


def find_adapters(folder: Path) -> Path:
    """The adapters of a run in its folder: the result's, or the newest checkpoint's; else `folder` itself.

    Raises:
        CheckpointError: The newest checkpoint of an unfinished run is not complete.
    """
    if (folder / CONFIG_NAME).exists():
        return folder
    result = folder / ADAPTERS_NAME
    if (result / CONFIG_NAME).exists():
        return result
    return RunFolder(folder).newest() if is_run_folder(folder) else folder


def read_config(folder: Path) -> dict[str, Any]:
    """The data of `adapter_config.json`.

    Raises:
        CheckpointError: It cannot be read.
    """
    file = folder / CONFIG_NAME
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot be read: {reason(error)}. Give a folder that holds adapters in peft's or mlx-lm's format, or the "
            "folder of a run with adapters."
        ) from error
    return dict(parse_json(raw, f"{file}: the config"))


def is_plain(folder: Path) -> bool:
    """Whether adapters are plain LoRA of linear layers, with one rank and alpha; others need peft.

    Raises:
        CheckpointError: The folder holds no adapters, or none of LoRA.
    """
    data = read_config(folder)
    if "fine_tune_type" not in data and data.get("peft_type") != "LORA":
        read_adapters(folder)
    names = open_checkpoint(folder / weights_name(STEM)).tensors
    return _not_plain(data) is None and all(_NAME.fullmatch(name) for name in names)


def check_readable(folder: Path) -> None:
    """Raise `CheckpointError` for a folder without adapters of LoRA; adapters that are not plain need peft."""
    data = read_config(folder)
    if "fine_tune_type" in data or data.get("peft_type") != "LORA":
        read_adapters(folder)


def _not_plain(data: Mapping[str, Any], allowed: Collection[str] = ()) -> str | None:
    different = (name for name, plain in _PLAIN.items() if data.get(name, plain) not in (plain, None, {}, []))
    return next((name for name in different if name not in allowed), None)


def read_adapters(folder: Path, *, is_plain: bool = True) -> Adapters:
    """The config of adapters that peft, `mlx_lm.lora` or Partita wrote.

    Args:
        folder: The adapters.
        is_plain: Whether they must be plain LoRA; otherwise DoRA and patterns are allowed, and not part of the result.

    Raises:
        CheckpointError: There is none, or it is not of such adapters.
    """
    file, data = folder / CONFIG_NAME, read_config(folder)
    if "fine_tune_type" in data:
        return _of_mlx_lm(file, data)
    if data.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type must be LORA, but is {data.get('peft_type')!r}.")
    name = _not_plain(data, () if is_plain else _READ_BY_PATTERNS)
    if name is not None:
        what = "plain LoRA" if is_plain else "LoRA or DoRA of linear layers"
        raise CheckpointError(
            f"{file}: only {what} can be read, with {name} = {_PLAIN[name]!r}, but it is {data[name]!r}."
        )
    rank, alpha = data.get("r"), data.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        raise CheckpointError(f"{file}: must have a whole r and a number lora_alpha, but has {rank!r} and {alpha!r}.")
    dropout = data.get("lora_dropout", 0.0)
    scaled = lora_alpha(rank, float(alpha), rslora=bool(data.get("use_rslora")))
    assert scaled is not None
    return Adapters(rank, scaled, float(dropout) if isinstance(dropout, int | float) else 0.0)


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
