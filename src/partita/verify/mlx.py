"""Verifying on MLX: a user's model, split over the ranks of the run, against itself unsplit."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from partita.checkpoint.find import find_model
from partita.core.mesh import Mesh
from partita.core.model_spec import read_config
from partita.errors import CheckpointError, ModelError
from partita.mlx.apply import plan_of
from partita.mlx.compare import compare, main_output, relative_error
from partita.mlx.generate import generate
from partita.mlx.groups import make_groups, single_groups
from partita.mlx.hub import build, describe
from partita.mlx.load import as_dtype, load, shard
from partita.mlx.probe import fill, sample_inputs
from partita.mlx.together import together
from partita.text import Sampling
from partita.verify.report import Report, Row

TOLERANCES = {mx.float64: 1e-6, mx.float32: 1e-4, mx.bfloat16: 0.05, mx.float16: 0.02}
"""Of outputs and gradients by dtype: models of mlx-lm narrow to float32 inside, whatever their dtype."""

NEW_TOKENS = 12


def verify(
    model: str | os.PathLike[str],
    *,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    layout: str | None = None,
    dtype: str = "float32",
) -> Report:
    """Compare the split model with the unsplit one: every module's output, every gradient, and generated tokens.

    Every rank of the run calls it. Over several stages it is the output and the tokens that are compared. A config without
    weights gets random ones.

    Args:
        model: A folder, a config file or a hub id.
        tp: Tensor parallel ranks.
        pp: Pipeline stages' ranks.
        dp: Replicas.
        layout: Which layers each stage runs.
        dtype: Of the weights that are not quantized.

    Returns:
        The report, the same on every rank.

    Raises:
        PartitaError: The model cannot be split so.
    """
    mesh = Mesh(dp, pp, tp)
    groups = make_groups(mesh)
    with together(groups):
        wanted = as_dtype(dtype) or mx.float32
        unsplit = _unsplit(find_model(model), wanted)
        inputs = sample_inputs(unsplit)
        try:
            mx.eval(main_output(unsplit(inputs)))
        except Exception as error:
            raise ModelError(f"mlx-lm itself does not run this model: {describe(error)}") from error
        whole = shard(copy.deepcopy(unsplit), groups=single_groups())
    split = shard(copy.deepcopy(unsplit), tp=tp, pp=pp, dp=dp, layout=layout, groups=groups)
    plan, _ = plan_of(split)
    tolerance = TOLERANCES[wanted]
    if pp == 1:
        rows = [Row(d.kind, d.name, d.error, tolerance) for d in compare(unsplit, split, plan, groups, inputs)]
    else:
        apart = relative_error(main_output(unsplit(inputs)), main_output(split(inputs)))
        rows = [Row("output", "the model", apart, tolerance)]
    rows += _tokens(whole, split, inputs)
    what = f"{type(unsplit).__name__} ({plan.spec.family}), {plan.spec.parameters:,} parameters, {dtype}, {mesh}, MLX"
    return Report(tuple(rows), what, False)


def _unsplit(folder: Path, dtype: Any) -> nn.Module:
    """The unsplit model with its own weights, or with random ones where there are none."""
    try:
        if folder.is_dir():
            return load(folder, dtype=dtype, groups=single_groups())
    except CheckpointError:
        if any(folder.glob("*.safetensors*")):
            raise
    mx.random.seed(0)
    return fill(build(read_config(folder)), dtype)


def _tokens(whole: nn.Module, split: nn.Module, ids: mx.array) -> list[Row]:
    """Whether both continue two prompts of different lengths, taken from `ids`, with the same tokens."""
    prompts: list[list[int]] = [ids[0, :6].tolist(), ids[1].tolist()]  # type: ignore[list-item]
    sampling = Sampling(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    try:
        expected = generate(whole, prompts, sampling)
    except ModelError:
        return []
    found = generate(split, prompts, sampling)
    return [
        Row("tokens", f"{len(prompt)} tokens continued by {NEW_TOKENS}", float(one.tokens != other.tokens), 0.5)
        for prompt, one, other in zip(prompts, expected, found, strict=True)
    ]
