"""Chat templates that go through the parts of a content left a content that is a text out, without an error."""

from __future__ import annotations

from typing import Any

import pytest

from partita.errors import CheckpointError
from partita.generation.tokenizer import Tokenizer, byte_tokenizer
from partita.training.data.encode import encode
from partita.training.data.records import Chat

OF_PARTS = (
    "{% for message in messages %}[{{ message['role'] }}]"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
OF_TEXTS = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] | trim }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
OF_BOTH = (
    "{% for message in messages %}[{{ message['role'] }}]"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PARTS: list[dict[str, Any]] = [{"type": "text", "text": "Once "}, {"type": "text", "text": "upon"}]


def with_template(template: str) -> Tokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.inner.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [OF_PARTS, OF_TEXTS, OF_BOTH])
@pytest.mark.parametrize("content", ["Once upon", PARTS])
def test_either_form_of_a_content_is_shown(template: str, content: Any) -> None:
    messages = [{"role": "system", "content": "Brief"}, {"role": "user", "content": content}]
    tokenizer = with_template(template)
    assert tokenizer.decode(tokenizer.encode_messages(messages)) == "[system]Brief[user]Once upon[assistant]"


@pytest.mark.parametrize("template", [OF_PARTS, OF_TEXTS])
def test_training_shows_the_same(template: str) -> None:
    tokenizer = with_template(template)
    made = encode(Chat([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]), tokenizer, "data")
    assert tokenizer.decode(made.ids) == "[user]Hi[assistant]Ho"
    assert made.trained is not None
    assert tokenizer.decode([i for i, trained in zip(made.ids, made.trained, strict=True) if trained]) == "Ho"


def test_a_part_that_is_no_text_is_refused() -> None:
    with pytest.raises(CheckpointError, match="a part of a message must be"):
        with_template(OF_PARTS).encode_messages(
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]
        )
