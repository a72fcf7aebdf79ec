"""Which ids of a record are trained on: for conversations those that transformers marks as the assistant's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from partita.errors import ModelError
from partita.generation import Tokenizer, byte_tokenizer, load_tokenizer
from partita.generation.tokenizer import END_OF_TEXT
from partita.training.data.encode import BATCH, Encoded, encode, encode_all, encode_files, fingerprint
from partita.training.data.files import files_of
from partita.training.data.records import Chat, Completion, Record, Text

BEGIN, END = (
    "{% for m in messages %}<{{ m.role }}>",
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
)
PLAIN = f"{BEGIN}{{{{ m.content }}}}{END}"
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ '\\n' }}"
    "{% endgeneration %}"
    "{% else %}{{ m.content }}{{ '\\n' }}{% endif %}{% endfor %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße?"},
    {"role": "assistant", "content": "Hallo ☺"}, {"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"},
]  # fmt: skip


def _tokenizer(template: str | None) -> Tokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.inner.chat_template = template
    return tokenizer


def _trained(made: Encoded) -> str:
    assert made.trained is not None
    return bytes(i for i, on in zip(made.ids, made.trained, strict=True) if on and i < 256).decode()


def test_both_ways_of_finding_the_assistant_agree_with_transformers() -> None:
    marked, plain = (encode(Chat(CHAT), _tokenizer(template), "") for template in (MARKED, PLAIN))
    made = _tokenizer(MARKED).inner.apply_chat_template(
        CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert marked.ids == plain.ids == list(made["input_ids"])
    assert marked.trained == plain.trained == [bool(one) for one in made["assistant_masks"]]
    assert _trained(plain) == "Hallo ☺\n2\n"


def test_a_prompt_of_messages_is_not_trained_on() -> None:
    for template in (PLAIN, MARKED):
        if template is PLAIN:
            assert _trained(encode(Chat(CHAT, None, 4), _tokenizer(template), "")) == "2\n"


def test_a_completion_is_trained_on_with_its_end() -> None:
    made = encode(Completion("ab", "cd"), byte_tokenizer(), "")
    assert made == Encoded([*b"abcd", 256], [False, False, True, True, True])
    assert list(encode_all(iter([Text("ab")]), byte_tokenizer(), "")) == [Encoded([*b"ab", 256])]


class _Pairs:
    """A tokenizer that merges two equal letters, also over the edge of a prompt."""

    eos_token_id = None

    def encode(self, text: str, **options: Any) -> list[int]:
        ids: list[int] = []
        while text:
            size = 2 if text[:1] == text[1:2] else 1
            ids.append(ord(text[0]) * size)
            text = text[size:]
        return ids


def test_a_token_over_the_edge_is_trained_on() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.inner, tokenizer.eos_ids = _Pairs(), frozenset()
    assert encode(Completion("ab", "bc"), tokenizer, "") == Encoded([97, 196, 99], [False, True, True])


STRIPS = (
    "{% for m in messages %}<{{ m.role }}>{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("record", "template", "says"),
    [
        (Chat(CHAT), None, "the model's tokenizer has no chat template. Use a model with one"),
        (Chat(CHAT), STRIPS, "renders the beginning of a conversation in another way.*Mark them in the template"),
        (
            Chat(CHAT),
            "{{ raise_exception('roles must alternate') }}",
            "cannot render a conversation: roles must alternate",
        ),
    ],
)
def test_templates_that_cannot_be_used(record: Record, template: str | None, says: str) -> None:
    with pytest.raises(ModelError, match=f"--data x: .*{says}|--data x .*{says}"):
        encode(record, _tokenizer(template), "--data x")


def test_a_tokenizer_is_recognized_by_all_that_decides_ids() -> None:
    assert fingerprint(byte_tokenizer()) == fingerprint(byte_tokenizer())
    assert fingerprint(_tokenizer(PLAIN)) != fingerprint(byte_tokenizer())
    other = byte_tokenizer()
    other.inner.add_tokens(["<new>"])
    assert fingerprint(other) != fingerprint(byte_tokenizer())


def test_bytes_are_the_ids_of_the_tokenizer_itself(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save(tmp_path)
    texts = [
        "",
        "a b\n\tc",
        "Grüße ☺ 日本 \U0001f600",
        "\x00\x7f",
        "a<|endoftext|>b<|endoftext|>",
        "<|endoftext",
        "é" * 3000,
    ]
    for one in (tokenizer, load_tokenizer(tmp_path)):
        assert one.encode_each(texts) == [one.inner.encode(text) for text in texts]
        assert [one.encode(text) for text in texts] == one.encode_each(texts)
        assert one._is_of_bytes
    other = byte_tokenizer()
    other.inner.add_tokens(["ab"])
    assert Tokenizer(other.inner).encode_each(["cabd"]) == [[99, 257, 100]]


def _begins_with_256() -> Tokenizer:
    """A tokenizer that puts a special token before each text."""
    tokenizer = byte_tokenizer()
    fast = tokenizer.inner.backend_tokenizer
    fast.post_processor = processors.TemplateProcessing(single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 256)])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=END_OF_TEXT))


def test_records_are_encoded_alike_alone_and_among_others(tmp_path: Path) -> None:
    tokenizer = _begins_with_256()
    assert tokenizer.encode("ab") == [256, *b"ab"]
    given: list[Record] = [Text(f"{n}") for n in range(BATCH + 3)]
    given[5:5] = [Text("block", ends=False), Text("next", begins=False, ends=False), Text("last", begins=False)]
    given[9:9] = [Completion("a", "b"), Text("c"), Completion("", "d")]
    expected = [one for record in given for one in encode_all(iter([record]), tokenizer, "")]
    assert list(encode_all(iter(given), tokenizer, "")) == expected
    assert expected[5:8] == [
        Encoded([256, *b"block"], None, False), Encoded([*b"next"], None, False), Encoded([*b"last", 256])
    ]  # fmt: skip
    for name, text in {"a.txt": "a", "b.txt": "b", "c.jsonl": '{"text": "c"}\n', "d.txt": "d"}.items():
        (tmp_path / name).write_text(text)
    assert [one.ids for one in encode_files(files_of(str(tmp_path)), tokenizer)] == [[256, ord(c), 256] for c in "abcd"]
