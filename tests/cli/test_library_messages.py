"""Commands write their own lines only: no message of a library reaches the text, the progress or the report."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from partita.cli.terminal import messages
from tests.cli.conftest import Run
from tests.support.models import CONFIGS, UNMEASURED
from tests.support.ranks import ROOT

OURS = re.compile(
    r"note: .+"
    r"|\d+ tokens? in [\d.]+ s on one rank, the first after [\d.]+ s(, then [\d.]+ tokens/s)?, prompt [\d.]+ tokens/s"
    r"|loaded in [\d.]+ s, peak memory [\d.]+ [KMGT]iB"
    r"|\w+: [\d.]+ \w* ?parameters on one rank, .*tokens of text.*"
    r"|step \d+/\d+  loss .*"
)
"""The lines that commands write to stderr."""

KERNELS: dict[str, Any] = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
"""A family of which transformers says, as its first token is computed, which kernels are not installed."""

FAMILIES = {"gpt2": CONFIGS["gpt2"], "mixtral": CONFIGS["mixtral"], "mamba": KERNELS}
NO_DECODERS = ("bert", "t5", "umt5")
MORE = {name: config for name, config in {**CONFIGS, **UNMEASURED}.items() if not name.startswith(NO_DECODERS)}
# The grouped kernels of transformers' own model take rows of whole 16 bytes.
MORE["gpt-oss"] = {**MORE["gpt-oss"], "intermediate_size": 40}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {}


def folder_of(name: str, config: dict[str, Any], folders: dict[str, Path], factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small model, written by transformers."""
    if name not in folders:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging as library

        library.disable_progress_bar()
        made = {**config, "vocab_size": 257}
        made.pop("architectures", None)
        folders[name] = factory.mktemp(name)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**made)).save_pretrained(folders[name])
        library.enable_progress_bar()
        forget_messages()
    return folders[name]


def forget_messages() -> None:
    """Let transformers repeat what it says once in a process."""
    from transformers.utils import logging as library

    for function in (library.warning_once, library.info_once):
        function.cache_clear()  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def as_for_users() -> Iterator[None]:
    """Warnings are shown, and what a library says once can be said again."""
    forget_messages()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        yield


def commands(folder: Path, tmp_path: Path) -> Iterator[tuple[str, ...]]:
    text = tmp_path / "text.txt"
    text.write_text("All work and no play makes Jack a dull boy. " * 60)
    yield ("generate", str(folder), "hello", "--max-new-tokens", "3")
    yield ("verify", str(folder), "--tp", "1", "--dtype", "float32")
    yield ("plan", str(folder))
    yield (
        "train", "--model", str(folder), "--data", str(text), "--steps", "1", "--batch-size", "2", "--sequence-length",
        "8", "--out", str(tmp_path / "out"),
    )  # fmt: skip


def strange_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip() and not OURS.fullmatch(line.strip())]


def check(folder: Path, partita: Run, tmp_path: Path) -> None:
    for command in commands(folder, tmp_path):
        said = partita(*command)
        assert said.code == 0, said.err
        assert strange_lines(said.err) == [], command[0]
        assert "transformers" not in said.out.replace(str(folder), "")
        assert "Warning" not in said.out
        if command[0] == "generate":
            written = json.loads(partita(*command, "--json").out)["generations"][0]["text"]
            assert said.out == f"hello{written}\n"


