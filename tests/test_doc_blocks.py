"""The code of README and docs runs: Python blocks on real ranks, and the options of every command line are parsed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import on

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {
    page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 257, "hidden_size": 48,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1,
    "max_position_embeddings": 256, "dtype": "float32",
}  # fmt: skip
SHORTER = {
    "steps=100": "steps=2",
    "every=100": "every=1",
    "pt.Profile(10, 12,": "pt.Profile(1, 2,",
    "max_steps=100": "max_steps=2, report_to=[], disable_tqdm=True",
    "max_new_tokens=64": "max_new_tokens=4",
    "pt.byte_tokenizer())": "pt.byte_tokenizer(), limit_bytes=50_000)",
}
FRAGMENTS = ("inputs=[processor(...), ...]", 'pt.load_tokens("corpus.txt"', "from openai import OpenAI")
"""Blocks that are compiled only: a call whose arguments are left out, and those that `tests/cli/test_train_data.py` and
`tests/serve/test_docs.py` run."""

PREPARED: dict[str, str] = {
    "docs/guide/adapters.md": """
import partita.torch as pt
model, tokens = pt.load("./model", tp=2), torch.arange(900) % 257
""",
    "README.md": "ids = torch.arange(10)[None]; prompt = [1, 2, 3]; tokens = torch.arange(900) % 257",
    "docs/guide/checkpoints.md": """
import partita.torch as pt
model = pt.load("./model", tp=2)
tokens, settings = torch.arange(900) % 257, pt.TrainSettings(steps=2, batch_size=2, sequence_length=8)
""",
    "docs/guide/gguf.md": """
from pathlib import Path
from tests.support.gguf_files import CONFIGS, random_model, write_model
if torch.distributed.get_rank() == 0:
    write_model(Path("model.Q4_K_M.gguf"), random_model(CONFIGS["llama"]), ("Q4_0",))
torch.distributed.barrier()
""",
    "docs/guide/mlx.md": "import numpy; prompt = [1, 2, 3]; tokens = numpy.arange(900) % 257",
    "docs/guide/own-loop.md": "batches = [torch.arange(10)[None]] * 2; dataset = range(8)",
    "docs/guide/own-modules.md": """
import runpy, transformers
torch.manual_seed(0)
def model_of_transformers():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY))
class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (torch.nn.Linear(24, 24) for _ in range(4))
    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = Attention()
        self.ff = torch.nn.ModuleDict({"up": torch.nn.Linear(24, 40), "down": torch.nn.Linear(40, 24)})
    def forward(self, x):
        return self.ff["down"](self.ff["up"](self.attn(x)).relu())
module = Module()
x = torch.randn(2, 5, 24)
""",
    "docs/guide/trainer.md": "rows = [{'input_ids': torch.arange(8), 'labels': torch.arange(8)}] * 16",
    "docs/guide/train.md": """
import partita.torch as pt
model = pt.load("./model", tp=2)
tokens, settings = torch.arange(900) % 257, pt.TrainSettings(steps=2, batch_size=2, sequence_length=8)
""",
}
"""What the text around a page's blocks takes for granted."""

BEFORE_EACH = {"docs/guide/own-modules.md": "model_in_memory = model_of_transformers(); x = torch.randn(2, 5, 24)"}
AFTER = {
    "docs/guide/adapters.md": {
        1: """
model = pt.load("./model", tp=2)
pt.add_lora(model, rank=2, seed=0)
for name in ("french", "german"):
    pt.save_adapters(model, name)
model = pt.load("./model", tp=2)
""",
        2: "import shutil; shutil.rmtree('adapters', ignore_errors=True)",
    },
    "docs/guide/own-modules.md": {3: "x = torch.randn(2, 64)"},
}


def python_blocks(page: str) -> list[str]:
    return [code for language, code in BLOCK.findall(TEXTS[page]) if language == "python"]


def run_blocks(page: str, folder: str, engine: str) -> None:
    """Run a page's Python blocks one after the other in `folder`, which has a small model."""
    import numpy
    import torch

    before = Path.cwd()
    os.chdir(folder)
    names: dict[str, Any] = {"torch": torch, "numpy": numpy, "TINY": TINY, "__name__": "page"}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(PREPARED.get(page, ""), names)
            for number, code in enumerate(python_blocks(page)):
                for long, short in SHORTER.items():
                    code = code.replace(long, short)
                exec(BEFORE_EACH.get(page, ""), names)
                exec(AFTER.get(page, {}).get(number, ""), names)
                compiled = compile(code, f"{page}, block {number + 1}", "exec")
                if not any(fragment in code for fragment in FRAGMENTS):
                    exec(compiled, names)
    finally:
        os.chdir(before)
        if engine == "torch":
            import partita.torch

            partita.torch.reset_parallelism()


def save_model(folder: str) -> None:
    import partita.torch as pt

    pt.save(pt.fresh(TINY, tp=2, seed=0), f"{folder}/model", tokenizer=pt.byte_tokenizer())


@pytest.mark.parametrize("page", [page for page in TEXTS if python_blocks(page) and page != "docs/guide/mlx.md"])
def test_python_blocks_run(page: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    if "spec_from_config" in TEXTS[page]:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text(json.dumps({**TINY, "num_hidden_layers": 32}))
    else:
        on(2, save_model, str(tmp_path))
    on(2, run_blocks, page, str(tmp_path), "torch")


def test_python_blocks_of_mlx_run(tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    from tests.support.mlx_ranks import on_mlx

    on(2, save_model, str(tmp_path))
    on_mlx(2, run_blocks, "docs/guide/mlx.md", str(tmp_path), "mlx")


def commands(page: str) -> list[list[str]]:
    """The arguments of each command of `partita` that a page shows."""
    found = []
    for language, code in BLOCK.findall(TEXTS[page]):
        for line in code.replace("\\\n", " ").splitlines() if language in ("sh", "") else ():
            shown = (
                re.search(r"^(?:\$ |.*-m )?partita (.*)", line) if language == "sh" or line.startswith("$") else None
            )
            if shown is not None and not line.startswith("pip"):
                found.append([word for word in shlex.split(shown[1], comments=True) if word != "..."])
    return found


@pytest.mark.parametrize("page", [page for page in TEXTS if commands(page)])
def test_command_lines_are_parsed(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    from partita.cli.app import app

    monkeypatch.chdir(tmp_path)
    for name in ("plan.json", "story.txt", "book.txt", "config.json"):
        Path(name).write_text("{}")
    Path("runs/adapted/adapters").mkdir(parents=True)
    group: Any = typer.main.get_command(app)
    for words in commands(page):
        try:
            command = group.commands[words[0]]
            command.make_context(words[0], list(words[1:]))
        except Exception as error:
            raise AssertionError(f"{page}: partita {shlex.join(words)}: {error}") from error
