"""A stop text that is a special token never ended a text, the space before the first new word was lost, and after a stray byte
the streamed text was not the final one."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Fast

from partita.generation import Sampling, Sequence, Tokenizer, load_tokenizer
from partita.generation.choice import Choice
from partita.generation.new_text import NewText
from partita.generation.tokenizer import byte_characters
from tests.support.ranks import on

SPECIAL = "<|im_end|>"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


# --- tokenizers of the usual kinds ----------------------------------------------------------------------------------------


def byte_level(corpus: list[str]) -> Fast:
    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return fast


def byte_fallback(corpus: list[str]) -> Fast:
    """As Llama 2's."""
    whole = Fast(models.BPE())
    whole.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    whole.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=60, show_progress=False))
    trained = json.loads(whole.to_str())["model"]
    vocabulary = {token: i for i, token in enumerate([*BYTES, *trained["vocab"]])}
    merges = [tuple(pair) for pair in trained["merges"]]
    fast = Fast(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True))
    fast.normalizer = whole.normalizer
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return fast


def metaspace(corpus: list[str]) -> Fast:
    """As T5's."""
    fast = Fast(models.Unigram())
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"])
    fast.train_from_iterator(corpus, trainer)
    return fast


def word_piece(corpus: list[str]) -> Fast:
    """As BERT's."""
    fast = Fast(models.WordPiece(unk_token="[UNK]"))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=60, show_progress=False, special_tokens=["[UNK]"])
    fast.train_from_iterator(corpus, trainer)
    return fast


def word_ends(corpus: list[str]) -> Fast:
    """As GPT-1's."""
    fast = Fast(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=60, show_progress=False, end_of_word_suffix="</w>", special_tokens=["<unk>"]
    )
    fast.train_from_iterator(corpus, trainer)
    return fast


KINDS = {
    "byte-level": byte_level, "byte-fallback": byte_fallback, "metaspace": metaspace, "word-piece": word_piece,
    "word-ends": word_ends,
}  # fmt: skip


def tokenizer(kind: str, corpus: list[str]) -> Tokenizer:
    return _trained(kind, tuple(corpus))


@functools.cache
def _trained(kind: str, corpus: tuple[str, ...]) -> Tokenizer:
    """Trained once for a corpus: the vocabulary of a second training may differ, since equal counts have no order."""
    fast = KINDS[kind](list(corpus))
    fast.add_special_tokens([AddedToken(SPECIAL, special=True, normalized=False)])
    return Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=SPECIAL))


WORDS = st.text(st.sampled_from("abcdé€語😀"), min_size=1, max_size=5)
TEXTS = st.lists(WORDS, min_size=1, max_size=6).map(" ".join)
CORPORA = st.lists(st.lists(WORDS, min_size=2, max_size=6).map(" ".join), min_size=2, max_size=4)
QUICK = settings(max_examples=30, deadline=None, derandomize=True)


# --- properties -----------------------------------------------------------------------------------------------------------


def streamed(tok: Tokenizer, prompt: list[int], ids: list[int], stop: tuple[str, ...] = ()) -> tuple[str, Sequence]:
    """What was passed on while `ids` came, and the sequence at its end."""
    heard: list[str] = []
    sequence = Sequence(0, prompt, len(ids))
    for token in ids:
        sequence.accept(token, Choice(stop=stop), tok)
        sequence.show(lambda place, text: heard.append(text), stop)
        assert sequence.text.startswith("".join(heard))
        if sequence.finish_reason:
            break
    return "".join(heard), sequence


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(corpus=CORPORA, begun=TEXTS, following=TEXTS)
def test_new_text_is_what_the_whole_text_adds(kind: str, corpus: list[str], begun: str, following: str) -> None:
    """Also behind a special token, and where the text is decoded as transformers decodes all of it."""
    tok = tokenizer(kind, [*corpus, begun, following])
    prompt, whole = tok.encode(begun), tok.encode(f"{begun} {following}")
    if whole[: len(prompt)] != prompt:
        return
    before = tok.decode(prompt)
    expected = tok.decode(whole).removeprefix(before)
    assert tok.decode(whole) == before + expected
    special = tok.inner.eos_token_id
    for start in (prompt, [*prompt, special], [special, *prompt]):
        heard, sequence = streamed(tok, start, whole[len(prompt) :])
        assert heard == sequence.text == expected


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(corpus=CORPORA, data=st.data())
def test_any_ids_stream_their_final_text_and_stop_at_once(kind: str, corpus: list[str], data: st.DataObject) -> None:
    tok = tokenizer(kind, corpus)
    some = st.lists(st.integers(0, len(tok.inner) - 1), min_size=1, max_size=12)
    special = st.just([tok.inner.eos_token_id])
    euro = st.just([0xE2, 0x82, 0xAC])
    kinds = st.one_of(some, special, euro) if kind == "byte-fallback" else st.one_of(some, special)
    prompt, parts = data.draw(some), data.draw(st.lists(kinds, min_size=1, max_size=5))
    ids = [token for part in parts for token in part]
    heard, sequence = streamed(tok, prompt, ids)
    assert heard == sequence.text
    if kind == "byte-level":
        assert heard == "".join(lossy(tok, ids))

    new, after = NewText(tok, prompt), []
    for token in ids:
        new.add(token)
        after.append(new.text)
    new.end()
    after[-1] = new.text
    if not new.text:
        return
    start = data.draw(st.integers(0, len(new.text) - 1))
    stop = new.text[start : start + data.draw(st.integers(1, 6))]
    heard, sequence = streamed(tok, prompt, ids, (stop, "never\0"))
    assert len(sequence.tokens) == next(i for i, text in enumerate(after, 1) if stop in text)
    assert heard == sequence.text == new.shown(0, new.text.find(stop))
    assert sequence.finish_reason == "stop"


