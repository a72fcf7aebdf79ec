"""`partita generate`: continue texts with a model split over ranks."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from partita.checkpoint.find import find_model, is_local
from partita.checkpoint.index import open_checkpoint
from partita.cli import launch
from partita.cli.answer_job import AnswerJob
from partita.cli.arguments import inputs
from partita.cli.arguments.auto import PROMPT, planned
from partita.cli.arguments.engine import choose_engine
from partita.cli.arguments.model import (
    plan_early,
    read_tokenizer,
    refuse_compile,
    refuse_context,
    refuse_device,
    refuse_experts_over_replicas,
    request_of,
)
from partita.cli.arguments.options import (
    OUTPUT,
    WEIGHTS,
    Auto,
    ModelArgument,
    NoVerify,
    PlanOptions,
    RunOptions,
    WeightsDtype,
)
from partita.cli.arguments.serving import CacheBytes, ExactRows, MaxSequences, PrefillChunk
from partita.cli.job import Job, compile_layers
from partita.cli.terminal.console import err, mesh_name, out, plural, print_json, size, write
from partita.cli.terminal.messages import hold, release
from partita.cli.terminal.progress import loading
from partita.core.mesh import Mesh
from partita.core.plan import Plan
from partita.core.request import PlanRequest
from partita.cost.work import Work
from partita.engine import open_engine
from partita.errors import ModelError, PlanError
from partita.generation import Generation, GenerationReport, Sampling, Tokenizer
from partita.notes import note
from partita.ranks import environment
from partita.serving import ServeSettings
from partita.serving.prompt_lines import PromptLines

SAMPLING, TEXT, MANY = "Sampling", "Text", "A file of prompts"
"""Panels of options in `--help`."""


@dataclass(frozen=True, kw_only=True)
class TextOptions(PlanOptions):
    """Options for the texts to continue, and for choosing their tokens."""

    model: ModelArgument
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT...", help="Texts to continue.", show_default=False)
    ] = None
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Generate at most this many tokens (default: the model's limit, else 64).",
            show_default=False,
            rich_help_panel=TEXT,
        ),
    ] = None
    prompt_file: Annotated[
        list[Path] | None,
        typer.Option(
            "--prompt-file",
            metavar="FILE",
            help="Read a prompt from this file, or from standard input (`-`). Repeatable.",
            parser=inputs.existing_file,
            show_default=False,
            rich_help_panel=TEXT,
        ),
    ] = None
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Sample at this temperature; 0 chooses greedily (default: the model's generation_config.json, "
            "else greedily).",
            rich_help_panel=SAMPLING,
            show_default=False,
        ),
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Sample only from the K most likely tokens; 0 for all (default: the model's, else 50).",
            rich_help_panel=SAMPLING,
            show_default=False,
        ),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Sample only from the most likely tokens with this total probability (default: the model's, else 1).",
            rich_help_panel=SAMPLING,
            show_default=False,
        ),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Sample only from tokens at least this likely, relative to the most likely token (default: the "
            "model's, else 0).",
            rich_help_panel=SAMPLING,
            show_default=False,
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Make tokens that have appeared less likely; 1 has no effect (default: the model's, else 1).",
            rich_help_panel=SAMPLING,
            show_default=False,
        ),
    ] = None
    no_repeat_ngram_size: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Never repeat a sequence of this many tokens; 0 disables this (default: the model's, else 0).",
            rich_help_panel=SAMPLING,
            show_default=False,
        ),
    ] = None
    min_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Generate at least this many tokens (default: the model's, else 0).",
            rich_help_panel=SAMPLING,
            show_default=False,
        ),
    ] = None
    presence_penalty: Annotated[
        float,
        typer.Option(help="Subtract this from the logits of tokens that have appeared.", rich_help_panel=SAMPLING),
    ] = 0.0
    frequency_penalty: Annotated[
        float,
        typer.Option(
            help="Subtract this from a token's logit for each time that it has appeared.", rich_help_panel=SAMPLING
        ),
    ] = 0.0
    penalty_window: Annotated[
        int,
        typer.Option(min=0, help="Count only the last N tokens for penalties; 0 for all.", rich_help_panel=SAMPLING),
    ] = 0
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(
            "--logit-bias",
            metavar="ID=VALUE",
            help="Add a value to the logit of a token id. Repeatable.",
            rich_help_panel=SAMPLING,
            show_default=False,
        ),
    ] = None
    xtc_probability: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Exclude the most likely tokens with this probability when sampling (XTC).",
            rich_help_panel=SAMPLING,
        ),
    ] = 0.0
    xtc_threshold: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=0.5,
            help="Let XTC exclude all but the least likely of the tokens above this probability.",
            rich_help_panel=SAMPLING,
        ),
    ] = 0.1
    no_generation_config: Annotated[
        bool,
        typer.Option(
            "--no-generation-config",
            help="Read only the end tokens from the model's generation_config.json.",
            rich_help_panel=SAMPLING,
        ),
    ] = False
    seed: Annotated[int, typer.Option(help="Sampling seed.", rich_help_panel=SAMPLING)] = 0
    stop: Annotated[
        list[str] | None,
        typer.Option(
            "--stop",
            metavar="TEXT",
            help="Stop generating at this text. Repeatable.",
            show_default=False,
            rich_help_panel=TEXT,
        ),
    ] = None
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Continue past the model's end token.", rich_help_panel=TEXT)
    ] = False
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Apply the model's chat template to each prompt, as a user's message.", rich_help_panel=TEXT
        ),
    ] = False
    system: Annotated[
        str | None,
        typer.Option(
            "--system",
            metavar="TEXT",
            help="With --chat: put this system message first.",
            show_default=False,
            rich_help_panel=TEXT,
        ),
    ] = None
    adapters: Annotated[
        Path | None,
        typer.Option(
            "--adapters",
            metavar="DIR",
            help="Apply LoRA adapters in peft's format, or those of a run of `train --lora-rank`.",
            exists=True,
            file_okay=False,
            show_default=False,
            rich_help_panel=WEIGHTS,
        ),
    ] = None
    no_verify: NoVerify = False
    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile each layer with torch.compile when it first runs. Needs a C++ compiler.",
            rich_help_panel=WEIGHTS,
        ),
    ] = False
    dtype: WeightsDtype = None


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(RunOptions, TextOptions):
    """The options of `partita generate`."""

    auto: Auto = False
    many: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help='Answer every line of a JSONL file, `{"prompt": ...}` or `{"messages": [...]}`, many at once; a line may set '
            "max_tokens, temperature, seed, stop and the other settings for itself.",
            show_default=False,
            rich_help_panel=MANY,
        ),
    ] = None
    answers: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Write the answers of --prompts to this JSONL file. Run the command again to continue an interrupted run.",
            show_default=False,
            rich_help_panel=MANY,
        ),
    ] = None
    max_sequences: MaxSequences = 16
    prefill_chunk: PrefillChunk = 256
    cache_bytes: CacheBytes = None
    exact_rows: ExactRows = False
    no_stream: Annotated[
        bool, typer.Option("--no-stream", help="Print each text only when it is complete.", rich_help_panel=OUTPUT)
    ] = False


def generate(options: GenerateOptions) -> None:
    """Continue one or several texts with a model split over ranks. Every layout generates the same tokens."""
    if options.many is not None or options.answers is not None:
        _answer_all(options)
    texts = [_read_prompt(Path("-"), "the prompt") if text == "-" else text for text in options.prompts or []]
    texts += [_read_prompt(file) for file in options.prompt_file or []]
    if not texts:
        raise ModelError(
            'there is no prompt. Give one after the model ("Once upon a time"), with --prompt-file or with --prompts.'
        )
    for place, text in enumerate(texts):
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ModelError(f"prompt {place} is not UTF-8 text: {text!a:.60}.")
    request, plan = _planned(options, sequences=len(texts))
    launch.run(
        GenerateJob(
            request=request, plan=plan, backend=options.backend, device=options.device, texts=texts,
            sampling=_sampling(options), chat=options.chat, system=options.system, adapters=options.adapters,
            compile=options.compile, verify=not options.no_verify, as_json=options.as_json,
            stream=not options.no_stream and not options.as_json and len(texts) == 1,
        )
    )  # fmt: skip


def _answer_all(options: GenerateOptions) -> NoReturn:
    """Answer the prompts of a file."""
    if options.many is None or options.answers is None:
        given, other = ("--prompts", "--out") if options.answers is None else ("--out", "--prompts")
        raise ModelError(
            f"{given} needs {other}: --prompts names the file of prompts, --out the file of their answers."
        )
    if options.prompts or options.prompt_file:
        raise ModelError("--prompts takes all prompts from its file. Leave the others out, or put them into the file.")
    if options.compile:
        raise ModelError("--compile does not work with --prompts. Leave one of them out.")
    request, plan = _planned(options, sequences=options.max_sequences)
    if environment.is_first():
        if str(options.many) in inputs.STDIN or inputs.is_stream(options.many):
            raise ModelError(f"--prompts {options.many} must be a file, since a run that continues reads it again.")
        PromptLines(options.many, _sampling(options))
        if not options.answers.parent.is_dir():
            raise ModelError(f"--out {options.answers}: there is no folder {options.answers.parent}. Create it.")
        if options.answers.exists() and (not options.answers.is_file() or options.answers.samefile(options.many)):
            raise ModelError(f"--out {options.answers} must be a file for the answers alone. Give another name.")
    launch.run(
        AnswerJob(
            request=request, plan=plan, backend=options.backend, device=options.device, prompts=options.many,
            answers=options.answers, sampling=_sampling(options), chat=options.chat, system=options.system,
            adapters=options.adapters, verify=not options.no_verify, as_json=options.as_json,
            settings=_settings(options),
        )
    )  # fmt: skip


def _planned(options: GenerateOptions, sequences: int) -> tuple[PlanRequest, Plan | None]:
    """What is asked of the plan, and the plan if it is known before the ranks start; what is wrong is refused."""
    if options.system is not None and not options.chat:
        raise ModelError("--system is a message of a chat. Give --chat, or leave it out.")
    name = choose_engine(options.engine)
    request, given = request_of(options.model, options, engine=name, trust_remote_code=options.trust_remote_code)
    request = replace(request, dtype=options.dtype and options.dtype.value)
    work = Work(
        purpose="generate", sequences=sequences, sequence_length=PROMPT, context=PROMPT + (options.max_new_tokens or PROMPT),
        dtype=request.dtype,
    )  # fmt: skip
    request, given = planned(request, given, options, work, auto=options.auto)
    plan = plan_early(request, given)
    if options.many is not None:
        refuse_experts_over_replicas(request)
        refuse_context(request, _settings(options))
    if options.compile and request.mesh.cp > 1:
        raise PlanError(f"--compile does not work with --cp {request.mesh.cp}. Leave one of them out.")
    refuse_device(name, options.device)
    if options.compile:
        refuse_compile(name)
    if is_local(options.model):
        open_checkpoint(find_model(options.model))
    if options.adapters is not None:
        from partita.training.adapter_files import check_readable, find_adapters
        from partita.training.adapter_patterns import read_adapter_config

        (read_adapter_config if request.engine == "mlx" else check_readable)(find_adapters(options.adapters))
    return request, plan


def _settings(options: GenerateOptions) -> ServeSettings:
    return ServeSettings(
        options.max_sequences, options.prefill_chunk, options.cache_bytes, exact_rows=options.exact_rows
    )


def _sampling(options: TextOptions) -> Sampling:
    names = {field.name for field in fields(Sampling)} & {field.name for field in fields(options)} - {
        "stop",
        "logit_bias",
    }
    return Sampling(
        **{name: getattr(options, name) for name in names}, stop=tuple(options.stop or ()),
        logit_bias=_biases(options.logit_bias or []), use_generation_config=not options.no_generation_config,
    )  # fmt: skip


@dataclass(kw_only=True)
class GenerateJob(Job):
    """The work of each rank of `generate`.

    Attributes:
        texts: The prompts.
        sampling: The sampling settings.
        chat: Whether each prompt is a user's message for the model's chat template.
        system: The system message of a chat.
        adapters: Adapters for the model.
        compile: Whether each layer is compiled.
        verify: Whether the files of a training checkpoint are compared with their checksums.
        stream: Whether text is printed while it is generated.
        as_json: Whether the result is printed as JSON.
    """

    texts: list[str]
    sampling: Sampling
    chat: bool = False
    system: str | None = None
    adapters: Path | None
    compile: bool = False
    verify: bool
    stream: bool
    as_json: bool

    def work(self) -> int:
        """Load the model, continue the texts, and print them on the first rank."""
        run = self._generate()
        if environment.is_first():
            (_print_json if self.as_json else _print_texts)(run, self.stream)
        return 0

    def _encode(self, text: str, tokenizer: Tokenizer) -> list[int]:
        if self.chat:
            return tokenizer.encode_chat(text, self.system)
        ids = tokenizer.encode(text)
        # A prompt with special tokens has been formatted already.
        if environment.is_first() and tokenizer.has_chat_template and not tokenizer.special_ids & set(ids[1:-1]):
            note("the model has a chat template, which --chat applies to the prompt.")
        return ids

    def _generate(self) -> _Run:
        asked, engine = self.request, open_engine(self.request.engine)
        start_s = time.perf_counter()
        folder = find_model(asked.model, code=asked.trust_remote_code)
        tokenizer = read_tokenizer(folder, trust_remote_code=asked.trust_remote_code)
        prompts = [self._encode(text, tokenizer) for text in self.texts]
        with loading(f"loading, {mesh_name(asked.mesh)}") as progress:
            split = engine.load(folder, **self.split, dtype=asked.dtype, verify=self.verify, progress=progress)
        if self.adapters is not None:
            engine.load_adapters(split, self.adapters)
        if self.compile:
            compile_layers(split, generates=True)
        loaded_s = time.perf_counter()
        reports: list[GenerationReport] = []
        streamed = self.stream and environment.is_first()
        if self.stream:
            hold()
        with launch.open_line() if streamed else nullcontext():
            if streamed:
                out().print(self.texts[0], style="dim", end="\n" if self.chat else "", soft_wrap=True)
            generations = engine.generate(
                split, prompts, self.sampling, tokenizer=tokenizer, on_text=_stream if self.stream else None,
                on_report=reports.append,
            )  # fmt: skip
        end_s = time.perf_counter()
        return _Run(
            asked.model, asked.mesh, self.texts, self.chat, prompts, generations, reports[0], loaded_s - start_s,
            end_s - loaded_s,
        )  # fmt: skip


def _biases(texts: list[str]) -> dict[int, float]:
    biases: dict[int, float] = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            biases[int(name)] = float(value)
        except ValueError as error:
            raise PlanError(f"--logit-bias must be ID=VALUE, as in 17=-2.5; got {text!r}.") from error
    return biases


def _read_prompt(file: Path, option: str = "--prompt-file") -> str:
    try:
        return inputs.read(file, option).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{option} {file} is not UTF-8 text: {error.reason} at byte {error.start}.") from error


@dataclass(frozen=True)
class _Run:
    model: str
    mesh: Mesh
    texts: list[str]
    is_chat: bool
    prompts: list[list[int]]
    generations: list[Generation]
    report: GenerationReport
    load_s: float
    generate_s: float

    @property
    def new_tokens(self) -> int:
        return sum(len(generation.tokens) for generation in self.generations)


def _stream(place: int, text: str) -> None:
    write(text)


def _print_texts(run: _Run, stream: bool) -> None:
    if stream:
        release()
    else:
        for index, (text, generation) in enumerate(zip(run.texts, run.generations, strict=True)):
            if len(run.texts) > 1:
                out().print(
                    f"{'' if index == 0 else chr(10)}--- {index + 1} ({generation.finish_reason})", style="bold"
                )
            out().print(text, style="dim", end="\n" if run.is_chat else "", soft_wrap=True)
            write(generation.text + "\n")
    for line in _summary(run):
        err().print(line, style="dim", soft_wrap=True)


def _summary(run: _Run) -> list[str]:
    report = run.report
    speeds = [
        f"{plural(run.new_tokens, 'token')} in {run.generate_s:.1f} s on {mesh_name(run.mesh)}",
        f"the first after {report.first_token_s:.2f} s",
    ]
    if report.decode_tokens_per_s is not None:
        speeds.append(f"then {report.decode_tokens_per_s:.1f} tokens/s")
    if report.prefill_tokens_per_s is not None:
        speeds.append(f"prompt {report.prefill_tokens_per_s:.1f} tokens/s")
    loaded = f"loaded in {run.load_s:.1f} s"
    if report.peak_memory_bytes:
        most = f" (largest of {run.mesh.size} ranks)" if run.mesh.size > 1 else ""
        loaded += f", peak memory {size(report.peak_memory_bytes)}{most}"
    return [", ".join(speeds), loaded]


def _print_json(run: _Run, stream: bool) -> None:
    print_json(
        {
            "model": run.model,
            "mesh": run.mesh.to_data(),
            "generations": [
                {
                    "prompt": text,
                    "prompt_tokens": prompt,
                    "tokens": list(generation.tokens),
                    "text": generation.text,
                    "finish_reason": generation.finish_reason,
                }
                for text, prompt, generation in zip(run.texts, run.prompts, run.generations, strict=True)
            ],
            "load_s": run.load_s,
            "generate_s": run.generate_s,
            "tokens_per_s": run.new_tokens / run.generate_s,
            "first_token_s": run.report.first_token_s,
            "prefill_tokens": run.report.prefill_tokens,
            "prefill_s": run.report.prefill_s,
            "prefill_tokens_per_s": run.report.prefill_tokens_per_s,
            "decode_tokens": run.report.decode_tokens,
            "decode_s": run.report.decode_s,
            "decode_tokens_per_s": run.report.decode_tokens_per_s,
            "peak_memory_bytes": run.report.peak_memory_bytes,
        }
    )
