"""The reference of an unsplit model on MLX: transformers' own model where torch is installed, else a table of measured forms.

A split model is compared with the unsplit model on MLX. This module checks that the unsplit model itself computes what
transformers computes: when a form of a family is loaded for the first time, transformers and mlx-lm both run a small model of
it with the same weights.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from partita.checkpoint.durable import write_whole
from partita.core.model.spec import text_config
from partita.errors import CheckpointError, ModelError
from partita.mlx.model.config import plain_numbers, transformers_config
from partita.mlx.proof.forms import Verdict, form_name, form_of, measured, measured_by_parts, versions
from partita.user_cache import cache_folder

TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Reference:
    """The reference of an unsplit model on MLX.

    Attributes:
        text: The reference, or "none" and the reason.
        compared: Whether there is one.
        is_missing: Whether a reference is possible, but nothing was compared.
    """

    text: str
    compared: bool
    is_missing: bool = False


_checks: contextvars.ContextVar[bool] = contextvars.ContextVar("checks", default=True)


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """A context in which models load without this check; the comparison itself uses it."""
    token = _checks.set(False)
    try:
        yield
    finally:
        _checks.reset(token)


def check_reference(config: Mapping[str, Any]) -> None:
    """Check that the unsplit model on MLX computes what transformers computes.

    Warns if transformers supports the family, but nothing could be compared: torch is not installed, or the comparison failed.

    Raises:
        ModelError: They differ. The error names the key of the config that mlx-lm reads differently.
    """
    if not _checks.get():
        return
    found = reference_of(config)
    if found.is_missing:
        warnings.warn(f"MLX's results for this {config['model_type']} have no reference: {found.text}", stacklevel=3)


def reference_of(config: Mapping[str, Any]) -> Reference:
    """The reference of the unsplit model of a config on MLX.

    Raises:
        ModelError: It does not compute what transformers computes.
    """
    text = _text(config)
    if text is None:
        return Reference(f"none, since transformers has no text model of {config['model_type']}", False)
    family, form = text["model_type"], form_of(text) or {}
    own = versions()
    verdict = measured(family, form)
    by = f"transformers {own['transformers']}, by the table of forms measured with mlx-lm {own['mlx-lm']}"
    if verdict is None and find_spec("torch") is not None:
        verdict = _remembered(family, form, text)
        by = f"transformers {own['transformers']}, measured on this machine with mlx-lm {own['mlx-lm']}"
    if verdict is None:
        if measured_by_parts(family, form):
            return Reference(f"{by}, each key of its form separately", True)
        name = form_name(form) or "the family's defaults"
        why = "torch is not installed" if find_spec("torch") is None else "the comparison failed"
        return Reference(f"none: the form ({name}) is not measured, and {why}", False, True)
    if verdict.differs:
        raise ModelError(_why(family, form, verdict))
    if verdict.error is None:
        return Reference(f"none, since a small {family} cannot be compared: {verdict.reason}", False)
    return Reference(f"{by}; logits within {verdict.error:.0e}", True)


def _why(family: str, form: Mapping[str, str], verdict: Verdict) -> str:
    cause = (
        f"mlx-lm reads {verdict.key} ({form.get(verdict.key, '?')}) differently from transformers"
        if verdict.key
        else f"mlx-lm computes the form ({form_name(form) or 'the defaults'}) differently from transformers"
    )
    return (
        f"{family} would give different results on MLX: {cause}; the logits of a small model differ by {verdict.error:.1e} of "
        "the largest. Use the torch engine."
    )


def _text(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The text model's config as transformers completes it; None unless transformers and mlx-lm both have its family."""
    from partita.mlx.model.mlx_lm_models import model_classes

    text = dict(text_config(config))
    known = transformers_config(text) if "model_type" in text else None
    if known is None:
        return None
    try:
        model_classes(text)
    except ModelError:
        return None
    data: dict[str, Any] = plain_numbers(json.loads(known.to_json_string(use_diff=False)))
    return {key: value for key, value in data.items() if key not in ("quantization", "quantization_config")}


def _remembered(family: str, form: Mapping[str, str], config: Mapping[str, Any]) -> Verdict | None:
    """The verdict of an earlier comparison on this machine, else of a new one, which is cached; None if that failed."""
    name = "-".join(["forms", *versions().values()])
    file = cache_folder() / f"{name}.json"
    key = f"{family}: {form_name(form)}"
    try:
        known: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError):
        known = {}
    if key not in known:
        verdict = _measured_now(config)
        if verdict is None:
            return None
        known[key] = verdict.to_json()
        with contextlib.suppress(OSError, CheckpointError):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(known, indent=1).encode())
    return Verdict.from_json(known[key])


def _measured_now(config: Mapping[str, Any]) -> Verdict | None:
    """Compare in a new process, so that torch is not imported in this one; None if that process fails."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(config, default=str))
        command = [sys.executable, "-m", "partita.parity", str(file)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
            return Verdict.from_json(json.loads(done.stdout.strip().splitlines()[-1]))
        except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
            return None
