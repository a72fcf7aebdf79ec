"""`partita serve`: answer OpenAI's clients and a chat page with a model split over ranks."""

from __future__ import annotations

import gc
import ipaddress
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from partita.checkpoint.find import find_model, is_local
from partita.checkpoint.index import open_checkpoint
from partita.cli import launch
from partita.cli.arguments.auto import PROMPT, planned
from partita.cli.arguments.engine import choose_engine
from partita.cli.arguments.model import (
    plan_early,
    read_tokenizer,
    refuse_context,
    refuse_device,
    refuse_experts_over_replicas,
    request_of,
)
from partita.cli.arguments.options import Auto, ModelArgument, NoVerify, PlanOptions, RunOptions, WeightsDtype
from partita.cli.arguments.serving import CACHE, CacheBytes, ExactRows, MaxSequences, PrefillChunk
from partita.cli.front_end import FRONT, MODEL, FrontEnd
from partita.cli.job import Job
from partita.cli.library import Choice
from partita.cli.replicas import serve_beside
from partita.cli.terminal.console import mesh_name
from partita.cli.terminal.plan_figure import as_data
from partita.cli.terminal.progress import loading
from partita.core.model.spec import DEFAULT_CONTEXT, longest_text
from partita.core.plan import Plan
from partita.core.request import PlanRequest
from partita.cost.work import Work
from partita.engine import embedding_loop, open_engine, serving_loop
from partita.errors import ModelError, PartitaError
from partita.notes import note
from partita.ranks import environment
from partita.ranks.agreement import first_text
from partita.serving import ServeSettings, ServingLoop
from partita.training.adapter_files import check_readable

if TYPE_CHECKING:
    from partita.serving.embedding import EmbeddingLoop

SERVER = "Server"
"""A panel of options in `--help`."""


@dataclass(frozen=True, kw_only=True)
class ServingOptions(RunOptions, PlanOptions):
    """Options of a served model."""

    model: ModelArgument
    auto: Auto = False
    max_sequences: MaxSequences = 16
    max_tokens: Annotated[
        int, typer.Option(min=1, help="End answers whose request sets no limit after this many tokens.", rich_help_panel=CACHE)
    ] = 512  # fmt: skip
    prefill_chunk: PrefillChunk = 256
    cache_bytes: CacheBytes = None
    exact_rows: ExactRows = False
    no_verify: NoVerify = False
    dtype: WeightsDtype = None


@dataclass(frozen=True, kw_only=True)
class ServeOptions(ServingOptions):
    """The options of `partita serve`."""

    host: Annotated[str, typer.Option(help="Listen at this address.", rich_help_panel=SERVER)] = "127.0.0.1"
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Listen at this port; 0 for any that is free.", rich_help_panel=SERVER)
    ] = 8080
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            envvar="PARTITA_API_KEY",
            help="Answer only requests with this bearer token.",
            show_default=False,
            rich_help_panel=SERVER,
        ),
    ] = None
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapters",
            metavar="NAME=DIR",
            help="Also serve the model with these LoRA adapters, which requests choose by the model NAME. Repeatable.",
            show_default=False,
            rich_help_panel=SERVER,
        ),
    ] = None
    restarts: Annotated[
        int,
        typer.Option(
            min=0, help="Start the ranks again when one is lost, at most this many times.", rich_help_panel=SERVER
        ),
    ] = 0  # fmt: skip
    models: Annotated[
        Path | None,
        typer.Option(
            "--models",
            metavar="DIR",
            help="Let clients load the models of this folder instead (POST /models/load).",
            show_default=False,
            rich_help_panel=SERVER,
        ),
    ] = None
    served_model_name: Annotated[
        str | None,
        typer.Option(
            "--served-model-name",
            metavar="NAME",
            help="Name of the model in requests (default: the last part of MODEL).",
            show_default=False,
            rich_help_panel=SERVER,
        ),
    ] = None


