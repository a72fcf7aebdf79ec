"""The examples run: on the shared ranks, and (slow) by the commands that their docstrings name."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from tests.support.ranks import on

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))


def run(name: str, *arguments: str) -> str:
    """Run an example in this process; what it printed."""
    given, sys.argv = sys.argv, [name, *arguments]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    finally:
        sys.argv = given
        if (engine := sys.modules.get("partita.torch")) is not None:
            engine.reset_parallelism()  # the ranks are shared with other tests
    return printed.getvalue()


def notebook_cells(name: str) -> list[str]:
    """The source of each code cell of a notebook."""
    notebook: Any = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_layout_and_schedule() -> None:
    printed = run("layout_and_schedule.py")
    assert "rank 0: decoder layers [[0], [3, 4]]" in printed
    assert "decoder (t): 8 expected, 6 found; add 2" in printed
    assert "zb-v: bubble 14.3%" in printed


def test_generate() -> None:
    first, second = on(2, run, "generate.py")
    assert "'The quick brown fox' -> 8 tokens, ended by length" in first
    assert second == ""


def test_peft_adapters(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    first, _ = on(2, run, "peft_adapters.py", str(tmp_path / "adapters"))
    assert f"saved to {tmp_path}/adapters" in first
    assert load_file(tmp_path / "adapters" / "adapter_model.safetensors")["base_model.model.lm_head.weight"].shape == (
        257,
        48,
    )


def test_own_training_loop_and_generate_from_its_model(tmp_path: Path) -> None:
    folder = str(tmp_path / "model")
    first, _ = on(2, run, "own_training_loop.py", folder)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", first)]
    assert losses[0] > 5
    assert losses[-1] < 3.6
    assert "'import ' -> 8 tokens" in on(2, run, "generate.py", folder, "import ")[0]


def test_trainer(tmp_path: Path) -> None:
    first, second = on(2, run, "trainer.py", str(tmp_path / "run"))
    assert float(re.findall(r"evaluation loss ([\d.]+)", first)[0]) < 5
    assert "evaluation loss" not in second
    assert (tmp_path / "run" / "checkpoint-10" / "optimizer" / "optimizer.safetensors").is_file()
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_own_loop_trains_alike_on_replicas(tmp_path: Path) -> None:
    printed = [on(size, run, "own_loop.py", str(tmp_path / str(size)))[0] for size in (2, 4)]
    # Both meshes take the same eight rows in each step, so that only rounding in float32 differs, which training enlarges.
    one, two = ([float(norm) for norm in re.findall(r"gradient norm ([\d.]+)", text)] for text in printed)
    assert len(one) == 2
    assert two == pytest.approx(one, rel=1e-2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_trl_sft(tmp_path: Path) -> None:
    first, second = on(2, run, "trl_sft.py", str(tmp_path / "run"))
    before, after = (float(loss) for loss in re.findall(r"loss ([\d.]+) -> ([\d.]+)", first)[0])
    assert after < before
    assert second.count("->") == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.fresh
def test_two_hosts(tmp_path: Path) -> None:
    """Both hosts are this machine, each with a torchrun of its own."""
    binaries = Path(sys.executable).parent
    environment = {
        **os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
        "MASTER_PORT": str(_free_port()),
    }  # fmt: skip
    hosts = [
        subprocess.Popen(
            ["sh", "examples/two_hosts.sh", str(number), "127.0.0.1", str(tmp_path / "two")],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    outputs = [host.communicate(timeout=100) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    assert "gradient norm" in outputs[0][0]
    assert outputs[1][0] == ""


def test_own_module() -> None:
    for rank, printed in enumerate(on(2, run, "own_module.py")):
        assert f"rank {rank} of 2: output and gradients equal" in printed


def test_mlx_generate() -> None:
    pytest.importorskip("mlx.core")
    from tests.support.mlx_ranks import on_mlx

    first, second = on_mlx(2, run, "mlx_generate.py")
    assert first.count("ended by length") == 2
    assert second == ""


def test_the_notebook_plans() -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        names: dict[str, Any] = {}
        for cell in notebook_cells("plan_and_verify.ipynb"):
            if "subprocess" not in cell:
                exec(compile(cell, "cell", "exec"), names)
    assert "rank 1 of pp 0" in printed.getvalue()


@pytest.mark.slow
@pytest.mark.fresh
def test_the_notebook_verifies() -> None:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        names: dict[str, Any] = {}
        for cell in notebook_cells("plan_and_verify.ipynb"):
            exec(compile(cell, "cell", "exec"), names)
    assert "Split equals unsplit" in printed.getvalue()


@pytest.mark.slow
@pytest.mark.fresh
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_command_of_the_docstring_runs(name: str, tmp_path: Path) -> None:
    """The first command of each docstring; its output goes to a folder of the test."""
    if name.startswith("mlx"):
        pytest.importorskip("mlx.core")
    docstring = (EXAMPLES / name).read_text(encoding="utf-8").split('"""')[1]
    line = next(line for line in docstring.splitlines() if f"examples/{name}" in line)
    words = shlex.split(re.sub(r"runs/\w+", str(tmp_path / "out"), line), comments=True)
    binaries = Path(sys.executable).parent
    environment = {
        **os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_each_example_says_how_it_is_run() -> None:
    for name in SCRIPTS:
        assert f"examples/{name}" in (EXAMPLES / name).read_text(encoding="utf-8").split('"""')[1]
