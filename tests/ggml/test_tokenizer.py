"""Tokenizers from GGUF metadata against the published form of the same tokenizers, built by transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from partita.checkpoint.find import find_model
from partita.errors import CheckpointError
from partita.generation import load_tokenizer
from partita.generation.tokenizer import byte_characters
from tests.support.gguf_files import CONFIGS, random_model, write_model

TEXTS = ("the thing", " a  b\n\n c", "Zoë 東京 12345 don't", "<think>the<eos>", "")


def _folder(place: Path, data: dict[str, Any]) -> Path:
    (place / "gguf_tokenizer.json").write_text(
        json.dumps({f"tokenizer.ggml.{key}": value for key, value in data.items()})
    )
    return place


def test_a_model_has_its_tokenizer_and_template(tmp_path: Path) -> None:
    write_model(tmp_path / "model.gguf", random_model(CONFIGS["llama"]), ("Q8_0",))
    tokenizer = load_tokenizer(find_model(tmp_path / "model.gguf"))
    for text in TEXTS:
        assert tokenizer.inner.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("the<think>") == [259, 260]
    assert tokenizer.decode(tokenizer.encode("the<eos>")) == "the"
    assert tokenizer.eos_ids == {257}
    text = tokenizer.inner.decode(tokenizer.encode_chat("the"))
    assert text == "user: the<eos>assistant:"
    with pytest.raises(CheckpointError, match=r"model\.gguf is a file, but a tokenizer is read from a folder"):
        load_tokenizer(tmp_path / "model.gguf")
    # The second time it is the saved one.
    assert load_tokenizer(find_model(tmp_path / "model.gguf")).encode(TEXTS[2]) == tokenizer.encode(TEXTS[2])


BYTES = [*byte_characters(), "<s>", "</s>", "12", "Ġt", "Ġth", "he"]
MERGES = ["1 2", "Ġ t", "Ġt h", "h e"]


def _ids(tmp_path: Path, text: str, **data: Any) -> list[str]:
    tokens = {"model": "gpt2", "tokens": BYTES, "merges": MERGES, "token_type": [1] * 256 + [3, 3] + [1] * 4}
    tokenizer = load_tokenizer(_folder(tmp_path, {**tokens, **data}))
    return [BYTES[i] for i in tokenizer.encode(text)]


@pytest.mark.parametrize(
    ("split", "expected"),
    [("gpt-2", ["Ġth", "e", "Ġ", "12"]), ("smollm", ["Ġth", "e", "Ġ", "1", "2"]), ("qwen2", ["Ġth", "e", "Ġ", "1", "2"]),
     ("llama-bpe", ["<s>", "Ġth", "e", "Ġ", "12"]), ("gpt-4o", ["Ġth", "e", "Ġ", "12"]), ("falcon", ["Ġth", "e", "Ġ", "12"]),
     ("lfm2", ["<s>", "Ġth", "e", "Ġ", "12"]), ("deepseek-coder", ["Ġth", "e", "Ġ", "1", "2"])],
)  # fmt: skip
def test_texts_are_split_into_words_as_the_file_says(split: str, expected: list[str], tmp_path: Path) -> None:
    assert _ids(tmp_path, " the 12", pre=split, bos_token_id=256) == expected


WORDS = "I'LL Isn't 1234567 fooBar(x)/\n\n a+b"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"pre": "gpt-2"}, ["I", "'", "LL", " Isn", "'t", " 1234567", " fooBar", "(", "x", ")/", "\n\n", " a", "+", "b"]),
        ({"pre": "gpt-4o"}, ["I'LL", " Isn't", " ", "123", "456", "7", " foo", "Bar", "(x", ")/\n\n", " a", "+b"]),
        ({"pre": "falcon"}, ["I", "'", "LL", " Isn", "'", "t", " ", "123", "456", "7", " fooBar", "(", "x", ")/", "\n\n", " a",
                             "+", "b"]),
        ({"pre": "deepseek-coder"}, ["I", "'", "LL", " Isn", "'", "t", " ", *"1234567", " fooBar", "(", "x", ")/", "\n", "\n",
                                     " a", "+", "b"]),
        ({"pre": "deepseek-v3"}, ["I", "'LL", " Isn", "'t", " ", "123", "456", "7", " fooBar", "(x", ")/\n\n", " a", "+b"]),
        ({"architecture": "gpt-oss"}, ["I'LL", " Isn't", " ", "123", "456", "7", " foo", "Bar", "(x", ")/\n\n", " a", "+b"]),
    ],
    ids=str,
)  # fmt: skip
def test_words(data: dict[str, Any], expected: list[str], tmp_path: Path) -> None:
    """The words that the regular expressions of the published tokenizers give."""
    content = {f"tokenizer.ggml.{key}": value for key, value in data.items() if key == "pre"}
    content |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": BYTES, "tokenizer.ggml.merges": MERGES}
    (tmp_path / "gguf_tokenizer.json").write_text(json.dumps(content | {k: v for k, v in data.items() if k != "pre"}))
    fast = load_tokenizer(tmp_path).inner.backend_tokenizer
    found = [WORDS[start:end] for _, (start, end) in fast.pre_tokenizer.pre_tokenize_str(WORDS)]
    assert found == expected


def test_a_split_that_the_file_does_not_name_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _ids(tmp_path, "he")
    assert "does not say how its tokenizer splits texts into words" in caplog.text


def test_first_and_last_tokens(tmp_path: Path) -> None:
    ends = {"pre": "gpt-2", "bos_token_id": 256, "eos_token_id": 257, "add_bos_token": True, "add_eos_token": True}
    assert _ids(tmp_path, "he", **ends) == ["<s>", "he", "</s>"]


def _sentencepiece(prefix: bool) -> dict[str, Any]:
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁the",
        "▁t",
        "he",
        "▁",
        "t",
        "h",
        "e",
    ]
    scores = [0.0] * 259 + [-2.0, -0.0, -1.0, -3.0, -4.0, -5.0, -6.0]
    kinds = [2, 3, 3] + [6] * 256 + [1] * 7
    return {
        "model": "llama", "tokens": pieces, "scores": scores, "token_type": kinds, "bos_token_id": 1, "eos_token_id": 2,
        "unknown_token_id": 0, "add_space_prefix": prefix,
    }  # fmt: skip


def test_sentencepiece(tmp_path: Path) -> None:
    """As in Llama 2's published tokenizer.json: a space before the text, bytes for unknown characters, merges by score."""
    data = _sentencepiece(prefix=True)
    tokenizer = load_tokenizer(_folder(tmp_path, data))
    names = [data["tokens"][i] for i in tokenizer.encode("the thé")]
    assert names == ["<s>", "▁the", "▁t", "h", "<0xC3>", "<0xA9>"]
    for text in ("the thé", " the", "the  the\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_without_a_space_before_the_text(tmp_path: Path) -> None:
    data = _sentencepiece(prefix=False)
    tokenizer = load_tokenizer(_folder(tmp_path, data))
    assert [data["tokens"][i] for i in tokenizer.encode("the the")] == ["<s>", "t", "he", "▁the"]
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="a tokenizer of the kind 'rwkv', which cannot be read: gpt2 and llama can"
    ):
        load_tokenizer(_folder(tmp_path, {"model": "rwkv", "tokens": ["a"]}))
