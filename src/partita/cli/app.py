"""The `partita` command: its sub-commands, and the handling of errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from partita import __version__
from partita.cli import launch
from partita.cli.answer_job import AnswerJob
from partita.cli.arguments.command import add_command
from partita.cli.chat import ChatOptions, chat, chat_server
from partita.cli.convert import ConvertOptions, convert
from partita.cli.demo import DemoOptions, demo
from partita.cli.generate import GenerateJob, GenerateOptions, generate
from partita.cli.job import Job
from partita.cli.layout import LayoutOptions, layout
from partita.cli.measure import MeasureJob, MeasureOptions, measure
from partita.cli.plan import PlanCommandOptions, plan
from partita.cli.reference import reference
from partita.cli.schedule import ScheduleOptions, schedule
from partita.cli.serve import ServeJob, ServeOptions, serve
from partita.cli.terminal import interrupt
from partita.cli.terminal.console import OutputClosed, examples, replace_unprintable
from partita.cli.terminal.failure import fail
from partita.cli.terminal.help import HelpGroup
from partita.cli.terminal.messages import routed
from partita.cli.train import TrainOptions, train
from partita.cli.train_job import TrainJob
from partita.cli.verify import VerifyJob, VerifyOptions, verify
from partita.ranks import rank_process, schedulers
from partita.ranks.failure import Failure


class _Commands(HelpGroup):
    """End a command that raised with one message and an exit code, and a traceback only with `--debug`."""

    def invoke(self, ctx: Any) -> Any:
        def run() -> Any:
            schedulers.adopt()
            return super(_Commands, self).invoke(ctx)

        return _guarded(run, debug=bool(ctx.params.get("debug")))


def _guarded(body: Callable[[], Any], *, debug: bool) -> Any:
    try:
        with routed(debug=debug):
            return body()
    except BaseException as error:
        _add_value(error)
        code = fail(error, debug=debug)
        if code is None:
            raise
        raise typer.Exit(code) from None


def _add_value(error: Any) -> None:
    """Add the given value to an error of typer that names only the expected values."""
    found: list[dict[str, Any]] = getattr(error.__cause__, "errors", list)()
    if found and hasattr(error, "message") and repr(given := found[0].get("input")) not in error.message:
        error.message = f"{error.message.rstrip('.')}, but is {given!r}."


app = typer.Typer(
    name="partita",
    cls=_Commands,
    help="Split any model over any devices, and prove that the split model equals the unsplit one.",
    epilog=examples(
        "partita demo",
        "partita plan meta-llama/Llama-3.1-8B --tp 4 --pp 2",
        'partita generate ./my-model "Once upon a time" --tp 2',
        "partita train --config config.json --data stdlib --tp 2 --out runs/first",
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"partita {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every command."""


