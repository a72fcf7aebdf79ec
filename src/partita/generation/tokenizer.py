"""Text to ids and back: the checkpoint's own tokenizer, or bytes if it has none."""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from partita.dependencies import reading_code
from partita.errors import CheckpointError
from partita.generation.gguf_tokenizer import gguf_tokenizer

END_OF_TEXT = "<|endoftext|>"

_GGUF = "gguf_tokenizer.json"
"""What a GGUF file says of its tokenizer, in the folder that stands for the file."""

_KEPT = "tokenizer"
"""The folder in that folder with the tokenizer in transformers' format."""

_OF_READING = ("is_local", "local_files_only")
"""Settings in which transformers records the origin of a tokenizer, which are not part of the tokenizer."""


_PROBE = "Hi there"
"""A message that shows which contents a chat template takes."""


class Tokenizer:
    """A tokenizer of transformers.

    Attributes:
        inner: transformers' tokenizer.
        eos_ids: Ids that end a text.
        special_ids: Ids of special tokens, which `decode` leaves out.
        vocab_size: Number of ids.
    """

    def __init__(self, inner: Any, eos_ids: frozenset[int] | None = None) -> None:
        """Wrap a tokenizer; `eos_ids` defaults to its one end token."""
        self.inner = inner
        own = frozenset() if inner.eos_token_id is None else frozenset([int(inner.eos_token_id)])
        self.eos_ids: frozenset[int] = own if eos_ids is None else eos_ids
        added = getattr(inner, "added_tokens_decoder", {})
        self.special_ids = frozenset(inner.all_special_ids) | {i for i, token in added.items() if token.special}
        self.vocab_size = len(inner)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text, by default with the special tokens that the tokenizer adds."""
        if self._is_of_bytes:
            return _ids_of_bytes(text)
        return [int(i) for i in self.inner.encode(text, add_special_tokens=add_special_tokens)]

    def encode_each(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """The ids of each text, computed in parallel; the bytes of long texts are not searched for merges.

        Args:
            texts: The texts.
            special: Whether the special tokens that the tokenizer adds are among them.
        """
        if self._is_of_bytes:
            return [_ids_of_bytes(text) for text in texts]
        return [list(ids) for ids in self.inner(list(texts), add_special_tokens=special, verbose=False)["input_ids"]]

    @functools.cached_property
    def _is_of_bytes(self) -> bool:
        """Whether it is `byte_tokenizer`, or one that was saved and read again."""
        fast = getattr(self.inner, "backend_tokenizer", None)
        if fast is None or self.vocab_size != 257:
            return False
        return bool(fast.to_str() == byte_tokenizer().inner.backend_tokenizer.to_str())

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer comes with a template for the messages of a chat."""
        return bool(getattr(self.inner, "chat_template", None))

    def encode_chat(self, text: str, system: str | None = None) -> list[int]:
        """The ids of a user's message, after a system message if one is given, up to where the answer begins.

        Raises:
            CheckpointError: There is no chat template, or it does not take these messages.
        """
        if not self.has_chat_template:
            raise CheckpointError("the model's tokenizer has no chat template, which --chat applies. Leave --chat out.")
        messages: list[Mapping[str, Any]] = [{"role": "system", "content": system}] if system is not None else []
        return self.encode_messages([*messages, {"role": "user", "content": text}])

    def encode_messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[int]:
        """The ids of a chat.

        Args:
            messages: The messages. Each has a `content` that is a text, or a list of parts `{"type": "text", "text": ...}`.
            tools: The functions that the model may call, as OpenAI's JSON describes them.
            add_generation_prompt: Whether the ids end where the next answer begins.
            settings: Variables for the template, such as `enable_thinking`.

        Raises:
            CheckpointError: There is no chat template, or it does not take these messages.
        """
        if not self.has_chat_template:
            raise CheckpointError("the model's tokenizer has no chat template, so it takes no messages.")
        shown = self.as_template_messages(messages)
        try:
            ids = self.inner.apply_chat_template(
                shown, tools=list(tools) if tools else None, add_generation_prompt=add_generation_prompt,
                return_dict=False, **settings,
            )  # fmt: skip
        except Exception as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"the model's chat template does not take these messages: {why[:300]}") from error
        return [int(i) for i in ids]

    def as_template_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages whose contents have the one form that the chat template shows: texts if it takes them, else lists of parts.

        Raises:
            CheckpointError: A part is no text.
        """
        made = []
        for message in messages:
            content = message.get("content")
            if isinstance(content, (list, tuple)):
                content = "".join(_text_of(part) for part in content)
            if isinstance(content, str) and self._takes_parts_only:
                content = [{"type": "text", "text": content}] if content else []
            made.append({**message, "content": content} if "content" in message else {**message})
        return made

    @functools.cached_property
    def _takes_parts_only(self) -> bool:
        """Whether the chat template leaves out or refuses a content that is a text, but shows the same text as a part."""
        return not self._shows(_PROBE) and self._shows([{"type": "text", "text": _PROBE}])

    def _shows(self, content: Any) -> bool:
        try:
            text = self.inner.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        except Exception:
            return False
        return _PROBE in text

    def decode(self, ids: list[int]) -> str:
        """The text of ids, without special tokens."""
        return str(self.inner.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def name(self, token: int) -> str:
        """A token as its vocabulary writes it; for a special token, its text."""
        return str(self.inner.convert_ids_to_tokens(token))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Save the tokenizer in transformers' format, so that `AutoTokenizer` reads it."""
        self.inner.save_pretrained(folder)
        file = Path(folder) / "tokenizer_config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        kept = {name: value for name, value in config.items() if name not in _OF_READING}
        if kept != config:
            file.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _text_of(part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise CheckpointError(f'a part of a message must be {{"type": "text", "text": ...}} here, but is {part!r:.80}.')


def byte_tokenizer() -> Tokenizer:
    """A tokenizer whose ids 0 to 255 are the bytes of UTF-8 text; 256 ends a text."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Fast
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    fast = Fast(models.BPE(vocab=vocabulary, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT))


def _ids_of_bytes(text: str) -> list[int]:
    """What `byte_tokenizer` encodes a text as."""
    first, *others = text.split(END_OF_TEXT)
    ids = list(first.encode())
    for part in others:
        ids.append(256)
        ids.extend(part.encode())
    return ids


def byte_characters() -> list[str]:
    """The character that byte-level tokenizers write for each byte: itself if printable, else one from U+0100 on.

    Source: GPT-2's `bytes_to_unicode`.
    """
    prints = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in prints else chr(next(others)) for byte in range(256)]


def load_tokenizer(folder: str | os.PathLike[str], *, trust_remote_code: bool = False) -> Tokenizer:
    """Load the tokenizer of a checkpoint, or the byte-level one if the checkpoint has none.

    Args:
        folder: The checkpoint's folder; for a GGUF file the one that `partita.checkpoint.find.find_model` returns.
        trust_remote_code: Whether to run code that comes with the tokenizer. Read it before you do.

    Raises:
        CheckpointError: The tokenizer cannot be read, or needs code of its own; or `folder` is a GGUF file.
    """
    path = Path(folder)
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    if path.suffix.lower() == ".gguf" and path.is_file():
        raise CheckpointError(
            f"{path} is a file, but a tokenizer is read from a folder. Give the folder that stands for the file: "
            "partita.checkpoint.find.find_model(file)."
        )
    if (path / _GGUF).exists():
        _keep_gguf(path)
        path = path / _KEPT
    if not path.is_dir() or not any((path / name).exists() for name in names):
        return byte_tokenizer()
    from transformers import AutoTokenizer

    try:
        with reading_code(trusted=trust_remote_code):
            inner = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise CheckpointError(
                f"the tokenizer in {path} comes with its own code, which is run only on request. If you trust it, "
                "give trust_remote_code=True (--trust-remote-code)."
            ) from error
        why = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"the tokenizer in {path} cannot be read: {why[:300]}") from error
    return Tokenizer(inner)


def _keep_gguf(folder: Path) -> None:
    """Write the tokenizer of a GGUF file in transformers' format into its folder, unless it is there."""
    kept = folder / _KEPT
    if kept.exists():
        return
    made = Tokenizer(gguf_tokenizer(folder / _GGUF))
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".tokenizer-") as place:
            made.save(Path(place) / _KEPT)
            (Path(place) / _KEPT).rename(kept)
    except OSError as error:
        if not kept.exists():  # else another process was faster
            raise CheckpointError(f"{folder}: the tokenizer cannot be written: {error.strerror}.") from error
