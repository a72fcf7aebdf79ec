"""`generate --chat` applies the tokenizer's template to one prompt; without it a line tells that there is one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from partita.generation import byte_tokenizer
from tests.cli.conftest import Run
from tests.cli.models import TINY

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
HINT = "note: the model has a chat template, which --chat applies to the prompt.\n"


def saved(folder: Path, template: str | None) -> str:
    from partita.torch.collectives.groups import single_groups
    from partita.torch.new import fresh
    from partita.torch.weights.save import save

    tokenizer = byte_tokenizer()
    tokenizer.inner.chat_template = template
    save(fresh(TINY, seed=3, groups=single_groups()), folder, tokenizer=tokenizer)
    return str(folder)


@pytest.mark.parametrize("engine", ["torch", "mlx"])
def test_the_template_is_applied(partita: Run, tmp_path: Path, engine: str) -> None:
    if engine == "mlx":
        pytest.importorskip("mlx_lm")
    model = saved(tmp_path / "m", TEMPLATE)
    line = ("generate", model, "Hi", "--engine", engine, "--max-new-tokens", "2", "--json")
    plain = partita(*line)
    assert HINT in plain.err
    assert json.loads(plain.out)["generations"][0]["prompt_tokens"] == list(b"Hi")
    for options, expected in (
        (("--chat",), b"<user>Hi\n<assistant>"),
        (("--chat", "--system", "Be brief."), b"<system>Be brief.\n<user>Hi\n<assistant>"),
    ):
        said = partita(*line, *options)
        assert said.code == 0, said.err
        assert HINT not in said.err
        (one,) = json.loads(said.out)["generations"]
        assert (one["prompt"], one["prompt_tokens"]) == ("Hi", list(expected))


def test_what_is_refused(partita: Run, tmp_path: Path) -> None:
    model = saved(tmp_path / "m", None)
    no_template = partita("generate", model, "Hi", "--chat")
    assert no_template.code == 2
    assert "has no chat template, which --chat applies. Leave --chat out." in no_template.err
    no_chat = partita("generate", model, "Hi", "--system", "Be brief.")
    assert no_chat.code == 2
    assert "--system is a message of a chat. Give --chat, or leave it out." in no_chat.err
    assert HINT not in no_chat.err
    other = saved(tmp_path / "other", TEMPLATE.replace("'tool'", "'user'"))
    refused = partita("generate", other, "Hi", "--chat")
    assert refused.code == 2
    assert "chat template does not take these messages: no tools" in refused.err
