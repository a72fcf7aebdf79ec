"""New text of random ids: its parts are the full text, end at whole characters, and take linear time."""

from __future__ import annotations

import io
import json
import random
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer as Fast
from tokenizers import decoders

from partita.generation import Sequence as Generated
from partita.generation import Tokenizer, byte_tokenizer, load_tokenizer
from partita.generation.choice import Choice
from partita.generation.new_text import MOST_WAITING_TOKENS, REPLACEMENT, NewText
from tests.bugs.test_stop_texts_and_spaces import byte_level, metaspace, word_piece

CORPUS = [
    "The quick brown fox, isn't it? It does not jump .", "über den faulen Hund, naïve café", "語彙を学ぶ 言葉の木",
    "price: 12 € or 13,5 €! 😀 👍🏽", "def f(x):\n    return x  # two  spaces", "a b c d e f g",
] * 4  # fmt: skip
"""English, accents, Japanese, signs of two code points, code with runs of spaces."""


def wrapped(fast: Fast) -> Tokenizer:
    return Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=fast))


def sentence_piece(kind: str) -> Tokenizer:
    """A model of Google's own trainer, with bytes for unknown characters; as Llama 2's (bpe) or Gemma's (unigram)."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=340, model_type=kind, byte_fallback=True,
        character_coverage=0.98, hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(model.getvalue())
        kind = "LlamaTokenizer" if kind == "bpe" else "T5Tokenizer"
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
        tok = load_tokenizer(folder)
    tok.inner.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tok


def cleaned_up(corpus: list[str]) -> Fast:
    """As BERT's, whose decoder also removes spaces before punctuation."""
    fast = word_piece(corpus)
    fast.decoder = decoders.WordPiece(cleanup=True)
    return fast


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": byte_tokenizer,
    "byte-level": lambda: wrapped(byte_level(CORPUS)),
    "sentencepiece-bpe": lambda: sentence_piece("bpe"),
    "sentencepiece-unigram": lambda: sentence_piece("unigram"),
    "metaspace": lambda: wrapped(metaspace(CORPUS)),
    "word-piece": lambda: wrapped(word_piece(CORPUS)),
    "word-piece-cleanup": lambda: wrapped(cleaned_up(CORPUS)),
}
tokenizer = cache(lambda kind: KINDS[kind]())


class Counting(Tokenizer):
    """Counts the ids that are decoded."""

    def __init__(self, tok: Tokenizer) -> None:
        super().__init__(tok.inner)
        self.ids = 0

    def decode(self, ids: list[int]) -> str:
        self.ids += len(ids)
        return super().decode(ids)


def byte_of(tok: Tokenizer, token: int) -> int | None:
    """The byte of a byte token `<0x0A>`."""
    name = tok.name(token)
    return int(name[3:5], 16) if len(name) == 6 and name.startswith("<0x") else None


def some_ids(tok: Tokenizer, rng: random.Random, count: int) -> list[int]:
    """Random ids; byte tokens only as the bytes of whole characters, as a decoder replaces a whole run of invalid ones."""
    bytes_of = {byte: i for i in range(tok.vocab_size) if (byte := byte_of(tok, i)) is not None}
    plain = [i for i in range(tok.vocab_size) if byte_of(tok, i) is None and i not in tok.special_ids]
    ids: list[int] = []
    while len(ids) < count:
        if bytes_of and rng.random() < 0.4:
            ids += [bytes_of[byte] for byte in rng.choice("aé€語😀\n").encode()]
        else:
            ids.append(rng.choice(plain))
    return ids


