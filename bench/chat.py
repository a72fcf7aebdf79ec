"""A real chat model from files of several forms: prefill and decoding of one sequence and of eight, beside its peers."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench.contest import Contest, Contestant, Samples, compete
from bench.ranks import own_rank
from bench.results import Setting, Table, Target, summarize

FORMS = ("Q4_1", "Q8_0", "bfloat16", "float32")
LAYOUTS: dict[str, dict[str, int]] = {"one rank": {}, "tp 2": {"tp": 2}, "pp 2": {"pp": 2}}
TRANSFORMERS = {dtype: f"transformers, {dtype}" for dtype in ("bfloat16", "float32")}
MLX_LM = "mlx-lm, 4 bits"
LLAMA_CPP = {form: f"llama.cpp, {form}" for form in ("Q4_1", "Q8_0")}
READS = {1: "a plain read, one process", 2: "a plain read, two processes"}
READ_BYTES = 256 << 20

PLACES = ("France", "Italy", "Spain", "Germany", "Japan", "China", "Russia", "Egypt")
ANSWER = " Paris"
"""What every contestant answers to the first question, however it rounds the weights."""

TEXT = (
    "The history of music begins long before the first written notes. People sang while they worked, they beat "
    "drums when they danced, and they carved flutes from the bones of birds. Every culture that we know of has its "
    "own songs, and most have instruments with strings as well. The oldest melody that we can still play was "
    "pressed into clay more than three thousand years ago. Later, monks wrote signs above the words of their "
    "chants, which told the singers when to rise and when to fall, but not by how much. Only when somebody drew a "
    "line, and then four of them, could a singer learn a song that he had never heard before, and a piece of music "
    "could travel from one town to another without a musician."
)


@dataclass(frozen=True)
class Work:
    """What is generated from which prompts.

    Attributes:
        name: A word for tables.
        title: What is measured.
        rows: Sequences.
        new_tokens: Of each sequence.
        prompt_tokens: Of each sequence, from `TEXT`; 0 for questions.
    """

    name: str
    title: str
    rows: int
    new_tokens: int
    prompt_tokens: int = 0

    @property
    def tokens(self) -> int:
        """The tokens whose number a second is reported."""
        return self.rows * (self.prompt_tokens or self.new_tokens)


WORKS = (
    Work(
        "decode-1", "decoding, one sequence", 1, 64
    ),  # from 32 tokens on ours looks for faster forms of a model's layers
    Work("decode-8", "decoding, eight sequences", 8, 32),
    Work("prefill-1", "prefill of 128 tokens, one sequence", 1, 1, 128),
    Work("prefill-8", "prefill of 32 tokens each, eight sequences", 8, 1, 32),
)
NO_SLOWER = Target(1.0, "ours no slower")

Step = Callable[[Work, list[list[int]]], list[list[int]] | list[str]]
"""Continues every prompt; the new tokens of each, or its text."""


def ours(layout: str, form: str) -> str:
    """The name of a contestant of ours."""
    return f"Partita, {layout}, {form}"


def run(setting: Setting) -> list[Table]:
    """A table for each work, and how far decoding is from reading the weights."""
    folder = setting.folder / "chat"
    with setting.ranks(1) as ranks:
        sizes = ranks.call(make_files, folder, not setting.quick)[0]
    works = WORKS[:1] if setting.quick else WORKS
    budget_s, rounds = (10, 1) if setting.quick else (200, 2)
    contest = Contest(
        set_up, (folder, works, not setting.quick), budget_s=budget_s, rounds=rounds, warm_up=1, limit_s=1200
    )
    left_out = ["mlx-lm, which takes minutes"] if setting.quick else []
    if find_spec("xllamacpp") is None:
        left_out.append("llama.cpp, since xllamacpp is not installed")
    title = "SmolLM2-135M-Instruct, 2 threads or 2 ranks" + (f" (without {', '.join(left_out)})" if left_out else "")
    with setting.work(title) as progress, setting.ranks(2) as ranks:
        samples = compete(ranks, contest, progress)
    first = ours("one rank", "Q4_1")
    peers = dict.fromkeys((*TRANSFORMERS.values(), MLX_LM, *LLAMA_CPP.values()), NO_SLOWER)
    tables = []
    for work in works:
        own = Samples({who: values for name, values in samples.values.items() for who in _of(name, work)})
        named = f"{title}: {work.title}"
        tables.append(summarize(f"chat-{work.name}", named, "tokens/s", work.tokens, own, first, peers, rate=True))
    times = _times_of_a_read(samples, sizes)
    named = f"{title}: {WORKS[0].title}, times a plain read of the weights"
    return [*tables, summarize("chat-reads", named, "x a plain read", 1.0, times, first, {})]


def _of(name: str, work: Work) -> list[str]:
    who, _, what = name.rpartition(": ")
    return [who] if what == work.name else []


def _times_of_a_read(samples: Samples, sizes: dict[str, int]) -> Samples:
    """How many times as long a decoded token takes as as many processes take to read the weights once, without arithmetic."""
    times, work = Samples(), WORKS[0]
    for name, values in samples.values.items():
        for who in _of(name, work):
            reads = samples.values[
                READS[2 if any(who == ours(layout, f) for layout in ("tp 2", "pp 2") for f in FORMS) else 1]
            ]
            read = sizes[who.rpartition(", ")[2]] / READ_BYTES
            for value, whole in zip(values, reads, strict=True):
                times.add(who, value / work.new_tokens / (read * whole))
    return times


def make_files(folder: Path, has_mlx: bool) -> dict[str, int]:
    """Write the model in every form into `folder`; the bytes of each form's weights. For one rank alone."""
    from gguf import GGMLQuantizationType

    from partita.checkpoint.find import find_model
    from partita.checkpoint.index import open_checkpoint
    from partita.cli.sample_model import sample_model
    from partita.torch.convert import convert

    folder.mkdir()
    (folder / "Q4_1.gguf").symlink_to(sample_model().resolve())
    write_gguf(folder / "Q4_1.gguf", folder / "Q8_0.gguf", GGMLQuantizationType.Q8_0)
    for dtype in ("float32", "bfloat16"):
        convert(folder / "Q4_1.gguf", folder / dtype, dtype)
    if has_mlx:
        from mlx_lm.convert import convert as to_mlx

        # Groups of 32, as in Q4_1; with 64 the model answers the first question wrongly.
        to_mlx(str(folder / "float32"), str(folder / "4 bits"), quantize=True, q_group_size=32, q_bits=4)
    paths = {form: path_of(folder, form) for form in (*FORMS, *(["4 bits"] if has_mlx else []))}
    return {
        form: sum(info.nbytes for info in open_checkpoint(find_model(path)).tensors.values())
        for form, path in paths.items()
    }


