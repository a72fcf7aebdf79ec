"""MLX against transformers: the logits of one small model with the same weights on both.

`python -m partita.parity CONFIG.json` prints the verdict as JSON. The MLX engine, which does not import torch, runs
it in a new process.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from torch import nn

from partita.core.model.shrink import reference_configs
from partita.errors import ModelError, PartitaError
from partita.mlx.collectives.groups import single_groups
from partita.mlx.load import load
from partita.mlx.model.mlx_lm_models import describe
from partita.mlx.model.parts import main_output
from partita.mlx.model.sliding_window import window_left_out
from partita.mlx.proof.forms import Verdict, deviations
from partita.mlx.proof.reference import unchecked
from partita.torch.model.transformers_models import model_class, read_hf_config
from partita.torch.transformers_internals import new_model, quiet

LENGTHS = (12, 40)
"""Lengths of the two texts in tokens, below and above the length at which a reference config changes."""

TOLERANCE = 1e-3
"""Differences of logits up to this, relative to the largest logit, are rounding; those measured are below 3e-4."""

LARGEST_PARAMETERS = 30_000_000


def compare_with_transformers(config: Mapping[str, Any]) -> Verdict:
    """Compare MLX with transformers for models of a config's form.

    Args:
        config: A text model's config in transformers' form.
    """
    window = window_left_out(config) is None
    reasons: list[str] = []
    for small in reference_configs(config, window=window):
        try:
            error = _difference(small)
        except PartitaError as failure:
            reasons.append(str(failure))
            continue
        if error <= TOLERANCE:
            return Verdict(error)
        return Verdict(error, _blamed(small))
    return Verdict(None, reason=reasons[0] if reasons else "no small model of it can be built.")


def _blamed(small: Mapping[str, Any]) -> str:
    """The config key whose reset to the family's default makes both equal; "" if no single key does."""
    for key, default in deviations(small).items():
        try:
            if _difference({**small, key: default}) <= TOLERANCE:
                return key
        except PartitaError:
            continue
    return ""


def _difference(small: Mapping[str, Any]) -> float:
    """The largest difference of the logits, relative to transformers' largest logit.

    Raises:
        ModelError: One of them cannot build, write or run this model.
    """
    with tempfile.TemporaryDirectory() as folder:
        expected = _write_reference(small, Path(folder))
        try:
            with unchecked():
                model = load(folder, groups=single_groups(), verify=False)
            worst = 0.0
            for ids, want in expected:
                got = np.array(main_output(model(mx.array(ids))).astype(mx.float32))
                if not np.isfinite(got).all():
                    return float("inf")
                worst = max(worst, float(np.abs(got - want).max() / np.abs(want).max()))
        except PartitaError:
            raise
        except Exception as error:
            raise ModelError(f"mlx-lm cannot run a small model: {describe(error)}") from error
    return worst


def _write_reference(small: Mapping[str, Any], folder: Path) -> list[tuple[list[list[int]], np.ndarray[Any, Any]]]:
    """Write transformers' model of a small config with random weights, and return the texts and its logits for them."""
    config = read_hf_config({key: value for key, value in small.items() if key not in _NOT_COMPARED})
    try:
        cls = model_class(config)
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(0)
            with torch.device("meta"):
                size = sum(p.numel() for p in new_model(cls, config, torch.float32).parameters())
            if size > LARGEST_PARAMETERS:
                raise ModelError("it is too large even when reduced.")
            model: Any = new_model(cls, config, torch.float32, plain_attention=True).eval()
            _fill(model)
            texts = [torch.randint(3, int(config.vocab_size), (1, length)) for length in LENGTHS]
            with torch.no_grad():
                logits = [model(input_ids=ids, use_cache=False).logits.numpy() for ids in texts]
            model.save_pretrained(folder)
    except PartitaError:
        raise
    except Exception as error:
        raise ModelError(f"transformers cannot run a small model: {describe(error)}") from error
    return [(ids.tolist(), rows) for ids, rows in zip(texts, logits, strict=True)]


_NOT_COMPARED = ("architectures", "quantization_config", "dtype", "torch_dtype", "auto_map", "transformers_version")


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Set weights so that every part of a model matters: attention far from uniform, noise on norms and biases."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.normal_()
    for name, tensor in _floating(model):
        if tensor.dim() == 1:
            tensor.add_(torch.randn_like(tensor) * 0.1)
        elif tensor.dim() == 3 or name.endswith(
            ("proj.weight", "Wqkv.weight", "c_attn.weight", "query_key_value.weight")
        ):
            tensor.normal_(std=1.5 / tensor.shape[-1] ** 0.5)
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # type: ignore[operator]


def _floating(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    saved = set(model.state_dict())
    yield from model.named_parameters()
    yield from ((n, b) for n, b in model.named_buffers() if n in saved and b.is_floating_point())


def main() -> None:
    """Print the verdict on the config in a file."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = json.loads(Path(sys.argv[1]).read_text())
    print(json.dumps(compare_with_transformers(config).to_json()))  # noqa: T201


if __name__ == "__main__":
    main()