add_command(
    app, layout, LayoutOptions, name="layout",
    epilog=examples('partita layout "Et*3|(tt|)*29,m|L" --pp 16', 'partita layout "E|t*8|t*8|L" --pp 2 --json'),
)  # fmt: skip
add_command(
    app, plan, PlanCommandOptions, name="plan",
    epilog=examples(
        "partita plan meta-llama/Llama-3.1-8B --tp 4",
        'partita plan config.json --tp 8 --pp 4 --layout "E(t*7|)*6t*7|t*10L"',
        "partita plan ./my-model --tp 3 --tensors",
        "partita plan ./my-model --tp 2 --save plan.json",
        "partita plan --plan plan.json",
        "partita plan ./my-model --ranks 64 --hardware h100 --batch-size 512 --sequence-length 4096",
        "partita plan ./my-model --for serve --ranks 8 --hardware h100 --sequences 64 --context 8192",
    ),
)  # fmt: skip
add_command(
    app, schedule, ScheduleOptions, name="schedule",
    epilog=examples(
        "partita schedule --kind 1f1b --pp 4 --microbatches 8",
        "partita schedule --kind zb-h1 --pp 8 --microbatches 24 --f 12 --b 11.5 --w 8 --comm 0.4 --picture zb-h1.svg",
        "partita schedule --kind interleaved-1f1b --pp 4 --vpp 2 --microbatches 8 --f 3,4,4,4,4,4,4,3 --json",
        "partita schedule --kind gpipe --pp 2 --microbatches 4 --csv > mine.csv",
        "partita schedule --from mine.csv",
    ),
)  # fmt: skip
add_command(
    app, measure, MeasureOptions, name="measure",
    epilog=examples("partita measure", "partita measure --ranks 4 --out machine.toml", "partita measure --ranks 1 --json"),
)  # fmt: skip
add_command(
    app, generate, GenerateOptions, name="generate",
    epilog=examples(
        'partita generate ./my-model "Once upon a time" --tp 2',
        'partita generate ./my-model "One" "Two" --tp 2 --temperature 0.8 --top-p 0.95 --seed 1 --json',
        'partita generate ./my-model "Hello" --plan plan.json',
        "partita generate ./my-model --prompts prompts.jsonl --out answers.jsonl --tp 2",
        'torchrun --nproc-per-node 4 -m partita generate ./my-model "Hello" --tp 4',
    ),
)  # fmt: skip
add_command(
    app, serve, ServeOptions, name="serve",
    epilog=examples(
        "partita serve ./my-model --tp 2",
        "partita serve ./my-model --pp 2 --host 0.0.0.0 --api-key secret --cache-bytes 8GiB",
    ),
)  # fmt: skip
add_command(
    app, chat, ChatOptions, name="chat",
    epilog=examples(
        "partita chat ./my-model --tp 2",
        'partita chat ./my-model --system "Answer in one sentence." --temperature 0.7',
        'echo "What is a fugue?" | partita chat ./my-model',
    ),
)  # fmt: skip
add_command(app, chat_server, ChatOptions, name="chat-server", hidden=True)
add_command(
    app, train, TrainOptions, name="train",
    epilog=examples(
        "partita train --config config.json --data stdlib --tp 2 --steps 200 --out runs/first",
        "partita train --model ./my-model --data texts/ --tp 2 --dp 2 --lora-rank 8 --out runs/tuned",
    ),
)  # fmt: skip
add_command(
    app, verify, VerifyOptions, name="verify",
    epilog=examples(
        "partita verify ./my-model --tp 2",
        "partita verify deepseek-ai/DeepSeek-V3 --tp 4",
        "partita verify config.json --tp 3 --dtype float32 --json",
    ),
)  # fmt: skip
add_command(
    app, convert, ConvertOptions, name="convert",
    epilog=examples(
        "partita convert model.Q4_K_M.gguf ./my-model --dtype bfloat16",
        "partita convert model-00001-of-00003.gguf ./my-model",
        "partita convert ./folder-with-pytorch_model.bin ./my-model",
    ),
)  # fmt: skip
add_command(
    app, demo, DemoOptions, name="demo", epilog=examples("partita demo", "partita demo --steps 400 --out runs/demo")
)  # fmt: skip
app.command("reference", hidden=True)(reference)

JOBS: dict[str, type[Job]] = {
    job.__name__: job for job in (AnswerJob, GenerateJob, MeasureJob, ServeJob, TrainJob, VerifyJob)
}
"""The jobs that a launcher sends to its ranks."""


def main() -> None:
    """Run the command line, or the job of a rank in a process that `run` started."""
    replace_unprintable()
    rank_process.attach()
    file = os.environ.pop(launch.JOB, None)
    if file is not None:
        _main_of_rank(file)
    try:
        app(prog_name="partita")
    except SystemExit as ended:
        if ended.code == Failure.INTERRUPTED:  # typer says nothing of one outside a command
            interrupt.say()
        raise
    except OutputClosed as error:  # of `partita --help`, which runs no command
        sys.exit(fail(error, debug=False))
    sys.exit(0)


def _main_of_rank(file: str) -> NoReturn:
    job, debug = launch.read_job(file, JOBS)
    try:
        code = _guarded(lambda: launch.work_together(job.work, job.request.engine, job.backend), debug=debug)
    except typer.Exit as ended:
        code = ended.exit_code
    sys.exit(code)
