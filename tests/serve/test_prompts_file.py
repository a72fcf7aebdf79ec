"""`partita generate --prompts`: its lines, its answers beside each prompt alone, and runs that are interrupted."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from partita.errors import ModelError
from partita.generation import Sampling, load_tokenizer
from partita.serving.answer_lines import AnswerLines
from partita.serving.prompt_lines import PromptLines
from tests.serve.test_command import PARTITA, wait_until_gone
from tests.support.served import save_model
from tests.support.signals import take_signals

COUNT = 8


def _line(i: int) -> dict[str, Any]:
    line: dict[str, Any] = {"prompt": "ab" * (i + 1), "max_tokens": 24 + i, "ignore_eos": True}
    if i % 3 == 1:
        line |= {"temperature": 1.2, "seed": i}
    if i % 3 == 2:
        line = {"messages": [{"role": "user", "content": f"Hi {i}"}], "id": f"chat {i}", "stop": ["e", "\n"]}
    return line


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [json.dumps(_line(i)) for i in range(COUNT)]
    file.write_text("\n".join([*lines[:3], "", *lines[3:], json.dumps({"prompt": "x" * 1001})]))
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("answering") / "tiny")


def _command(model: Path, prompts: Path, out: Path, *options: str) -> list[str]:
    more = ["--max-sequences", "2", "--max-new-tokens", "24", "--temperature", "0", "--cache-bytes", "256KiB", *options]
    return [*PARTITA, "generate", str(model), "--prompts", str(prompts), "--out", str(out), *more]


def _started(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=take_signals)


def _wait_for_lines(process: subprocess.Popen[str], out: Path, count: int) -> None:
    deadline = time.monotonic() + 90
    while not out.exists() or out.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _check(model: Path, out: Path) -> None:
    """Every answer is what `generate` gives for its prompt alone, and the last prompt does not fit."""
    from partita.torch.collectives.groups import single_groups
    from partita.torch.generate import generate
    from partita.torch.load import load

    *answers, last = map(json.loads, out.read_text().splitlines())
    split, tokenizer = load(model, groups=single_groups()), load_tokenizer(model)
    assert [answer["index"] for answer in answers] == list(range(COUNT))
    for i, answer in enumerate(answers):
        line = _line(i)
        is_chat = "messages" in line
        ids = tokenizer.encode_messages(line["messages"]) if is_chat else tokenizer.encode(line["prompt"])
        sampling = Sampling(
            max_new_tokens=line.get("max_tokens", 24), temperature=line.get("temperature", 0.0), seed=line.get("seed", 0),
            stop=tuple(line.get("stop", ())), ignore_eos=line.get("ignore_eos", False),
        )  # fmt: skip
        (alone,) = generate(split, [ids], sampling, tokenizer=tokenizer)
        assert (answer["text"], tuple(answer["tokens"])) == (alone.text, alone.tokens)
        assert answer["finish_reason"] == ("length" if alone.finish_reason == "length" else "stop")
        new = len(alone.tokens)
        assert answer["usage"] == {
            "prompt_tokens": len(ids), "completion_tokens": new, "total_tokens": len(ids) + new
        }  # fmt: skip
        assert (answer.get("id"), answer["error"]) == (line.get("id"), None)
    assert (last["index"], last["finish_reason"], last["tokens"]) == (COUNT, "error", [])
    assert "context has 1024 tokens, but the prompt has 1001 and 24 new ones" in last["error"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_and_a_half_written_line_are_continued(model: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    process = _started(_command(model, prompts, out))
    _wait_for_lines(process, out, 2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.splitlines()[-1]) == (130, "interrupted")
    wait_until_gone(model)
    kept = out.read_bytes().splitlines(keepends=True)
    assert 2 <= len(kept) < COUNT
    out.write_bytes(b"".join(kept[:-1]) + kept[-1][:-9])
    ended = subprocess.run(_command(model, prompts, out), capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    assert f"has {len(kept) - 1} answer{'s' if len(kept) > 2 else ''} of {COUNT + 1}, which are kept." in ended.stderr
    assert (
        f"1 of {COUNT + 1} prompts have an error in {out}; the first is prompt {COUNT}: this model's context"
        in ended.stderr
    )
    _check(model, out)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("options", [["--tp", "2"], ["--pp", "2"], ["--dp", "2"], ["--cp", "2"]])
def test_killed_ranks_are_continued_in_another_layout(
    model: Path, prompts: Path, tmp_path: Path, options: list[str]
) -> None:
    out = tmp_path / "answers.jsonl"
    process = _started(_command(model, prompts, out, *options))
    _wait_for_lines(process, out, 2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    wait_until_gone(model)
    assert 2 <= len(out.read_text().splitlines()) < COUNT
    for more in (["--tp", "2", "--pp", "2"], options):
        ended = subprocess.run(
            _command(model, prompts, out, *more, "--json"), capture_output=True, text=True, timeout=200
        )
        assert ended.returncode == 0, ended.stderr
        assert json.loads(ended.stdout)["done"] == COUNT + 1
        _check(model, out)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON: "),
        ('"Once"', 'must be a JSON object, as in {"prompt": "Once"}, but is "Once".'),
        ("{}", "must have either prompt or messages."),
        ('{"prompt": "a", "messages": []}', "must have either prompt or messages."),
        ('{"prompt": [1, "a"]}', "prompt must be a text or a list of ids, but is (1, 'a')."),
        ('{"messages": ["a"]}', "messages must be a list of objects with a role and a content, but is ['a']."),
        ('{"prompt": "a", "temprature": 1}', "'temprature' is no setting. A line has prompt or messages, id, and any of"),
        ('{"prompt": "a", "temperature": -1}', "temperature must be a finite number of at least 0 (0 is greedy), but is -1."),
        ('{"prompt": "a", "max_tokens": 3, "max_new_tokens": 4}', "max_new_tokens sets max_new_tokens, which the line sets"),
        ('{"prompt": "a", "ignore_eos": 1}', "ignore_eos must be true or false, but is 1."),
        ('{"prompt": "a", "logit_bias": {"b": 1}}', "logit_bias must be numbers by id"),
        ('{"prompt": "a", "stop": 3}', "stop must hold texts"),
        ('{"prompt": "a", "id": [1]}', "id must be a text or a whole number, but is [1]."),
        ('{"prompt": "\\ud800"}', "prompt is not UTF-8 text"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n\n{line}\n')
    with pytest.raises(ModelError) as caught:
        PromptLines(file, Sampling())
    assert str(caught.value).startswith(f"--prompts {file}, line 3: {message}")


def test_settings_of_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": [1, 2], "logit_bias": {"7": -1}, "seed": null, "bad_words_ids": [[1]], "stop": "x"}\n')
    (line,) = PromptLines(file, Sampling(seed=4))
    assert line.prompt == (1, 2)
    assert line.sampling == Sampling(seed=4, logit_bias={7: -1}, bad_words_ids=((1,),), stop=("x",))


def _answers(file: Path, *done: int) -> AnswerLines:
    answers = AnswerLines(file, 3, lambda index: f"key {index}")
    for index in done:
        answers.add(index, {"text": "t", "error": None})
    return answers


def test_answers_are_kept_repaired_and_ordered(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    with _answers(file, 2) as answers:
        answers.add(1, {"text": "", "error": "too long"})
        with pytest.raises(ModelError, match="is being written by another process"):
            _answers(file)
    whole = file.read_bytes()
    for cut in range(len(whole)):
        file.write_bytes(whole[:cut])
        with _answers(file) as answers:
            assert answers.done == ({2} if b"\n" in whole[:cut] else set())
    file.write_bytes(whole)
    with _answers(file, 1, 0) as answers:
        assert answers.done == {2}
        answers.finish()
    assert [json.loads(line)["index"] for line in file.read_text().splitlines()] == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a text", "has a line at byte 0 that is no answer: b'a text'"),
        ("{}\n", "has a line at byte 0 that is no answer"),
        ('{"index": 1, "key": "key 2", "error": null}\n', "has an answer with index 1 to another prompt"),
        ('{"index": 3, "key": "key 3", "error": null}\n', "has an answer with index 3 to another prompt"),
        ('{"index": 1, "key": "key 1", "error": null}\n' * 2, "has two answers with index 1"),
    ],
)
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text(text)
    with pytest.raises(ModelError, match=message):
        _answers(file)
    assert file.read_text() == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "{p}"], "--prompts needs --out"),
        (["--out", "{o}"], "--out needs --prompts"),
        (["--prompts", "{p}", "--out", "{p}"], "must be a file for the answers alone"),
        (["--prompts", "{p}", "--out", "{o}/no/a"], "there is no folder"),
        (["--prompts", "-", "--out", "{o}"], "--prompts - must be a file"),
        (["--prompts", "{o}", "--out", "{o}.2"], "cannot be read: No such file or directory"),
        (["Once", "--prompts", "{p}", "--out", "{o}"], "--prompts takes all prompts from its file"),
        (["--prompts", "{p}", "--out", "{o}", "--compile"], "--compile does not work with --prompts"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(
    model: Path, prompts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    from partita.cli.app import app

    given = [argument.format(p=prompts, o=tmp_path / "o") for argument in arguments]
    with pytest.raises(SystemExit) as ended:
        app(["generate", str(model), *given])
    assert ended.value.code == 2
    err = capfd.readouterr().err
    assert message in " ".join(err.split())
    assert "Traceback" not in err


def test_a_full_disk_ends_the_run(model: Path, prompts: Path, tmp_path: Path) -> None:
    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))

    out = tmp_path / "answers.jsonl"
    ended = subprocess.run(
        _command(model, prompts, out), capture_output=True, text=True, timeout=100, preexec_fn=limit_files
    )
    assert (ended.returncode, ended.stderr.splitlines()[-1]) == (2, f"error: {out}: cannot be written: File too large")
    assert out.stat().st_size == 1500
