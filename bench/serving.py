"""Servers of a real chat model beside each other, at 1, 4 and 16 clients that stream answers over HTTP."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.chat import ANSWER, all_threads, write_gguf
from bench.contest import Samples
from bench.results import Setting, Table, Target, summarize
from bench.servers import LLAMA_CPP, Ask, Program, Server, ServerError, Turn, python

MODEL = "SmolLM2"
OURS = {"one rank": (), "tp 2": ("--tp", "2"), "pp 2": ("--pp", "2")}
GENERATE = "partita generate, no server"
MLX_LM = "mlx_lm.server"
FIRST = "partita serve, one rank"

SUBJECTS = (
    "music", "painting", "bread", "ships", "maps", "clocks", "glass", "paper", "bridges", "gardens", "letters", "coins",
    "salt", "silk", "tea", "stars",
)  # fmt: skip
QUESTION = "What is the capital of France? Answer with the name only."


@dataclass(frozen=True)
class Load:
    """What is asked in a turn.

    Attributes:
        clients: Clients at once.
        requests: Of each client, one after the other.
        tokens: New tokens of the shortest answer; the longest has twice as many, so that requests arrive while others are
            answered.
    """

    clients: int
    requests: int
    tokens: int

    def asks(self, number: int) -> list[list[Ask]]:
        """The requests of each client in turn `number`, whose prompts no earlier turn has had."""
        return [
            [
                Ask(
                    f"Part {number} of {1 + place}: write a long essay on the history of {SUBJECTS[place % 16]}.",
                    self.tokens + self.tokens * client // max(1, self.clients - 1),
                )
                for place in range(client * self.requests, (client + 1) * self.requests)
            ]
            for client in range(self.clients)
        ]


LOADS = (Load(1, 2, 24), Load(4, 2, 16), Load(16, 2, 16))
QUICK = (Load(1, 1, 8), Load(16, 1, 4))


def run(setting: Setting) -> list[Table]:
    """For each number of clients a table of tokens per second, of requests per second and of the time to the first token."""
    folder = setting.folder / "serving"
    with setting.ranks(1) as ranks:
        ranks.call(make_files, folder)
        ranks.call(load_model, folder / MODEL)

        def generate(asks: list[Ask]) -> int:
            return int(ranks.call(generate_all, [(ask.message, ask.tokens) for ask in asks])[0])

        return _compared(setting, folder, generate)


def _compared(setting: Setting, folder: Path, generate: Callable[[list[Ask]], int]) -> list[Table]:
    loads, budget_s, least = (QUICK, 0.0, 1) if setting.quick else (LOADS, 240.0, 3)
    taken = {load: (Samples(), Samples(), Samples()) for load in loads}
    title = "SmolLM2-135M-Instruct in float32, served to"
    with contextlib.ExitStack() as stack:
        with setting.work("servers start") as progress:
            servers, skipped = _started(stack, folder, progress)
        for name, why in skipped.items():
            print(f"skipped: {name}: {why}", flush=True)
        start, done = time.monotonic(), 0
        with setting.work(f"{title} 1, 4 and 16 clients") as progress:
            while done < least or time.monotonic() - start < budget_s:
                for load in loads:
                    for server, why in _round(load, done, servers, generate, taken[load]).items():
                        print(f"left out: {server.program.name}: {why}", flush=True)
                        skipped[server.program.name] = f"it failed at {load.clients} clients: {why}"
                        servers.remove(server)
                        for samples in (samples for several in taken.values() for samples in several):
                            samples.values.pop(server.program.name, None)
                done += 1
                progress(min(1.0, max(done / 100, (time.monotonic() - start) / (budget_s or 1.0))))
    tables = []
    for load, (per_token, per_request, first) in taken.items():
        clients = f"{title} {load.clients} client{'s' if load.clients > 1 else ''}"
        peers = [name for name in per_token.values if not name.startswith("partita")]
        faster = {name: Target(2.0, "ours at least 2 x as fast") for name in peers} if load.clients == 16 else {}
        if load.clients == 1:
            faster = {GENERATE: Target(0.95, "ours no slower")}
        sooner = {name: Target(1.0, "ours no later") for name in peers} if load.clients > 1 else {}
        name, absent = f"serving-{load.clients}", dict(skipped)
        if load.clients > 1 and MLX_LM not in absent:
            absent[MLX_LM] = "it takes minutes for the prompts of several clients on a CPU"
        made = partial(summarize, ours=FIRST, left_out=absent)
        tables += [
            made(f"{name}-tokens", f"{clients}: tokens", "tokens/s", 1, per_token, targets=faster, rate=True),
            made(f"{name}-requests", f"{clients}: requests", "requests/s", 1, per_request, targets={}, rate=True),
            made(f"{name}-first", f"{clients}: time to the first token", "ms", 1000, first, targets=sooner),
        ]
    return tables


def _round(
    load: Load, number: int, servers: list[Server], generate: Callable[[list[Ask]], int], taken: tuple[Samples, ...]
) -> dict[Server, str]:
    """A turn of every server, another one first in each round. Peers that failed, and how."""
    asks, place = load.asks(number), number % len(servers)
    failed: dict[Server, str] = {}
    for server in servers[place:] + servers[:place]:
        if server.program.name == MLX_LM and load.clients > 1:
            continue  # its products take minutes for the prompts of several clients, on a CPU
        server.resume()
        try:
            turn = server.turn(asks)
        except ServerError as error:
            if not server.program.pauses:
                raise
            failed[server] = str(error)
            server.pause()
            continue
        server.pause()
        _add(server.program.name, turn, taken)
    if load.clients == 1:
        start = time.perf_counter()
        tokens = generate(asks[0])
        taken[0].add(GENERATE, (time.perf_counter() - start) / tokens)
    return failed


def _add(name: str, turn: Turn, taken: tuple[Samples, ...]) -> None:
    per_token, per_request, first = taken
    per_token.add(name, turn.seconds / turn.tokens)
    per_request.add(name, turn.seconds / len(turn.answers))
    first.add(name, statistics.median(answer.first_s for answer in turn.answers))


def _started(
    stack: contextlib.ExitStack, folder: Path, progress: Callable[[float], None]
) -> tuple[list[Server], dict[str, str]]:
    """The servers that answer a question rightly, paused, and why the others are left out.

    Raises:
        ServerError: One of ours did not start or is wrong.
    """
    servers: list[Server] = []
    skipped: dict[str, str] = {}
    found = programs(folder)
    for done, program in enumerate(found):
        if program.missing:
            skipped[program.name] = f"the package {program.missing} is not installed"
            continue
        try:
            server = stack.enter_context(Server(program, folder))
            server.wait()
            (answer,) = server.turn([[Ask(QUESTION, 8)]]).answers
            if ANSWER.strip() not in answer.text:
                raise ServerError(f"it answers {answer.text!r}")
            if program.name != MLX_LM:
                server.turn([[Ask(f"{place}: {QUESTION}", 4)] for place in range(16)])  # compiles, allocates
        except ServerError as error:
            if not program.pauses:
                raise
            skipped[program.name] = str(error)
            server.pause()
            continue
        server.pause()
        servers.append(server)
        progress((done + 1) / len(found))
    return servers, skipped


def programs(folder: Path) -> list[Program]:
    """Ours in each layout, and the peers."""
    model, port = str(folder / MODEL), ("--port", "{port}")
    ours = [
        Program(
            f"partita serve, {layout}",
            python("-m", "partita", "serve", model, *port, *split, "--cache-bytes", "512MiB"),
            MODEL,
            pauses=False,
        )
        for layout, split in OURS.items()
    ]
    batching = ("--continuous-batching", "--cb-num-blocks", "256", "--cb-max-batch-tokens", "512")
    return [
        *ours,
        Program(
            "transformers serve, continuous batching",
            python("-m", "transformers.cli.transformers", "serve", model, *port, "--host", "127.0.0.1", *batching),
            model,
            ("fastapi", "uvicorn"),
        ),
        Program(MLX_LM, python("-m", "mlx_lm", "server", "--model", model, *port), "default_model", ("mlx_lm",)),
        Program(
            "llama.cpp's server",
            python("-c", LLAMA_CPP, str(folder / "F32.gguf"), "{port}"),
            MODEL,
            ("xllamacpp",),
        ),
    ]


# --- in a rank ----------------------------------------------------------------------------------------------------------


def make_files(folder: Path) -> None:
    """Write the model in float32: as a folder and, with the same values, as a GGUF file."""
    from gguf import GGMLQuantizationType

    from partita.cli.sample_model import sample_model
    from partita.torch.convert import convert

    folder.mkdir()
    convert(sample_model(), folder / MODEL, "float32")
    write_gguf(sample_model(), folder / "F32.gguf", GGMLQuantizationType.F32)


_model: dict[str, Any] = {}


def load_model(folder: Path) -> None:
    """Load the model for `generate_all`."""
    from partita.generation.tokenizer import load_tokenizer
    from partita.torch import load
    from partita.torch.collectives.groups import single_groups

    _model["model"] = load(folder, groups=single_groups())
    _model["tokenizer"] = load_tokenizer(folder)
    generate_all([("Hi", 32)])


def generate_all(asks: list[tuple[str, int]]) -> int:
    """Answer one request after the other with `generate` and all threads, as servers answer one client; new tokens."""
    from partita.torch import Sampling, generate

    tokenizer, count = _model["tokenizer"], 0
    with all_threads():
        for message, tokens in asks:
            ids = tokenizer.encode_messages([{"role": "user", "content": message}])
            (one,) = generate(
                _model["model"], [ids], Sampling(max_new_tokens=tokens, temperature=0.0), tokenizer=tokenizer
            )
            count += len(one.tokens)
    return count
