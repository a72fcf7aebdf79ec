"""A run that trains multi-token prediction was resumed without `--layout`: its prediction layer and loss term were gone.

Now a resumed run has the layout of the command that began it unless the command line gives one, and a model that leaves out
what the run trained is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from partita.checkpoint.run_folder import RunFolder
from partita.cli import main
from partita.errors import CheckpointError
from partita.generation import load_tokenizer
from partita.torch.load import load
from partita.torch.train import train
from partita.training.data.texts import read_ids
from partita.training.saving import Saves
from partita.training.state import read_state
from tests.cli.conftest import Run, partita  # noqa: F401
from tests.cli.models import TINY, write
from tests.support.ranks import ROOT, ranks

LEFT_OUT = r"the run trained model\.layers\.2\.(eh_proj|embed_tokens)\.weight and \d+ more, which the model leaves out"


def begin(folder: Path, *options: str) -> list[str]:
    """A run of 4 steps that trains one prediction layer, with checkpoints at 2 and 4."""
    (folder / "text.txt").write_text("import sys\nimport os\nprint(os.getcwd(), sys.argv)\n" * 60)
    config = write(folder, {**TINY, "num_nextn_predict_layers": 1})
    return [
        "train", "--config", config, "--data", str(folder / "text.txt"), "--batch-size", "4", "--sequence-length", "16",
        "--steps", "4", "--save-every", "2", "--out", str(folder / "run"), *options,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("begun")
    before = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["partita", *begin(folder, "--layout", "EttmL", "--microbatches", "2")])
        with pytest.raises(SystemExit) as ended:
            main()
    for name in os.environ.keys() - before.keys():
        del os.environ[name]  # one rank alone sets what a launcher would have set
    assert not ended.value.code
    return folder / "run"


def start(arguments: list[str]) -> dict[str, Any]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    line = [sys.executable, "-m", "partita", *arguments, "--json"]
    ended = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=110)
    assert ended.returncode == 0, ended.stderr
    return dict(json.loads(ended.stdout))


def stopped(begun: Path, folder: Path) -> Path:
    """The run as it was after two steps."""
    shutil.copytree(begun, folder / "run", symlinks=True)
    shutil.rmtree(folder / "run" / "step-000004")
    (folder / "run" / "latest").unlink()
    return folder / "run"


def names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def digest(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}


@pytest.mark.fresh
def test_a_resumed_run_has_its_own_layout(partita: Run, begun: Path, tmp_path: Path) -> None:  # noqa: F811
    run = stopped(begun, tmp_path)
    said = partita("train", "--resume", "--out", str(run), "--json")
    assert said.code == 0, said.err
    last = "step-000004"
    assert "model.layers.2.eh_proj.weight" in names(run / last)
    assert names(run / last) == names(begun / last)
    assert digest(run / last) == digest(begun / last)
    config = json.loads((run / last / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1


@pytest.mark.fresh
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--microbatches 2", LEFT_OUT),
        ("--microbatches 2 --engine mlx", LEFT_OUT),
        ("--engine mlx", r"mlx-lm's models have no multi-token prediction\. Leave `m` out of the layout\."),
    ],
)
def test_a_layout_that_leaves_out_what_was_trained_is_refused(
    options: str,
    message: str,
    partita: Run,  # noqa: F811
    begun: Path,
    tmp_path: Path,
) -> None:
    if "mlx" in options:
        pytest.importorskip("mlx_lm")
    run = stopped(begun, tmp_path)
    said = partita("train", "--resume", "--out", str(run), *options.split())
    assert said.code == 2
    assert re.search(message, said.err), said.err
    assert RunFolder(run).steps() == [2]


def refused(source: str, text: str, folder: str) -> str:
    """What a rank of two stages says that resumes without the prediction layer."""
    tokens = torch.from_numpy(read_ids(text, load_tokenizer(Path(source))))
    settings = replace(read_state(Path(source)).settings, microbatches=2)
    try:
        train(load(source, pp=2, layout="Et|tL"), tokens, settings, saves=Saves(Path(folder)), resume=source)
    except CheckpointError as error:
        return str(error)
    return ""


def test_two_stages_that_leave_it_out_are_refused(begun: Path, tmp_path: Path) -> None:
    source, text = begun / "step-000002", begun.parent / "text.txt"
    for said in ranks(2).run(refused, str(source), str(text), str(tmp_path / "other")):
        assert re.search(LEFT_OUT, said), said
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_the_mesh_is_the_runs_own_too(tmp_path: Path) -> None:
    """Two stages of two replicas go on as such, bit for bit, and as one rank where the command says so."""
    whole = start(begin(tmp_path, "--pp", "2", "--dp", "2", "--layout", "Ett|mL", "--microbatches", "2"))
    assert whole["mesh"] == {"dp": 2, "pp": 2, "tp": 1}
    (tmp_path / "again").mkdir()
    run = stopped(tmp_path / "run", tmp_path / "again")
    assert start(["train", "--resume", "--out", str(run)])["mesh"] == whole["mesh"]
    assert digest(run / "step-000004") == digest(tmp_path / "run" / "step-000004")
    (tmp_path / "alone").mkdir()
    alone = stopped(tmp_path / "run", tmp_path / "alone")
    found = start(["train", "--resume", "--out", str(alone), "--layout", "EttmL"])
    assert found["mesh"] == {"dp": 1, "pp": 1, "tp": 1}
    assert found["loss"] == pytest.approx(whole["loss"], rel=1e-5)
