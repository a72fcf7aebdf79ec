"""Configs of LoRA and DoRA adapters whose rank and alpha may differ between layers, in peft's format.

A pattern of peft maps a regular expression for the end of a module's path to the rank or alpha of that module; the first
that matches counts. Source: peft's `LoraConfig.rank_pattern` and `alpha_pattern`.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from partita.errors import CheckpointError, ModelError
from partita.training.adapter_files import (
    CONFIG_NAME,
    MAGNITUDE,
    PREFIX,
    Adapters,
    is_of_mlx_lm,
    lora_alpha,
    read_adapters,
    read_config,
)

V = TypeVar("V", int, float)

_NAME = re.compile(re.escape(PREFIX) + rf"(?P<path>.+)\.(lora_[AB]\.weight|{MAGNITUDE})")


@dataclass(frozen=True)
class AdapterConfig:
    """The config of a model's adapters.

    Attributes:
        usual: The kind of the layers that no pattern matches; its alpha is not scaled for rsLoRA.
        rank_pattern: Ranks by pattern.
        alpha_pattern: Alphas by pattern.
        rslora: Whether the scale is `alpha / sqrt(rank)`.
    """

    usual: Adapters
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False

    def of(self, path: str) -> Adapters:
        """The kind of a module's adapter, with the alpha for a scale of `alpha / rank`."""
        rank = _first(self.rank_pattern, path, self.usual.rank)
        alpha = lora_alpha(rank, _first(self.alpha_pattern, path, self.usual.alpha), rslora=self.rslora)
        assert alpha is not None
        return replace(self.usual, rank=rank, alpha=alpha)

    def to_json(self, *, base: str | None, targets: list[str], transposed: bool) -> str:
        """The text of `adapter_config.json`; see `Adapters.to_json`."""
        data = json.loads(self.usual.to_json(base=base, targets=targets, transposed=transposed))
        more = {
            "use_dora": self.usual.dora, "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
        }  # fmt: skip
        data |= {name: value for name, value in more.items() if value}
        return json.dumps(data, indent=2, sort_keys=True) + "\n"


def _first(pattern: Mapping[str, V], path: str, otherwise: V) -> V:
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", path)), otherwise)


def config_of(kinds: Mapping[str, Adapters]) -> AdapterConfig:
    """The config of adapters by path on disk: the most frequent rank and alpha, and patterns for the others.

    Raises:
        ModelError: There are none, or they have several dropouts, or only some are DoRA.
    """
    if not kinds:
        raise ModelError("the model has no LoRA adapters to save. Add some with add_lora(model, rank).")
    shared = {(kind.dropout, kind.dora) for kind in kinds.values()}
    if len(shared) > 1:
        raise ModelError(
            f"all adapters must have one dropout, and be all LoRA or all DoRA, but there are {sorted(shared)} (dropout, DoRA)."
        )
    ((rank, alpha), _), *_ = sorted(
        Counter((kind.rank, kind.alpha) for kind in kinds.values()).items(), key=lambda one: (-one[1], one[0])
    )
    ((dropout, dora),) = shared
    ranks = {path: kind.rank for path, kind in kinds.items()}
    alphas = {path: kind.alpha for path, kind in kinds.items()}
    return AdapterConfig(Adapters(rank, alpha, dropout, dora), _pattern(ranks, rank), _pattern(alphas, alpha))


def _pattern(values: Mapping[str, V], usual: V) -> dict[str, V]:
    """The pattern that gives each path its value: by the last part of the paths where all of them agree."""
    by_name: dict[str, set[V]] = {}
    for path, value in values.items():
        by_name.setdefault(path.rpartition(".")[2], set()).add(value)
    found: dict[str, V] = {}
    for path, value in sorted(values.items()):
        name = path.rpartition(".")[2]
        key = name if len(by_name[name]) == 1 else re.escape(path)
        if value != usual:
            found[key] = value
    return found


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The config of LoRA or DoRA adapters that peft, `mlx_lm.lora` or Partita wrote.

    Raises:
        CheckpointError: There is none, or it asks for more than LoRA or DoRA of linear layers.
    """
    usual = read_adapters(folder, is_plain=False)
    if is_of_mlx_lm(folder):
        return AdapterConfig(usual)
    data = read_config(folder)
    ranks = _checked(folder, "rank_pattern", data.get("rank_pattern") or {}, int)
    alphas = _checked(folder, "alpha_pattern", data.get("alpha_pattern") or {}, int | float)
    rslora = bool(data.get("use_rslora"))
    usual = replace(usual, alpha=float(data["lora_alpha"]), dora=bool(data.get("use_dora")))
    return AdapterConfig(usual, ranks, alphas, rslora)


def _checked(folder: Path, name: str, pattern: Any, kind: Any) -> dict[str, Any]:
    if not isinstance(pattern, Mapping) or not all(
        isinstance(value, kind)
        and not isinstance(value, bool)
        and (value >= 1 if kind is int else math.isfinite(value))
        for value in pattern.values()
    ):
        raise CheckpointError(
            f"{folder / CONFIG_NAME}: {name} must map patterns to "
            f"{'whole numbers of at least 1' if kind is int else 'finite numbers'}, but is {pattern!r:.100}."
        )
    return dict(pattern)


def adapted_path(name: str) -> str:
    """The module of a part of an adapter, from its name on disk.

    Raises:
        CheckpointError: It does not belong to LoRA or DoRA of a linear layer.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise CheckpointError(
            f"{name} does not belong to a LoRA or DoRA adapter of a linear layer. Only those can be read."
        )
    return match["path"]


def unmatched_patterns(patterns: Collection[str], paths: Collection[str]) -> list[str]:
    """The patterns that match none of the modules."""
    return [key for key in patterns if not any(re.match(rf"(.*\.)?({key})$", path) for path in paths)]