def serve(options: ServeOptions) -> None:
    """Serve a model split over ranks to OpenAI's clients and, at `/`, to a browser, until Ctrl-C or SIGTERM."""
    if options.api_key is not None and not options.api_key.strip():
        raise ModelError("--api-key is empty, so every request would have it. Give a key, or leave it out.")
    if not _is_loopback(options.host) and not options.api_key and environment.is_first():
        note(
            f"--host {options.host} lets other machines in, and without --api-key everyone who reaches this one can use the "
            "server."
        )
    name = options.served_model_name or (
        Path(options.model).resolve().name if is_local(options.model) else options.model
    )
    if options.restarts and environment.world() is not None:
        raise ModelError(
            f"--restarts is for ranks that `partita serve` starts itself, but {environment.launcher()} has started these. "
            "Leave it out, and let that launcher restart them (torchrun --max-restarts)."
        )
    if options.models is not None and not options.models.is_dir():
        raise ModelError(f"--models {options.models} must be a folder of models, but there is none.")
    start(
        options, models=options.models and options.models.resolve(), adapters=_adapters(options.adapters or [], name),
        host=options.host, port=options.port, api_key=options.api_key or "", name=name, restarts=options.restarts,
    )  # fmt: skip


def _adapters(given: list[str], model: str) -> dict[str, str]:
    """The folders of `--adapters` by their names.

    Raises:
        PartitaError: A name is missing or used twice, or a folder holds no adapters.
    """
    found: dict[str, str] = {}
    for text in given:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise ModelError(f"--adapters must be NAME=DIR, as in french=./french; got {text!r}.")
        if name in (model, *found):
            raise ModelError(f"--adapters {text}: {name!r} is the name of another served model. Give another name.")
        check_readable(Path(folder))
        found[name] = folder
    return found


def start(options: ServingOptions, *, adapters: dict[str, str] | None = None, **where: Any) -> NoReturn:
    """Serve a model until the server is ended; `where` is the address, the key and the name of `ServeJob`."""
    import partita.serving.http.app  # noqa: F401  # an extra that is missing is reported before anything starts

    engine = choose_engine(options.engine)
    if adapters and engine != "torch":
        raise ModelError(
            f"--adapters works with --engine torch; on {engine} a model has one set of adapters. Use --engine torch, or serve "
            "the model with the adapters merged."
        )
    request, given = request_of(options.model, options, engine=engine, trust_remote_code=options.trust_remote_code)
    request = replace(request, dtype=options.dtype and options.dtype.value)
    work = Work(
        purpose="serve", sequences=options.max_sequences, sequence_length=PROMPT, context=DEFAULT_CONTEXT,
        dtype=request.dtype,
    )  # fmt: skip
    request, given = planned(request, given, options, work, auto=options.auto)
    refuse_experts_over_replicas(request)
    plan = plan_early(request, given)
    settings = ServeSettings(
        options.max_sequences, options.prefill_chunk, options.cache_bytes, exact_rows=options.exact_rows
    )
    _refuse_context(request, settings)
    refuse_device(engine, options.device)
    if is_local(options.model):
        open_checkpoint(find_model(options.model))
    launch.run(
        ServeJob(
            request=request, plan=plan, backend=options.backend, device=options.device, settings=settings,
            adapters=adapters or {}, max_tokens=options.max_tokens, verify=not options.no_verify, as_json=options.as_json,
            **where,
        )
    )  # fmt: skip


def _refuse_context(request: PlanRequest, settings: ServeSettings) -> None:
    """Raise `PartitaError` for a model that cannot be served over context parallel ranks, as far as its files tell."""
    if request.mesh.cp > 1 and Path(request.model).is_dir():
        from partita.serving.pooling import read_pooling  # needs numpy, which the command line does without

        if read_pooling(Path(request.model)).is_given:
            raise ModelError(
                f"{request.model} is a model for embeddings (modules.json), whose texts are not split over ranks "
                f"(--cp {request.mesh.cp}). Leave --cp out."
            )
    refuse_context(request, settings)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(kw_only=True)