@pytest.mark.parametrize("name", FAMILIES)
def test_commands_write_their_own_lines_only(
    name: str, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, partita: Run, tmp_path: Path
) -> None:
    check(folder_of(name, FAMILIES[name], folders, tmp_path_factory), partita, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_commands_write_their_own_lines_only_for_every_family(
    name: str, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, partita: Run, tmp_path: Path
) -> None:
    check(folder_of(name, MORE[name], folders, tmp_path_factory), partita, tmp_path)


@pytest.mark.fresh
def test_two_ranks_of_processes_of_their_own_write_their_own_lines_only(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = folder_of("mamba", KERNELS, folders, tmp_path_factory)
    command = [sys.executable, "-m", "partita", "generate", str(folder), "hello", "--max-new-tokens", "3", "--pp", "2"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert said.returncode == 0, said.stderr
    assert [line.split(",")[0].split(" in ")[0] for line in said.stderr.splitlines()] == ["3 tokens", "loaded"]


def test_mlx_writes_its_own_lines_only(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, partita: Run
) -> None:
    pytest.importorskip("mlx_lm")
    folder = folder_of("llama", CONFIGS["llama-7-heads-1-kv"], folders, tmp_path_factory)
    command = ("generate", str(folder), "hello", "--max-new-tokens", "3", "--engine", "mlx")
    said = partita(*command)
    assert said.code == 0, said.err
    assert strange_lines(said.err) == []
    assert said.out == f"hello{json.loads(partita(*command, '--json').out)['generations'][0]['text']}\n"


def test_what_transformers_finds_in_the_config_is_a_line_of_ours(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, partita: Run
) -> None:
    # GPT-2's usual end token is not in this vocabulary.
    folder = folder_of("gpt2", FAMILIES["gpt2"], folders, tmp_path_factory)
    said = partita("generate", str(folder), "hello", "--max-new-tokens", "3")
    notes = [line for line in said.err.splitlines() if line.startswith("note: ")]
    assert len(notes) == len(set(notes)) == 2
    for name, note in zip(("bos", "eos"), notes, strict=True):
        assert note.startswith(
            f"note: transformers: Model config: {name}_token_id must be `None` or an integer within the"
        )


# --- which messages are shown, and when -------------------------------------------------------------------------------


@pytest.fixture
def routed(capfd: pytest.CaptureFixture[str]) -> Iterator[pytest.CaptureFixture[str]]:
    from partita.cli.terminal import console

    console._console.cache_clear()
    with messages.routed():
        yield capfd
    console._console.cache_clear()


def test_warnings_for_developers_are_dropped(routed: pytest.CaptureFixture[str]) -> None:
    for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning, ResourceWarning):
        warnings.warn("`old` is gone", category, stacklevel=1)
    warnings.warn("`TypedStorage` is deprecated", UserWarning, stacklevel=1)
    logging.getLogger("transformers.integrations.moe").warning("falling back to its reference implementation")
    logging.getLogger("huggingface_hub.file_download").warning("`resume_download` is deprecated")
    assert routed.readouterr().err == ""


def test_warnings_for_users_are_shown_once_in_one_line(routed: pytest.CaptureFixture[str]) -> None:
    messages.adopt_all()
    for _ in range(2):
        warnings.warn_explicit("the driver is\ntoo old", UserWarning, "/x/site-packages/torch/cuda/__init__.py", 1)
        logging.getLogger("transformers.tokenization_utils_base").warning("an incorrect regex pattern")
        logging.getLogger("transformers.modeling_utils").error("an error is always shown")
        logging.getLogger("huggingface_hub.utils").warning("a" * 300)
        logging.getLogger("partita").warning("the weights are %s", "float32")
    assert routed.readouterr().err.splitlines() == [
        "note: torch: the driver is too old",
        "note: transformers: an incorrect regex pattern",
        "note: transformers: an error is always shown",
        f"note: huggingface_hub: {'a' * 240}...",
        "note: the weights are float32",
    ]


def test_what_comes_while_text_is_streamed_waits(routed: pytest.CaptureFixture[str]) -> None:
    messages.hold()
    logging.getLogger("partita").warning("first")
    logging.getLogger("partita").warning("second")
    assert routed.readouterr().err == ""
    messages.release()
    logging.getLogger("partita").warning("third")
    assert routed.readouterr().err.splitlines() == ["note: first", "note: second", "note: third"]


def test_afterwards_and_with_debug_all_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    library, root = logging.getLogger("transformers"), logging.getLogger()

    before = (list(library.handlers), library.propagate, list(root.handlers), warnings.showwarning)
    with messages.routed():
        messages.adopt_all()
        assert (library.handlers, library.propagate) == ([], True)
        assert warnings.showwarning is not before[3]
    assert (list(library.handlers), library.propagate, list(root.handlers), warnings.showwarning) == before
    with messages.routed(debug=True):
        messages.adopt_all()
        assert (list(library.handlers), library.propagate, list(root.handlers), warnings.showwarning) == before
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    with messages.routed():
        messages.adopt_all()
        assert (list(library.handlers), library.propagate) == before[:2]
