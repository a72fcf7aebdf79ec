"""Forms of a family: the differences between its configs apart from sizes, and which forms were measured.

`measured_forms.json` lists by family the forms whose logits on MLX were compared with those of transformers' own model, and the
versions of both packages. `python -m tests.parity.measure_forms` writes it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.resources import files
from typing import Any

from partita.errors import ModelError
from partita.mlx.model.config import transformers_config
from partita.mlx.model.mlx_lm_models import model_classes


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison with transformers.

    Attributes:
        error: The largest difference of logits, relative to the largest logit; None if nothing could be compared.
        key: If they differ, the config key that mlx-lm reads differently, or "" if no single key is the cause.
        reason: Why nothing could be compared.
    """

    error: float | None
    key: str | None = None
    reason: str = ""

    @property
    def differs(self) -> bool:
        """Whether both models ran and differ."""
        return self.key is not None

    def to_json(self) -> dict[str, Any]:
        """The verdict as plain data."""
        return {key: value for key, value in asdict(self).items() if value not in (None, "") or key == "error"} | (
            {"key": self.key} if self.key is not None else {}
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Verdict:
        """The verdict from plain data."""
        return cls(data.get("error"), data.get("key"), data.get("reason", ""))


def versions() -> dict[str, str]:
    """The installed versions of both packages."""
    return {name: _version(name) for name in ("mlx-lm", "transformers")}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def deviations(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a text model's config whose form deviates from transformers' default, and the defaults."""
    known = transformers_config(config)
    if known is None:
        return {}
    usual = type(known)().to_dict()
    data = known.to_dict()
    # Published configs have many keys that neither side reads; these change nothing.
    read = {*usual, *_arguments(config)}
    return {
        key: usual.get(key)
        for key in sorted(read)
        if not _is_left_out(key) and _form(data.get(key), data) != _form(usual.get(key), usual)
    }


def _arguments(config: Mapping[str, Any]) -> set[str]:
    """The keys that mlx-lm's model of a config reads; none if it has no such model."""
    try:
        _, arguments = model_classes(config)
    except ModelError:
        return set()
    return {field.name for field in dataclasses.fields(arguments)} if dataclasses.is_dataclass(arguments) else set()


def form_of(config: Mapping[str, Any]) -> dict[str, str] | None:
    """The form of a text model's config: the keys that deviate from the family's defaults. None for an unknown family."""
    known = transformers_config(config)
    if known is None:
        return None
    data = known.to_dict()
    return {key: _form(data.get(key), data) for key in deviations(config)}


def form_name(form: Mapping[str, str]) -> str:
    """A form as text; empty for the family's defaults."""
    return ", ".join(f"{key}={value}" for key, value in sorted(form.items()))


def _is_left_out(key: str) -> bool:
    return (
        key in _LEFT_OUT
        or key.startswith("_")
        or key.endswith(("_token_id", "dropout", "_pdrop", "initializer_range", "_std", "_loss_coef", "_coef"))
    )


_LEFT_OUT = frozenset(
    ("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache", "model_type", "quantization",
     "quantization_config", "name_or_path", "output_router_logits", "return_dict", "id2label", "label2id", "pretraining_tp",
     "eos_token_ids", "language", "tokenizer_class", "output_hidden_states", "output_attentions", "chunk_size_feed_forward",
     "problem_type", "is_encoder_decoder", "attn_implementation", "rope_theta", "rope_scaling", "rotary_emb_base", "n_ctx",
     "sliding_window_pattern", "rope_local_base_freq", "type", "partial_rotary_factor", "rotary_pct",
     "original_max_position_embeddings", "head_dim", "mlp_bias_init", "cache_implementation", "torchscript")
)  # fmt: skip
"""Keys that change no logits, and keys that `rope_parameters` and `layer_types` repeat."""


def _form(value: Any, config: Mapping[str, Any]) -> str:
    """A value without its size: switches and names unchanged, numbers as zero, one, less or more."""
    if isinstance(value, Mapping):
        nested = {key: item for key, item in value.items() if isinstance(item, Mapping)}
        if nested:
            return "{" + ", ".join(f"{key}: {_form(item, config)}" for key, item in nested.items()) + "}"
        kind = value.get("rope_type")
        unnamed = ("rope_type", "type", "rope_theta")
        named = {key: item for key, item in value.items() if item is not None and key not in unnamed}
        if kind == "default":
            named = {key: item for key, item in named.items() if key == "partial_rotary_factor"}
        switches = ", ".join(
            sorted(f"{key} {item}" if isinstance(item, bool) else str(key) for key, item in named.items())
        )
        return f"{kind}({switches})" if kind else f"({switches})"
    if isinstance(value, (list, tuple)):
        kinds = sorted({str(item) for item in value if isinstance(item, (str, bool))})
        return f"[{', '.join(kinds)}]" if kinds or not value else "[numbers]"
    if value is None or isinstance(value, (str, bool)):
        return str(value)
    if value in (0, 1):
        return str(int(value))
    return "more" if value > 1 else "less" if value > 0 else "negative"


@functools.cache
def _table() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(files("partita.mlx.proof").joinpath("measured_forms.json").read_text())
    return data


def measured(family: str, form: Mapping[str, str]) -> Verdict | None:
    """The verdict on a form, measured with the installed mlx-lm; None if it was not measured."""
    table = _table()
    if table["versions"]["mlx-lm"] != versions()["mlx-lm"]:
        return None
    found = table["families"].get(family, {}).get(form_name(form))
    return Verdict.from_json(found) if found is not None else None


def measured_by_parts(family: str, form: Mapping[str, str]) -> bool:
    """Whether each deviation of a form was measured separately and found equal."""
    verdicts = [measured(family, {key: value}) for key, value in form.items()]
    return bool(verdicts) and all(one is not None and one.error is not None and not one.differs for one in verdicts)
