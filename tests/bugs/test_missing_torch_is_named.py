"""Without torch, `demo` failed after its plan, and the error for an unknown family named transformers, which was installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ranks import ROOT

pytestmark = [pytest.mark.fresh, pytest.mark.timeout(300)]

WITHOUT_TORCH = """
import importlib.util, sys

found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] == "torch" else found(name, package)
sys.modules["torch"] = None
"""
"""A sitecustomize.py: every process of the command imports it at its start."""

HELIUM = {
    "architectures": ["HeliumForCausalLM"], "model_type": "helium", "hidden_size": 32, "num_hidden_layers": 4,
    "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6,
    "vocab_size": 257, "attention_bias": False, "mlp_bias": False, "max_position_embeddings": 256, "rope_theta": 1e4,
    "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip
"""A family of mlx-lm and transformers that has no table in `partita.core.model.families`."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(WITHOUT_TORCH)
    (tmp_path / "config.json").write_text(json.dumps(HELIUM))
    return tmp_path


def without_torch(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(folder / "site"), str(ROOT / "src")])
    return subprocess.run(
        [sys.executable, "-m", "partita", *command], cwd=folder, env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip


def test_the_demo_says_at_once_what_to_install(folder: Path) -> None:
    ended = without_torch(folder, "demo")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: torch is not installed, but this command needs it: pip install 'partita[torch]'\n"
    assert not (folder / "runs").exists()


def test_the_plan_of_an_unknown_family(folder: Path) -> None:
    ended = without_torch(folder, "plan", "config.json", "--pp", "2", "--engine", "torch")
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "torch" in ended.stderr
    assert "transformers is not installed" not in ended.stderr


@pytest.mark.slow
def test_mlx_splits_an_unknown_family_into_virtual_stages(folder: Path) -> None:
    ended = without_torch(folder, "verify", "config.json", "--engine", "mlx", "--pp", "2", "--vpp", "2")
    assert ended.returncode == 0, ended.stderr
    assert "Split equals unsplit in " in ended.stdout