def parts_of(tok: Tokenizer, ids: Sequence[int], prompt: list[int]) -> list[str]:
    sequence = Generated(0, prompt, len(ids))
    parts: list[str] = []
    for token in ids:
        sequence.accept(token, Choice(), tok)
        sequence.show(lambda place, text: parts.append(text))
    return parts


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_of_random_ids_are_the_full_text(kind: str) -> None:
    tok = tokenizer(kind)
    for seed in range(60):
        ids = some_ids(tok, random.Random(seed), 40)
        parts = parts_of(tok, ids, [])
        assert "".join(parts) == tok.decode(ids), seed
        later = NewText(tok, [])
        for token in ids:
            later.add(token)
            assert not later.text.endswith(REPLACEMENT) or later.text in tok.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_no_part_ends_inside_a_character(kind: str) -> None:
    """Of a valid text, no part has a replacement character, and each is UTF-8."""
    tok = tokenizer(kind)
    for text in ("12 € 😀語", "naïve 👍🏽 über", "a\n\nb  c", "😀😀語語"):
        prompt, ids = tok.encode("a b"), tok.encode(text)
        ids = [i for i in ids if i not in tok.special_ids]
        parts = parts_of(tok, ids, prompt)
        assert REPLACEMENT not in "".join(parts)
        "".join(parts).encode()
        assert "".join(parts) == tok.decode(prompt + ids).removeprefix(tok.decode(prompt))


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_is_decoded_a_bounded_number_of_times(kind: str) -> None:
    """Whatever the length of the text; ids are counted, since times depend on the machine."""
    tok = Counting(tokenizer(kind))
    ids = some_ids(tok, random.Random(1), 400)
    counts = []
    for length in (200, 400):
        tok.ids = 0
        parts_of(tok, ids[:length], tok.encode("a b"))
        counts.append(tok.ids)
    assert counts[1] < 2.5 * counts[0]
    assert counts[1] < 12 * 400


@pytest.mark.parametrize("run", [[0x80], [0xE2], [0xF0, 0x9F, 0x98], [0x80, 0xE2]])
@pytest.mark.parametrize("kind", ["bytes", "byte-level", "sentencepiece-bpe"])
def test_a_run_of_bytes_that_is_no_text_is_not_decoded_again_and_again(kind: str, run: list[int]) -> None:
    tok = Counting(tokenizer(kind))
    places = {byte_of(tok, i): i for i in range(tok.vocab_size)}
    if kind != "sentencepiece-bpe":
        names = {name: byte for byte, name in enumerate(map(byte_tokenizer().name, range(256)))}
        places = {names.get(tok.name(i)): i for i in range(tok.vocab_size)}
    ids = [places[byte] for byte in run] * 120
    parts_of(tok, ids, tok.encode("a"))
    assert tok.ids < 4 * (2 * MOST_WAITING_TOKENS) * len(ids) / 3
    tok.ids = 0
    text = "".join(parts_of(tok, ids, tok.encode("a")))
    if kind != "sentencepiece-bpe":
        assert text == (bytes(run) * 120).decode("utf-8", "replace")
    assert set(text) == {REPLACEMENT}


def test_a_stop_text_spans_tokens() -> None:
    tok = tokenizer("sentencepiece-bpe")
    ids = [i for character in "a 語b" for i in tok.encode(character)]
    for stop in (" 語", "語", "b"):
        sequence, parts = Generated(0, [], len(ids)), list[str]()
        for token in ids:
            sequence.accept(token, Choice(stop=(stop,)), tok)
            sequence.show(lambda place, text, parts=parts: parts.append(text), (stop,))  # type: ignore[misc]
            if sequence.finish_reason:
                break
        assert sequence.finish_reason == "stop"
        assert "".join(parts) == sequence.text == tok.decode(ids).partition(stop)[0]


def test_a_rank_that_prints_nothing_decodes_at_the_end_only() -> None:
    tok = Counting(byte_tokenizer())
    sequence = Generated(0, [97], 4, is_streamed=False)
    for token in "é b".encode():
        sequence.accept(token, Choice(), tok)
    assert tok.ids == 0
    assert sequence.generation(tok).text == "é b"
    with_stop = Generated(0, [97], 4, is_streamed=False)
    for token in "é b".encode():
        if not with_stop.finish_reason:
            with_stop.accept(token, Choice(stop=(" b",)), tok)
    assert with_stop.generation(tok).text == "é"
