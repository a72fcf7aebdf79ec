"""Malformed weights, through every door that opens a checkpoint: each refuses each file, in one line that names it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from partita import CheckpointError, spec_from_checkpoint
from tests.bad_input.models import LLAMA, QUERY, weights, write
from tests.bad_input.table import ENGINES, error_of, holds
from tests.checkpoint.test_header import MALFORMED
from tests.checkpoint.test_index import WRONG
from tests.cli.conftest import Run

Break = Callable[[Path], Any]


def load(engine: str) -> Callable[[Path], Any]:
    return importlib.import_module(f"partita.{engine}").load


def by_command(run: Run, engine: str) -> Callable[[Path], Any]:
    """`partita generate` as a door: its error as an exception."""

    def open_it(folder: Path) -> None:
        said = run("generate", str(folder), "hi", "--max-new-tokens", "1", "--engine", engine)
        assert said.code in (0, 2), said.err
        if said.code == 2:
            raise CheckpointError(error_of(said).removeprefix("error: "))

    return open_it


def doors(run: Run) -> dict[str, Callable[[Path], Any]]:
    """What opens a checkpoint."""
    loads = {f"partita.{engine}.load": load(engine) for engine in ENGINES}
    # Whatever the engine, the command looks at the files before it begins with one.
    return {"spec_from_checkpoint": spec_from_checkpoint, **loads, "partita generate": by_command(run, ENGINES[0])}


def refused_by_all(folder: Path, says: str, run: Run) -> None:
    for door, open_it in doors(run).items():
        with pytest.raises(CheckpointError) as caught:
            open_it(folder)
        text = str(caught.value)
        assert text.startswith(str(folder)), door
        assert says in text, door
        assert "\n" not in text, door


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_file(kind: str, tmp_path: Path, partita: Run) -> None:
    content, says = MALFORMED[kind]
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model.safetensors").write_bytes(content)
    refused_by_all(tmp_path, says, partita)


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_index(kind: str, tmp_path: Path, partita: Run) -> None:
    make, says = WRONG[kind]
    folder = tmp_path / "model"
    folder.mkdir()
    make(folder)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    refused_by_all(folder, says, partita)


def changed(**tensors: Any) -> dict[str, Any]:
    """The weights of a model, changed: None for a tensor that is left out."""
    made = {**weights(), **{QUERY if name == "query" else name: array for name, array in tensors.items()}}
    return {name: array for name, array in made.items() if array is not None}


OTHER: dict[str, tuple[dict[str, Any], str]] = {
    "no tensors": ({}, "tensor model.embed_tokens.weight of the model is not in"),
    "a tensor left out": (changed(query=None), f"tensor {QUERY} of the model is not in"),
    "narrower": (changed(query=np.zeros((32, 16), np.float32)), f"tensor {QUERY} has the shape (32, 16) in"),
    "a dimension more": (changed(query=np.zeros((32, 32, 1), np.float32)), "has the shape (32, 32, 1) in"),
    "a dimension fewer": (changed(query=np.zeros(1024, np.float32)), "has the shape (1024,) in"),
    "one number": (changed(query=np.zeros((), np.float32)), "has the shape () in"),
    "of no elements": (changed(query=np.zeros((0, 32), np.float32)), "has the shape (0, 32) in"),
    "small integers": (changed(query=np.zeros((32, 32), np.int8)), "without its scales"),
    "large integers": (changed(query=np.zeros((32, 32), np.int64)), "without its scales"),
    "truth values": (changed(query=np.zeros((32, 32), bool)), "without its scales"),
    "a bias of none": (changed(**{QUERY.replace("weight", "bias"): np.zeros(32, np.float32)}), "q_proj.bias"),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", OTHER)
def test_weights_of_another_model(kind: str, engine: str, tmp_path: Path, partita: Run) -> None:
    tensors, says = OTHER[kind]
    folder = write(tmp_path / "model", LLAMA, tensors)
    for open_it in (load(engine), by_command(partita, engine)):
        with pytest.raises(CheckpointError if kind != "a bias of none" else ValueError) as caught:
            open_it(folder)
        assert holds(str(caught.value), says)
        assert str(folder) in str(caught.value) or "in the checkpoint" in str(caught.value)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_model_that_is_broken_here_is_whole(engine: str, tmp_path: Path, partita: Run) -> None:
    assert (
        partita("generate", str(write(tmp_path / "model")), "hi", "--max-new-tokens", "1", "--engine", engine).code == 0
    )
