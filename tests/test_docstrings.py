"""The examples of docstrings are true: in this process where they need no ranks, else on two ranks that share a folder."""

from __future__ import annotations

import doctest
import importlib
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import on

ALONE = (
    "partita.core.layout.layout", "partita.core.mesh", "partita.core.plan", "partita.core.sharding.rules",
    "partita.schedule.build", "partita.schedule.check", "partita.schedule.lower", "partita.schedule.simulate",
)  # fmt: skip
ON_RANKS = ("load", "shard", "fresh", "generate", "train", "save", "add_lora", "merge_lora")
TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 257, "hidden_size": 48,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip


@pytest.mark.parametrize("module", ALONE)
def test_examples_without_ranks(module: str) -> None:
    failed, attempted = doctest.testmod(importlib.import_module(module))
    assert (failed, attempted > 0) == (0, True)


def test_examples_on_ranks_of_torch(tmp_path: Path) -> None:
    for failures in on(2, _run_with_torch, str(tmp_path)):
        assert failures == ""


def test_examples_on_ranks_of_mlx(tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    from tests.support.mlx_ranks import on_mlx

    for failures in on_mlx(2, _run_with_mlx, str(tmp_path)):
        assert failures == ""


def _run_with_torch(folder: str) -> str:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import partita.torch as pt

    values = {
        "pt": pt, "ids": torch.arange(5)[None], "tokens": torch.arange(200) % 257,
        "unsplit": LlamaForCausalLM(LlamaConfig(**TINY)),
    }  # fmt: skip
    return _run(pt, folder, values)


def _run_with_mlx(folder: str) -> str:
    import mlx.core as mx

    import partita.mlx as pm
    from partita.mlx.model.mlx_lm_models import build

    mx.random.seed(0)
    values = {"pm": pm, "ids": mx.arange(5)[None], "tokens": [i % 257 for i in range(200)], "unsplit": build(TINY)}
    return _run(pm, folder, values)


def _run(engine: Any, folder: str, values: dict[str, Any]) -> str:
    """What went wrong in the examples of the engine's functions, which find these values and `folder/model`."""
    before = os.getcwd()
    os.chdir(folder)
    failures: list[str] = []
    try:
        engine.save(engine.fresh(TINY, tp=2), "./model")
        for name in ON_RANKS:
            (test,) = doctest.DocTestFinder(recurse=False).find(getattr(engine, name), name, globs=dict(values))
            assert test.examples, f"{name} has no example"
            doctest.DocTestRunner(verbose=False).run(test, out=failures.append)
    finally:
        os.chdir(before)
    return "".join(failures)
