"""`partita train` on every kind of data: the commands and the program of the guide, mixtures, and a run that resumes."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run
from tests.cli.models import TINY, write
from tests.support.ranks import ROOT

GUIDE = (ROOT / "docs" / "guide" / "data.md").read_text()
COMMANDS = re.findall(r"^partita (train .*?) *(?:#.*)?$", GUIDE, re.M)
PROGRAM = re.findall(r"```python\n(.*?)```", GUIDE, re.S)[0]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SMALL = ("--batch-size", "4", "--sequence-length", "64")


def _jsonl(path: Path, *rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the guide names."""
    import datasets

    import partita.torch as pt
    from partita.torch.collectives.groups import single_groups

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path / "cache"))
    tokenizer = pt.byte_tokenizer()
    tokenizer.inner.chat_template = TEMPLATE
    pt.save(pt.fresh(TINY, seed=1, groups=single_groups()), tmp_path / "model", tokenizer=tokenizer)
    Path("corpus.txt").write_text("All work and no play.\n" * 60)
    Path("notes/a").mkdir(parents=True)
    Path("notes/a/b.md").write_text("# A note\n" * 20)
    _jsonl(Path("rows.jsonl"), *({"body": f"row {i} " * 9} for i in range(30)))
    for name in ("questions", "held-out"):
        _jsonl(Path(f"{name}.jsonl"), *({"prompt": f"{i} + 1 = ", "completion": f"{i + 1}"} for i in range(26)))
    chats = [
        [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes" * (1 + i % 4)}] for i in range(20)
    ]
    datasets.Dataset.from_list([{"messages": one} for one in chats]).to_parquet("chats.parquet")
    return tmp_path


def test_the_commands_of_the_guide(partita: Run, folder: Path) -> None:
    found = []
    for command in COMMANDS:
        arguments = shlex.split(command)
        said = partita(*arguments, *SMALL, *(() if "--epochs" in arguments else ("--steps", "2")), "--json")
        assert said.code == 0, said.err
        found.append(json.loads(said.out))
    text, column, questions, chats, mixture = found
    assert [len(one["steps"]) for one in (text, column, mixture)] == [2, 2, 2]
    assert [one["step"] for one in questions["steps"] if one["eval_loss"] is not None] == [5, 7]
    assert questions["eval_loss"] == questions["steps"][-1]["eval_loss"] < questions["steps"][4]["eval_loss"]
    # 20 conversations, two of which fit into a row.
    assert len(chats["steps"]) == 3
    assert text["eval_loss"] is None


def test_the_program_of_the_guide(folder: Path) -> None:
    exec(compile(PROGRAM, "docs/guide/data.md", "exec"), {})


def test_a_run_resumes_with_its_data(partita: Run, folder: Path) -> None:
    data = ("--data", "questions.jsonl:2", "--data", "corpus.txt:1", "--eval-data", "held-out.jsonl")
    new = ("train", "--config", write(folder, TINY), *data, *SMALL)
    whole = partita(*new, "--eval-every", "2", "--steps", "4", "--json")
    assert whole.code == 0, whole.err
    begun = partita(*new, "--eval-every", "2", "--steps", "2", "--save-every", "2", "--out", "run")
    assert begun.code == 0, begun.err
    # All steps are of the warm-up, so that the learning rates do not depend on the length of the run.
    resumed = partita("train", "--resume", "--out", "run", "--steps", "4", "--json")
    assert resumed.code == 0, resumed.err
    steps = json.loads(resumed.out)["steps"]
    expected = json.loads(whole.out)["steps"]
    keys = ("step", "loss", "eval_loss", "learning_rate", "grad_norm", "tokens")
    assert [[one[key] for key in keys] for one in steps] == [[one[key] for key in keys] for one in expected[2:]]
    other = partita("train", "--resume", "--out", "run", "--steps", "6", "--data", "corpus.txt")
    assert other.code == 2
    assert "the options specify another run, which differs in the text" in other.err


def test_rows_are_shown_instead_of_training(partita: Run, folder: Path) -> None:
    said = partita("train", "--model", "model", "--data", "chats.parquet", "--show-sample", "2", "--out", "run")
    assert said.code == 0, said.err
    first, text, *rest = said.out.splitlines()
    assert re.fullmatch(r"row 1: \d+ tokens, \d+ trained on", first)
    assert re.fullmatch(r"  <user>\d+\?", text)
    assert re.fullmatch(r"<assistant>❮(yes)+", rest[0])
    assert [line for line in said.out.splitlines() if line.startswith("row")][1].startswith("row 2")
    assert not Path("run").exists() or not list(Path("run").glob("*.safetensors"))
    packed = partita("train", "--model", "model", "--data", "questions.jsonl", "--packing", "--show-sample", "1")
    assert packed.out.count("❮") > 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            "--data corpus.txt --epochs 2 --steps 3",
            "--epochs 2 decides the number of steps, so --steps 3 must be left out.",
        ),
        (
            "--data corpus.txt --eval-every 3",
            "--eval-every needs data to evaluate on. Give --eval-data, or leave it out.",
        ),
        ("--data corpus.txt:2 --data rows.jsonl", "--data rows.jsonl has no weight, but others have one."),
        ("--data corpus.txt:-1", "a weight must be a number above 0, but is -1."),
        ("--data corpus.txt --eval-data no.txt", "--data no.txt: there is no such file or folder."),
        ("--data rows.jsonl", "rows.jsonl has no usable column: a row must have `text`"),
        ("--data chats.parquet --sequence-length 4", "no document has a token to train on within its first 5 tokens"),
    ],
)
def test_what_is_refused(partita: Run, folder: Path, options: str, says: str) -> None:
    said = partita("train", "--model", "model", *shlex.split(options))
    assert said.code == 2
    assert says in said.err
    assert "Traceback" not in said.err