def path_of(folder: Path, form: str) -> Path:
    """The file or folder of a form."""
    return folder / (f"{form}.gguf" if form.startswith("Q") else form)


def write_gguf(source: Path, target: Path, kind: Any) -> None:
    """The same model with its matrices in a form of GGUF, a `GGMLQuantizationType`."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import dequantize, quantize

    read = GGUFReader(source)
    architecture = read.fields["general.architecture"].contents()
    writer = GGUFWriter(target, architecture)
    for field in read.fields.values():
        if field.name == "general.architecture" or field.name.startswith("GGUF."):
            continue
        items = field.types[1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], items)
    for tensor in read.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values.astype("float32"))
        else:
            writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def set_up(folder: Path, works: tuple[Work, ...], has_mlx: bool) -> dict[str, Contestant]:
    """Every contestant, for every work; those that are one process live in rank 0."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "float32")
    text = tokenizer(TEXT)["input_ids"]
    steps: dict[str, tuple[Step, bool]] = {}
    for form in FORMS:
        for layout, split in LAYOUTS.items():
            if split or own_rank() == 0:
                steps[ours(layout, form)] = partita(path_of(folder, form), split), not split
            else:
                steps[ours(layout, form)] = nothing, True
    peers = [(TRANSFORMERS, of_transformers), *([({"4 bits": MLX_LM}, of_mlx_lm)] if has_mlx else [])]
    if find_spec("xllamacpp") is not None:
        peers.append((LLAMA_CPP, of_llama_cpp))
    for names, make in peers:
        for form, name in names.items():
            steps[name] = (in_own_process(make, folder, form) if own_rank() == 0 else nothing), True
    contestants = {}
    wanted: dict[tuple[str, str], object] = {}
    for work in works:
        if work.prompt_tokens:
            starts = range(0, work.rows * 12, 12)
            prompts = [text[start : start + work.prompt_tokens] for start in starts]
            assert all(len(prompt) == work.prompt_tokens for prompt in prompts)
        else:
            prompts = [tokenizer(f"The capital of {place} is")["input_ids"] for place in PLACES[: work.rows]]
        for name, (step, alone) in steps.items():
            if name == MLX_LM and work != WORKS[0]:
                continue  # products of several rows take MLX's wheel for Linux minutes
            contestants[f"{name}: {work.name}"] = contestant(name, step, alone, work, prompts, tokenizer, wanted)
    numbers = torch.rand(READ_BYTES // 4)
    half = numbers[: numbers.numel() // 2].clone()
    contestants[READS[2]] = Contestant(half.sum, lambda: None)
    contestants[READS[1]] = Contestant(lambda: read_with_all_threads(numbers), lambda: None, alone=True)
    return contestants


def contestant(
    name: str, step: Step, alone: bool, work: Work, prompts: list[list[int]], tokenizer: Any, wanted: dict[Any, Any]
) -> Contestant:
    """What one of them does in one turn. Ours must agree with each other where they compute with the same values."""
    outputs: list[Any] = []

    def turn() -> None:
        outputs[:] = step(work, prompts)

    def check() -> None:
        if step is nothing:
            return
        assert len(outputs) == work.rows
        assert all(isinstance(one, str) or len(one) == work.new_tokens for one in outputs)
        if not work.prompt_tokens:
            first = outputs[0] if isinstance(outputs[0], str) else tokenizer.decode(outputs[0])
            assert first.startswith(ANSWER), f"it answers {first!r}"
        form = name.rpartition(", ")[2]
        if name.startswith("Partita") and form != "bfloat16" and (own_rank() == 0 or not alone):
            want = wanted.setdefault((form, work.name), list(outputs))
            assert outputs == want, f"its tokens {outputs} differ from {want}"

    return Contestant(turn, check, alone)


def nothing(work: Work, prompts: list[list[int]]) -> list[list[int]]:
    """What rank 1 does while rank 0 works alone."""
    return []


@contextmanager
def all_threads() -> Iterator[None]:
    """Let torch use all cores inside the context, and one afterwards."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(1)


def read_with_all_threads(numbers: Any) -> None:
    """Read every number once."""
    with all_threads():
        numbers.sum()


def partita(path: Path, split: dict[str, int]) -> Step:
    """Ours: on both ranks, or on one with all threads."""
    from partita.torch import Sampling, generate, load
    from partita.torch.collectives.groups import single_groups

    model = load(path, **split) if split else load(path, groups=single_groups())  # type: ignore[arg-type]

    def step(work: Work, prompts: list[list[int]]) -> list[list[int]]:
        sampling = Sampling(max_new_tokens=work.new_tokens, ignore_eos=True, temperature=0.0)
        return [list(one.tokens) for one in generate(model, prompts, sampling)]

    def with_all_threads(work: Work, prompts: list[list[int]]) -> list[list[int]]:
        with all_threads():
            return step(work, prompts)

    return step if split else with_all_threads


def in_own_process(make: Callable[[Path, str], Step], folder: Path, form: str) -> Step:
    """A peer beside no other user of threads: libgomp stops spinning where several in one process have teams of it.

    In rank 0 llama.cpp decoded 36 tokens/s, alone 94.
    """
    context = get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=_answer, args=(there, make, folder, form), daemon=True).start()
    there.close()
    _received(here)

    def step(work: Work, prompts: list[list[int]]) -> list[list[int]] | list[str]:
        here.send((work, prompts))
        return _received(here)  # type: ignore[no-any-return]

    return step


def _received(connection: Connection) -> Any:
    error, value = connection.recv()
    if error:
        raise RuntimeError(error)
    return value


def _answer(connection: Connection, make: Callable[[Path, str], Step], folder: Path, form: str) -> None:
    """The process's whole life: make the step, then take it whenever asked, until the other end closes."""
    try:
        step = make(folder, form)
        connection.send(("", None))
        while True:
            connection.send(("", step(*connection.recv())))
    except EOFError:
        os._exit(0)
    except Exception:
        connection.send((traceback.format_exc(), None))


def of_transformers(folder: Path, dtype: str) -> Step:
    """transformers with the values of the Q4_1 file, which it dequantizes."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="Q4_1.gguf", dtype=getattr(torch, dtype))

    def step(work: Work, prompts: list[list[int]]) -> list[list[int]]:
        longest = max(map(len, prompts))
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        new = work.new_tokens
        with all_threads():
            out = model.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0
            )
        return out[:, longest:].tolist()  # type: ignore[no-any-return]

    return step


def of_mlx_lm(folder: Path, form: str) -> Step:
    """mlx-lm alone, with weights that it quantized itself."""
    import mlx.core as mx
    from mlx_lm.generate import BatchGenerator, generate_step
    from mlx_lm.utils import load_model

    model, _ = load_model(folder / form)

    def one(work: Work, prompts: list[list[int]]) -> list[list[int]]:
        (prompt,) = prompts
        return [[int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=work.new_tokens)]]

    def several(work: Work, prompts: list[list[int]]) -> list[list[int]]:
        batch = BatchGenerator(model)
        results: dict[int, list[int]] = {uid: [] for uid in batch.insert(prompts, [work.new_tokens] * len(prompts))}
        while responses := batch.next_generated():
            for response in responses:
                results[response.uid].append(response.token)
        batch.close()
        return list(results.values())

    return lambda work, prompts: (one if work.rows == 1 else several)(work, prompts)


def of_llama_cpp(folder: Path, form: str) -> Step:
    """llama.cpp's server without HTTP, whose slots share its batches."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path_of(folder, form))
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count() or 1
    params.n_parallel, params.n_ctx = len(PLACES), len(PLACES) * 256
    params.verbosity, params.warmup, params.cache_prompt, params.cache_ram_mib = -1, False, False, 0
    server = xllamacpp.Server(params)
    pool = ThreadPoolExecutor(len(PLACES))

    def complete(prompt: list[int], new_tokens: int) -> str:
        wanted = {
            "prompt": prompt,
            "n_predict": new_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        reply = server.handle_completions(wanted)
        assert reply["usage"]["completion_tokens"] == new_tokens, reply
        return str(reply["choices"][0]["text"])

    def step(work: Work, prompts: list[list[int]]) -> list[str]:
        return list(pool.map(lambda prompt: complete(prompt, work.new_tokens), prompts))

    return step
