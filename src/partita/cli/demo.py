"""`partita demo`: a tour in two minutes. Plan, train split, save, load split and unsplit, compare, prove."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from partita.checkpoint.durable import failing_as
from partita.cli import launch
from partita.cli.arguments.model import make_plan
from partita.cli.sample_model import sample_model
from partita.cli.terminal.console import out, plural
from partita.core.mesh import Mesh
from partita.core.request import PlanRequest
from partita.errors import CheckpointError, ModelError
from partita.ranks.backends import local_mlx_backend
from partita.ranks.failure import Failure

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 384,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 256,
    "dtype": "float32",
}
"""A small Llama whose tokens are bytes."""

QUESTIONS = ("What is the capital of France?", "Name the three primary colors.")

PROMPTS = ("def __init__(self, ", "        return ", "class ", "import ")
NEW_TOKENS = 40
TRAINING = ("--batch-size", "8", "--sequence-length", "128", "--learning-rate", "5e-3", "--warmup-steps", "30")
MESH = Mesh(pp=2, tp=2)
SPLIT = ("--tp", "2", "--pp", "2")
SCHEDULE = ("--schedule", "zb-h1", "--microbatches", "4")


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """The options of `partita demo`."""

    steps: Annotated[int, typer.Option(min=1, help="Train this many steps.")] = 300
    out_folder: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Save the model in this folder (default: a new folder in runs/).",
            show_default=False,
        ),
    ] = None


def demo(options: DemoOptions) -> None:
    """Train a small Llama over four ranks, save it, load it split and unsplit, and prove that both are equal.

    The ranks are two pipeline stages of two tensor ranks each. It takes about two minutes on two cores. Only the last
    step needs a network, once: a real model answers questions.
    """
    for package in ("torch", "transformers"):
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    folder = options.out_folder if options.out_folder is not None else _new_folder()
    story = _Story(folder)
    story.plan()
    story.schedule()
    story.train(options.steps)
    story.generate()
    story.verify()
    story.mlx()
    story.gguf()
    story.end()


def _new_folder() -> Path:
    number = 1
    while (folder := Path("runs") / f"demo-{number}").exists():
        number += 1
    return folder


@dataclass
class _Story:
    folder: Path
    start_s: float = field(default_factory=time.monotonic)
    chapters: int = 0
    tokens: list[list[int]] = field(default_factory=list)

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def plan(self) -> None:
        from partita.cli.terminal.plan_picture import show

        config = self.folder / "config.json"
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise CheckpointError(f"--out {self.folder} already exists and is not empty. Name a new folder.")
        with failing_as(self.folder, "cannot be created (--out)"):
            self.folder.mkdir(parents=True, exist_ok=True)
        config.write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
        self._chapter("A plan: which of four ranks holds what of a small Llama, two stages of two tensor ranks each")
        _command("plan", str(config), *SPLIT)
        show(make_plan(PlanRequest(str(config), MESH)), all_tensors=False)

    def schedule(self) -> None:
        self._chapter("A schedule: which rank computes what when")
        self._run(1, "schedule", "--kind", "zb-h1", "--pp", "2", "--microbatches", "4")

    def train(self, steps: int) -> None:
        self._chapter("Train it over four ranks on the sources of Python's standard library, and save it unsplit")
        self._run(
            MESH.size, "train", "--config", str(self.folder / "config.json"), "--data", "stdlib", *SPLIT, *SCHEDULE,
            "--steps", str(steps), *TRAINING, "--picture", str(self.folder / "last-step.svg"), "--out", str(self.model),
        )  # fmt: skip

    def generate(self) -> None:
        self._chapter("Generate with it: over four ranks, over three stages, on one rank, and with transformers alone")
        options = ("--max-new-tokens", str(NEW_TOKENS))
        command = ("generate", str(self.model), *PROMPTS, *options, "--json")
        split = json.loads(self._run(MESH.size, *command, *SPLIT))["generations"]
        for written in split:
            self._quote(written["prompt"] + written["text"])
        stages = json.loads(self._run(3, *command, "--pp", "3"))["generations"]
        whole = json.loads(self._run(1, *command))["generations"]
        _say("$ partita reference ...   # transformers' AutoModelForCausalLM alone", "dim")
        other = json.loads(self._run(1, "reference", str(self.model), *PROMPTS, *options, silent=True))
        tokens = self.tokens = [written["tokens"] for written in split]
        same = [
            self._compare("three stages generated", [written["tokens"] for written in stages], tokens),
            self._compare("one rank generated", [written["tokens"] for written in whole], tokens),
            self._compare(f"transformers' {other['class']}, unsplit, generated", other["tokens"], tokens),
        ]
        if not all(same):
            self._fail("The tokens differ.")

    def _compare(self, who: str, tokens: list[list[int]], expected: list[list[int]]) -> bool:
        if tokens == expected:
            _say(f"  {who} the same {sum(map(len, tokens))} tokens as four ranks", "green")
            return True
        different = sum(one != two for one, two in zip(tokens, expected, strict=True))
        _say(
            f"  {who} something DIFFERENT from four ranks for {different} of {plural(len(tokens), 'prompt')}",
            "bold red",
        )
        return False

    def verify(self) -> None:
        self._chapter("Prove it: every module's output, every gradient, training steps; split against unsplit")
        self._run(MESH.size, "verify", str(self.model), *SPLIT, *SCHEDULE, "--dtype", "float64")

    def end(self) -> None:
        seconds = time.monotonic() - self.start_s
        _say(
            f"\nAll checks passed in {seconds:.0f} s. The model is in {self.model}: an ordinary Hugging Face checkpoint.",
            "bold green",
        )
        _say(f'Next: partita generate {self.model} "import " --tp 2 --temperature 0.8', "dim")

    def _chapter(self, title: str) -> None:
        self.chapters += 1
        _say(f"\n{self.chapters}. {title}", "bold cyan")

    def mlx(self) -> None:
        if any(find_spec(package) is None for package in ("mlx", "mlx_lm")):
            return
        self._chapter("The same plan on MLX: the checkpoint that torch trained, split by MLX over two ranks")
        command = ("generate", str(self.model), *PROMPTS, "--max-new-tokens", str(NEW_TOKENS), "--json")
        backend = local_mlx_backend(Mesh(tp=2))
        written = json.loads(self._run(2, *command, "--engine", "mlx", "--tp", "2", backend=backend))["generations"]
        if not self._compare("MLX generated", [one["tokens"] for one in written], self.tokens):
            self._fail("The tokens differ.")

    def gguf(self) -> None:
        self._chapter(
            "A real model: SmolLM2 135M in 4 bits, read from a GGUF file, answers over two ranks. Judge yourself"
        )
        try:
            file = sample_model()
        except ModelError as error:
            _say(f"  Left out, since the model is not on this machine and cannot be fetched: {error}", "yellow")
            return
        options = ("--chat", "--temperature", "0", "--max-new-tokens", "32", "--tp", "2", "--json")
        for written in json.loads(self._run(2, "generate", str(file), *QUESTIONS, *options))["generations"]:
            _say(f"  Question: {written['prompt']}", "bold")
            _say(f"  Answer:   {written['text'].strip()}", "italic")

    def _run(self, ranks: int, *arguments: str, silent: bool = False, backend: str | None = None) -> str:
        """Run a command on that many ranks. Returns its output if that is JSON, else prints it."""
        capture = "--json" in arguments or silent
        if not silent:
            _command(*(argument for argument in arguments if argument != "--json"))
        outcome = launch.start(arguments, ranks, capture=capture, backend=backend)
        code = launch.show_outcome(outcome)
        if code > 128:
            raise typer.Exit(code)
        if code:
            self._fail(f"`partita {arguments[0]}` failed.")
        return outcome.output.decode()

    def _quote(self, text: str) -> None:
        for line in filter(str.strip, text.splitlines()):
            _say(f"  | {line.rstrip()}", "italic")

    def _fail(self, why: str) -> None:
        _say(f"\nThe demo FAILED: {why}", "bold red")
        raise typer.Exit(Failure.FAILED)


def _command(*arguments: str) -> None:
    _say(f"$ partita {shlex.join(arguments)}", "dim")


def _say(text: str, style: str) -> None:
    out().print(text, style=style, soft_wrap=True)
