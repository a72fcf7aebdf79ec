"""The tokenizer that a GGUF file describes, built with the tokenizers library.

The file holds the vocabulary, the merges or scores, and the names of llama.cpp's kinds of tokenizer and of splits into words.
Sources: llama.cpp's llama-vocab.cpp, and the published `tokenizer.json` of the models that it names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from partita.errors import CheckpointError
from partita.notes import note

_CONTROL, _USER_DEFINED = 3, 4
_SPACE = "\u2581"
"""SentencePiece's sign for a space."""

_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")
_DEEPSEEK_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK_V3 = (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK_WORDS)

_SPLITS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "dbrx", "smaug-bpe", "glm4",
         "chatglm-bpe"), (_LLAMA3,)
    ),
    **dict.fromkeys(
        ("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan", "solar-open", "grok-2", "kormo"), (_QWEN2,)
    ),
    "tekken": (_TEKKEN,),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), (_GPT4O,)),
    **dict.fromkeys(("bloom", "poro-chat", "gpt3-finnish"), (_BLOOM,)), "viking": (_BLOOM, r"\p{N}"),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"), (r"\p{N}", _GPT2)
    ),
    **dict.fromkeys(
        ("gpt-2", "gpt2", "mpt", "olmo", "jais", "trillion", "phi-2", "exaone4", "gigachat", "mellum", "a.x-4.0",
         "granite-docling"), (_GPT2,)
    ),
    "falcon": _FALCON, "deepseek-coder": _DEEPSEEK_CODER, "deepseek-v3": _DEEPSEEK_V3, "hunyuan-dense": _DEEPSEEK_V3,
}  # fmt: skip
"""Splits into words: each regular expression splits further what those before it left, and what it matches is a word."""

_WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken")
"""Vocabularies whose words that are tokens are not built from merges, and whose texts begin with a first token."""

_ARCHITECTURES: Mapping[str, str] = {
    "falcon": "falcon", "bloom": "bloom", "gpt-oss": "gpt-4o", "qwen2": "qwen2", "qwen2moe": "qwen2", "qwen3": "qwen2",
    "qwen3moe": "qwen2", "starcoder2": "starcoder", "lfm2": "lfm2", "minimax-m2": "minimax-m2", "gpt2": "gpt-2",
}  # fmt: skip
"""By architecture, the split of its published models, for a file that does not name one."""


def gguf_tokenizer(file: Path) -> Any:
    """transformers' tokenizer for the metadata in a file of a GGUF model's folder.

    Raises:
        CheckpointError: llama.cpp's kind of tokenizer is not known here, or its data is incomplete.
    """
    from transformers import PreTrainedTokenizerFast

    data = json.loads(file.read_text(encoding="utf-8"))
    fast = _built(data)
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    tokens = data["tokenizer.ggml.tokens"]
    ids = {name: data.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    special = {name: tokens[i] for name, i in ids.items() if type(i) is int and 0 <= i < len(tokens)}
    template = data.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, clean_up_tokenization_spaces=False, **special,
        **({"chat_template": template} if isinstance(template, str) else {}),
    )  # fmt: skip


def _built(data: Mapping[str, Any]) -> Any:
    from tokenizers import AddedToken

    kind = data.get("tokenizer.ggml.model")
    split = ""
    if kind == "gpt2":
        split = _split_of(data)
        fast = _byte_level(data, split)
    elif kind == "llama":
        fast = _sentencepiece(data)
    else:
        raise CheckpointError(
            f"the GGUF file has a tokenizer of the kind {kind!r}, which cannot be read: gpt2 and llama can. Use the model's "
            "Hugging Face folder."
        )
    vocabulary = fast.get_vocab()
    kinds = data.get("tokenizer.ggml.token_type") or []
    marked = [(t, k) for t, k in zip(data["tokenizer.ggml.tokens"], kinds, strict=False) if t in vocabulary]
    fast.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in marked if k == _CONTROL])
    fast.add_tokens([AddedToken(t, normalized=False, special=False) for t, k in marked if k == _USER_DEFINED])
    _add_ends(fast, data, begins=kind == "llama" or split in _WHOLE_WORDS)
    return fast


