"""Report to the user why a command failed."""

from __future__ import annotations

import contextlib
import os
import re
import time
from dataclasses import asdict

import typer

from partita.cli.terminal import interrupt
from partita.cli.terminal.console import OutputClosed, discard_output, err
from partita.cli.terminal.option_names import as_options
from partita.errors import DivergedError, PartitaError
from partita.ranks import environment, liveness, rank_process
from partita.ranks.failure import Failure
from partita.ranks.liveness import is_echo, wait_for_verdict

_OUT_OF_MEMORY = re.compile(r"can't allocate memory|unable to allocate|out of memory|bad_alloc", re.IGNORECASE)
_SERVING = ("starlette", "uvicorn", "pydantic", "prometheus_client", "llguidance", "anyio")
_MISSING_EXTRA = (
    *("torch", "transformers", "numpy", "safetensors", "tokenizers", "huggingface_hub", "peft", "mlx", "mlx_lm"),
    *_SERVING,
)


def explain(error: BaseException) -> Failure | None:
    """The failure that `error` stands for, or None for errors that typer handles (a usage error, an exit)."""
    if isinstance(error, PartitaError):
        echo, has_diverged = is_echo(error), isinstance(error, DivergedError)
        code = Failure.FAILED if echo or has_diverged else Failure.MISUSED
        return Failure(code, as_options(str(error)), echo, is_complete=has_diverged)
    if isinstance(error, KeyboardInterrupt):
        return Failure(Failure.INTERRUPTED, "interrupted")
    if isinstance(error, OutputClosed):
        return Failure(Failure.CLOSED, "the reader of its output has gone")
    if not isinstance(error, Exception) or isinstance(error, typer.Exit | typer.Abort) or hasattr(error, "exit_code"):
        return None
    if isinstance(error, ModuleNotFoundError) and (package := (error.name or "").split(".")[0]) in _MISSING_EXTRA:
        extra = "serve" if package in _SERVING else "mlx" if package.startswith("mlx") else "torch"
        return Failure(
            Failure.MISUSED, f"{error.name} is not installed, but this command needs it: pip install 'partita[{extra}]'"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return Failure(Failure.MISUSED, f"{os.fsdecode(error.filename)}: {error.strerror}")
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
        where = f" on rank {environment.number()}" if environment.is_one_of_several() else ""
        what = f" ({' '.join(str(error).split())[:160]})" if str(error) else ""
        return Failure(
            Failure.MISUSED,
            f"out of memory{where}{what}. Split the model over more ranks (--tp, --pp), or use smaller batches, shorter "
            "sequences or a narrower --dtype; `partita plan` shows the bytes that each rank holds.",
        )
    message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return Failure(Failure.FAILED, message, is_echo(error))


def fail(error: BaseException, *, debug: bool = False) -> int | None:
    """Print the failure, or report it to the launcher. Returns the exit code, or None where `explain` returns None.

    Where there are several ranks this does not return: it ends the process.
    """
    failure = explain(error)
    if failure is None:
        if hasattr(error, "format_message"):  # a usage error, which typer prints
            _let_first_rank_speak()
        return None
    if failure.code == Failure.CLOSED:
        discard_output()
    elif debug and failure.code != Failure.INTERRUPTED:
        import traceback

        traceback.print_exception(type(error), error, error.__traceback__)
    if failure.echo:
        wait_for_verdict()
    _let_first_rank_speak()
    rank_process.report(asdict(failure))
    if not rank_process.is_ours():
        show(failure, debug=debug, who=environment.name())
    liveness.failure_was_printed()
    rank_process.leave(failure.code)
    return failure.code


def _let_first_rank_speak() -> None:
    """Before the ranks are connected, wait until the first rank of this machine has printed an error that all ranks share.

    Its end ends this process, except under srun. If it does not end, the error is this rank's own, and this call returns.
    """
    if rank_process.is_ours() or environment.speaks():
        return
    time.sleep(liveness.VERDICT_S)
    if environment.launcher() == "srun":
        os._exit(Failure.MISUSED)


def show(failure: Failure, *, debug: bool = False, who: str = "", detail: str = "") -> None:
    """Print a failure on stderr, unless it only means that the reader of the output has gone.

    Args:
        failure: The failure.
        debug: Whether a traceback has already been printed.
        who: The rank that failed, if the failure is that of one rank.
        detail: The last lines that this rank wrote to stderr.
    """
    if failure.code == Failure.CLOSED:
        return
    with contextlib.suppress(OutputClosed):
        _print(failure, debug, who, detail)


def _print(failure: Failure, debug: bool, who: str, detail: str) -> None:
    from rich.text import Text

    if detail:
        err().print(Text(detail.rstrip("\n"), style="dim"), soft_wrap=True)
    label = "error"
    if failure.code == Failure.INTERRUPTED:
        label = "interrupted"
        interrupt.was_said()
    text = Text(f"{label}", style="bold red")
    if label == "error":
        text.append(": ", style="bold red")
        text.append(f"{who}: {failure.message}" if who else failure.message, style="not bold default")
    err().print(text, soft_wrap=True)
    if failure.code == Failure.FAILED and not (debug or failure.echo or failure.is_complete):
        err().print(Text("`partita --debug ...` shows where it was raised.", style="dim"), soft_wrap=True)