def lossy(tok: Tokenizer, ids: list[int]) -> Iterator[str]:
    """The texts of byte-level ids between special tokens, as Python decodes their bytes."""
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    run = bytearray()
    for token in ids:
        if token in tok.special_ids:
            yield run.decode("utf-8", "replace")
            run.clear()
        else:
            run += bytes(byte_of[character] for character in tok.name(token))
    yield run.decode("utf-8", "replace")


def test_a_stray_byte_behind_a_character_of_bytes() -> None:
    """transformers' decoder gives up the whole run of bytes, of which a character was shown already."""
    tok = tokenizer("byte-fallback", ["a b"])
    word = tok.encode("a")
    heard, sequence = streamed(tok, word, [*word, 0xE2, 0x82, 0xAC, 0x80, *word])
    assert heard == sequence.text == " a€\ufffd a"


def test_a_byte_behind_a_prompt_that_ends_inside_a_character() -> None:
    """The prompt's own byte is no part of the new text, even if the new byte continues it."""
    tok = tokenizer("byte-level", ["a a"])
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    token_of = {byte_of[tok.name(token)]: token for token in range(len(tok.inner)) if tok.name(token) in byte_of}
    heard, sequence = streamed(tok, [token_of[0xE2]], [token_of[0x82]])
    assert heard == sequence.text == "\ufffd"


# --- on both engines ------------------------------------------------------------------------------------------------------

CHAIN = ["▁a", "▁b", "c", SPECIAL, "▁d", "<0xE2>", "<0x82>", "<0xAC>", "<0x80>", "▁e", "f", "▁g"]
"""The model continues each of these tokens with the next one."""


def written(folder: Path) -> None:
    """A model that continues its prompt along the chain, and its tokenizer."""
    fast = Fast(models.WordLevel({t: i for i, t in enumerate(t for t in CHAIN if t != SPECIAL)}, unk_token="f"))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens([AddedToken(SPECIAL, special=True, normalized=False)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=SPECIAL).save_pretrained(folder)
    ids = [fast.token_to_id(token) for token in CHAIN]
    config = transformers.LlamaConfig(
        vocab_size=len(CHAIN), hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=fast.token_to_id(SPECIAL), bos_token_id=None, dtype="float32",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(CHAIN), 16))
        model.lm_head.weight.zero_()
        for one, following in pairwise(ids):
            model.lm_head.weight[following, one] = 1.0
    model.save_pretrained(folder)


Heard = list[tuple[str, str, int, str]]
"""Of each prompt its text, why it ended, how many tokens it has, and what was streamed of it."""


def generated(folder: str, engine: str, tp: int, pp: int, stops: list[tuple[str, ...]]) -> list[Heard]:
    """Two prompts of different lengths, continued until each of `stops`."""
    if engine == "mlx":
        from partita.mlx.generate import generate
        from partita.mlx.load import load
    else:
        from partita.torch import generate, load  # type: ignore[assignment]
    tok = load_tokenizer(folder)
    prompts = [[tok.inner.convert_tokens_to_ids(token) for token in start] for start in (["▁a"], ["▁a", "▁b", "c"])]
    model: Any = load(folder, tp=tp, pp=pp)
    results = []
    for stop in stops:
        heard = ["", ""]

        def on_text(place: int, text: str, heard: list[str] = heard) -> None:
            heard[place] += text

        sampling = Sampling(max_new_tokens=8, ignore_eos=True, stop=stop)
        found = generate(model, prompts, sampling, tokenizer=tok, on_text=on_text)
        results.append([(one.text, one.finish_reason, len(one.tokens), heard[i]) for i, one in enumerate(found)])
    return results


EXPECTED = {
    (): [(" bc d€\ufffd", "length", 8), (" d€\ufffd ef", "length", 8)],
    (SPECIAL,): [(" bc", "stop", 3), ("", "stop", 1)],
    (" d",): [(" bc", "stop", 4), ("", "stop", 2)],
    ("€",): [(" bc d", "stop", 7), (" d", "stop", 5)],
    (f"c{SPECIAL} d", "\ufffd"): [(" b", "stop", 4), (" d€", "stop", 7)],
}


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("engine", ["torch", "mlx"])
def test_on_real_ranks(tmp_path: Path, engine: str, tp: int, pp: int) -> None:
    written(tmp_path)
    args = (generated, str(tmp_path), engine, tp, pp, list(EXPECTED))
    if engine == "mlx":
        pytest.importorskip("mlx.core")
        from tests.support.mlx_ranks import on_mlx

        results = on_mlx(tp * pp, *args)
    else:
        results = on(tp * pp, *args)
    for rank, found in enumerate(results):
        for stop, expected, generations in zip(EXPECTED, EXPECTED.values(), found, strict=True):
            assert [one[:3] for one in generations] == expected, stop
            assert [one[3] for one in generations] == [one[0] if rank == 0 else "" for one in expected], stop