def _add_ends(fast: Any, data: Mapping[str, Any], *, begins: bool) -> None:
    """Let texts begin and end with special tokens, as the file says; `begins` is the default for the first."""
    from tokenizers.processors import TemplateProcessing

    tokens, used = data["tokenizer.ggml.tokens"], {}
    for name, default in (("bos", begins), ("eos", False)):
        token = data.get(f"tokenizer.ggml.{name}_token_id")
        if data.get(f"tokenizer.ggml.add_{name}_token", default) is True and type(token) is int:
            used[name] = (tokens[token], token)
    if used:
        first = [used["bos"][0]] if "bos" in used else []
        last = [used["eos"][0]] if "eos" in used else []
        pair = [f"{token}:1" for token in first] + ["$B:1"] + [f"{token}:1" for token in last]
        fast.post_processor = TemplateProcessing(
            single=[*first, "$A", *last], pair=[*first, "$A", *last, *pair], special_tokens=list(set(used.values()))
        )


def _byte_level(data: Mapping[str, Any], split: str) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocabulary = {token: place for place, token in enumerate(data["tokenizer.ggml.tokens"])}
    merges = data.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise CheckpointError(
            "the GGUF file has a byte-level tokenizer without merges. Use the model's Hugging Face folder."
        )
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    fast = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=split in _WHOLE_WORDS))
    words = [pre_tokenizers.Split(Regex(regex), behavior="isolated") for regex in _SPLITS[split]]
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([*words, plain])
    if _QWEN2 in _SPLITS[split]:
        fast.normalizer = normalizers.NFC()
    fast.decoder = decoders.ByteLevel()
    return fast


def _split_of(data: Mapping[str, Any]) -> str:
    """The name of the split into words: the file's or, if it names none, that of its architecture."""
    split, architecture = data.get("tokenizer.ggml.pre"), data.get("architecture")
    if split is None or split == "default":
        own = _ARCHITECTURES.get(str(architecture))
        if own is None:
            note("the GGUF file does not say how its tokenizer splits texts into words: they are split as GPT-2 does.")
        return own or "gpt-2"
    if split not in _SPLITS:
        note(f"the GGUF file's tokenizer splits texts as {split!r}, which is not known: they are split as GPT-2 does.")
        return "gpt-2"
    return str(split)


def _sentencepiece(data: Mapping[str, Any]) -> Any:
    """A byte-pair vocabulary of SentencePiece, whose merges follow from the scores of its tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens = list(data["tokenizer.ggml.tokens"])
    scores = data.get("tokenizer.ggml.scores")
    is_gemma = str(data.get("architecture", "")).startswith("gemma")
    if is_gemma or not isinstance(scores, list):
        # Gemma's scores do not follow its merges, but its order does; runs of spaces are written as such.
        tokens = [_SPACE * len(token) if " " in token and not token.strip() else token for token in tokens]
        scores = [-place for place in range(len(tokens))]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    given = data.get("tokenizer.ggml.merges")
    merges = [tuple(merge.split(" ", 1)) for merge in given] if isinstance(given, list) else _merges(vocabulary, scores)
    unknown = data.get("tokenizer.ggml.unknown_token_id", 0)
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    fast = Tokenizer(model)
    begins = data.get("tokenizer.ggml.add_space_prefix", not is_gemma) is True
    spaces = normalizers.Replace(" ", _SPACE)
    fast.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if begins else spaces
    parts = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence([*parts, *([decoders.Strip(" ", 1, 0)] if begins else [])])
    return fast


def _merges(vocabulary: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """All divisions of a token into two tokens, the best token first. Source: transformers' SentencePieceExtractor."""
    found: list[tuple[float, list[tuple[str, str]]]] = []
    for token, place in vocabulary.items():
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        if known:
            found.append((scores[place], known))
    found.sort(key=lambda one: -one[0])
    return [pair for _, known in found for pair in known]