class ServeJob(Job):
    """The work of each rank of `serve`.

    Attributes:
        host: The address to listen at.
        port: The port; 0 for any that is free.
        api_key: What requests must have; empty for nothing.
        name: The name of the model in requests.
        adapters: Folders of adapters by their names in requests.
        max_tokens: The largest number of tokens of an answer whose request sets none.
        settings: The limits of the step loop.
        verify: Whether the files of a training checkpoint are compared with their checksums.
        as_json: Whether the address is printed as JSON.
        restarts: How often the ranks are started again when one is lost.
        models: The folder of the models that clients may load instead; None for none.
    """

    host: str
    port: int
    api_key: str
    name: str
    adapters: dict[str, str]
    max_tokens: int
    settings: ServeSettings
    verify: bool
    as_json: bool
    restarts: int = 0
    models: Path | None = None

    @property
    def has_launcher(self) -> bool:
        """Whether ranks are started, as they are again when one is lost."""
        return super().has_launcher or self.restarts > 0

    @contextmanager
    def beside(self) -> Iterator[FrontEnd]:
        """The front end."""
        with FrontEnd(self).closing() as front_end:
            yield front_end

    def work(self) -> int:
        """Load the model and serve it. Under another launcher the first rank answers HTTP requests."""
        path, given = os.environ.pop(FRONT, None), os.environ.pop(MODEL, None)
        choice, failure = Choice(*json.loads(given)) if given else self._first, ""
        with ExitStack() as stack:
            front_end = None
            if path is None and environment.is_first():
                front_end = stack.enter_context(FrontEnd(self).closing())
            loop, groups, facts = self._loaded(choice)
            while True:
                facts |= {"model": astuple(choice), "failure": failure}
                if front_end is not None:
                    front_end.serve(loop, facts, groups)
                else:
                    serve_beside(loop, facts, groups, path)
                if not (isinstance(loop, ServingLoop) and loop.following):
                    return 0
                following, failure = Choice(*json.loads(loop.following)), ""
                del loop
                gc.collect()
                try:
                    loop, _, facts = self._loaded(following, groups)
                    choice = following
                except PartitaError as error:
                    failure = f"{following.name} cannot be loaded, and {choice.name} is served as before: {error}"
                if failure:
                    gc.collect()
                    loop, _, facts = self._loaded(choice, groups)

    @property
    def _first(self) -> Choice:
        return Choice(self.name, self.request.model)

    def _job_of(self, choice: Choice) -> ServeJob:
        """The job with another model, which is split over the same mesh in the default layout."""
        if choice == self._first:
            return self
        asked = replace(self.request, model=choice.model, layout=None, rules=None)
        return replace(self, request=asked, plan=None, adapters={}, name=choice.name)

    def check(self, choice: Choice) -> None:
        """Raise `PartitaError` for a model that cannot be split, as far as its files tell."""
        request = self._job_of(choice).request
        plan_early(request)
        _refuse_context(request, self.settings)
        open_checkpoint(find_model(choice.model))

    def _loaded(self, choice: Choice, groups: Any = None) -> tuple[ServingLoop | EmbeddingLoop, Any, dict[str, Any]]:
        """The loop of a model, its groups, which are `groups` if they are given, and what the front end knows of it."""
        job = self._job_of(choice)
        asked, engine = job.request, open_engine(job.request.engine)
        if groups is not None:
            _agree_on_files(asked, groups)
        folder = find_model(asked.model, code=asked.trust_remote_code)
        with loading(f"loading, {mesh_name(asked.mesh)}") as progress:
            split = engine.load(
                folder, **job.split, dtype=asked.dtype, verify=job.verify, progress=progress, groups=groups
            )
        loop = job._loop(split, folder)
        if groups is not None and not isinstance(loop, ServingLoop):
            raise ModelError("it gives embeddings. Start a server of its own for it.")
        plan, groups = engine.plan_of(split)
        return loop, groups, facts_of(plan, loop)

    def _loop(self, split: Any, folder: Path) -> ServingLoop | EmbeddingLoop:
        asked = self.request
        found = embedding_loop(asked.engine, split, self.settings, folder=folder)
        if found is not None and self.adapters:
            raise ModelError(
                "--adapters is for models that continue text, but this one gives embeddings. Leave it out."
            )
        if found is not None:
            return found
        tokenizer = read_tokenizer(folder, trust_remote_code=asked.trust_remote_code)
        return serving_loop(asked.engine, split, self.settings, tokenizer=tokenizer, adapters=self.adapters)


def _agree_on_files(asked: PlanRequest, groups: Any) -> None:
    """Raise `ModelError` on all ranks if one of them cannot read a model's config or tokenizer."""
    failure = None
    try:
        read_tokenizer(find_model(asked.model, code=asked.trust_remote_code), trust_remote_code=asked.trust_remote_code)
    except PartitaError as error:
        failure = str(error)
    if failure := first_text(groups.axes, failure):
        raise ModelError(failure)


def facts_of(plan: Plan, loop: ServingLoop | EmbeddingLoop) -> dict[str, Any]:
    """What the front end knows of a model and of the cache of a replica."""
    spec = plan.spec
    facts = {"context": longest_text(spec), "vocab_size": spec.vocab_size, "plan": as_data(plan)}
    if isinstance(loop, ServingLoop):
        return {**facts, "cache": str(loop.rows.layout), "no_images": loop.rows.no_images}
    return {**facts, "context": loop.most_tokens or facts["context"], "width": loop.inbox.width}
