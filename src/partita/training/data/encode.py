"""Records to ids, and which of these ids are trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import Any

from partita.errors import ModelError
from partita.generation import Tokenizer
from partita.training.data.files import DataFile
from partita.training.data.records import TOLD, Chat, Completion, Record, Text, records

BATCH = 256
BATCH_CHARACTERS = 8 << 20
"""The most texts that are encoded at once, which a fast tokenizer does in parallel, and the size after which no more follow."""


@dataclass(frozen=True)
class Encoded:
    """An encoded record.

    Attributes:
        ids: Its ids.
        trained: For each id whether it is trained on; None for a text, or a block of one: all ids are.
        ends: Whether the text ends with it.
    """

    ids: list[int]
    trained: list[bool] | None = None
    ends: bool = True


def encode_all(given: Iterator[Record], tokenizer: Tokenizer, name: str) -> Iterator[Encoded]:
    """Encode records in order. A text and a completion end with the end token; a conversation ends as its template says.

    Raises:
        ModelError: The tokenizer has no chat template, or one whose parts of the assistant cannot be found.
    """
    for group in _groups(given):
        first = group[0]
        if isinstance(first, Text):
            texts = [record for record in group if isinstance(record, Text)]
            for ids, text in zip(
                tokenizer.encode_each([text.text for text in texts], special=first.begins), texts, strict=True
            ):
                yield Encoded(ids + _end(tokenizer) if text.ends else ids, None, text.ends)
        else:
            yield encode(first, tokenizer, name)


def _groups(given: Iterator[Record]) -> Iterator[list[Record]]:
    """The records in order: texts that are encoded alike in groups, all others alone."""
    group: list[Record] = []
    group_begins, characters = None, 0
    for record in given:
        begins = record.begins if isinstance(record, Text) else None
        is_full = len(group) == BATCH or characters >= BATCH_CHARACTERS
        if group and (begins is None or begins is not group_begins or is_full):
            yield group
            group, characters = [], 0
        group.append(record)
        group_begins = begins
        characters += len(record.text) if isinstance(record, Text) else 0
    if group:
        yield group


def encode_files(
    files: Iterable[DataFile], tokenizer: Tokenizer, text_column: str = "text", read: TOLD = lambda count: None
) -> Iterator[Encoded]:
    """Encode the records of files in order, small text files several at once. Arguments and errors are those of `records`."""
    for is_text, group in groupby(files, lambda file: file.format == "text"):
        if is_text:
            texts = chain.from_iterable(records(file, text_column, read) for file in group)
            yield from encode_all(texts, tokenizer, "text")
            continue
        for file in group:
            yield from encode_all(records(file, text_column, read), tokenizer, file.name)


def encode(record: Record, tokenizer: Tokenizer, name: str) -> Encoded:
    """Encode one prompt with its completion, or a conversation; see `encode_all`."""
    if isinstance(record, Completion):
        return _completion(record, tokenizer)
    assert isinstance(record, Chat)
    return _chat(record, tokenizer, name)


def _end(tokenizer: Tokenizer) -> list[int]:
    return sorted(tokenizer.eos_ids)[:1]


def _completion(record: Completion, tokenizer: Tokenizer) -> Encoded:
    """Prompt and completion are encoded together, as generation sees them. A token that belongs to both is trained on."""
    prompt = tokenizer.inner.encode(record.prompt, verbose=False)
    ids = [*tokenizer.inner.encode(record.prompt + record.completion, verbose=False), *_end(tokenizer)]
    same = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), min(len(prompt), len(ids)))
    return Encoded(ids, [i >= same for i in range(len(ids))])


def _chat(record: Chat, tokenizer: Tokenizer, name: str) -> Encoded:
    inner = tokenizer.inner
    template = getattr(inner, "chat_template", None)
    if not template:
        raise ModelError(
            f"{name} has conversations, but the model's tokenizer has no chat template. Use a model with one (a "
            "chat or instruct "
            "model), add a chat_template.jinja to its folder, or give `prompt` and `completion` columns."
        )
    try:
        record = replace(record, messages=tokenizer.as_template_messages(record.messages))
        if "generation" in _tags(template) and not record.start:
            made = inner.apply_chat_template(
                list(record.messages),
                tools=record.tools,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            trained = [bool(one) for one in made["assistant_masks"]]
            return Encoded([int(i) for i in made["input_ids"]], trained)
        return _by_prefixes(record, tokenizer, name)
    except ModelError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(
            f"{name}: the tokenizer's chat template cannot render a conversation: {why}. Fix its messages (roles, "
            "and their order)."
        ) from error


def _tags(template: Any) -> set[str]:
    """The names of the blocks in a template, or in any of several."""
    import re

    texts = template.values() if isinstance(template, Mapping) else [template]
    return {found for text in texts for found in re.findall(r"{%-?\s*(\w+)", str(text))}


def _by_prefixes(record: Chat, tokenizer: Tokenizer, name: str) -> Encoded:
    """Find each message of the assistant between the texts of the conversation before it and up to it."""

    def rendered(count: int, *, prompts: bool = False) -> str:
        return str(
            tokenizer.inner.apply_chat_template(
                list(record.messages[:count]), tools=record.tools, tokenize=False, add_generation_prompt=prompts
            )
        )

    messages = record.messages
    whole = rendered(len(messages))
    spans = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant" or place < record.start:
            continue
        before, after = rendered(place, prompts=True) if place else "", rendered(place + 1)
        if not (whole.startswith(after) and after.startswith(before)):
            raise ModelError(
                f"{name}: the tokenizer's chat template renders the beginning of a conversation in another way "
                "than the complete "
                "conversation, so the assistant's tokens cannot be found. Mark them in the template with "
                "{% generation %} ... {% endgeneration %}, or give one `prompt` and `completion` for each answer."
            )
        spans.append((len(before), len(after)))
    return _marked(whole, spans, tokenizer, name)


def _marked(text: str, spans: list[tuple[int, int]], tokenizer: Tokenizer, name: str) -> Encoded:
    """Encode a text whose characters in `spans` are trained on. The first character of a token decides for it."""
    inner = tokenizer.inner
    if not getattr(inner, "is_fast", False):
        raise ModelError(
            f"{name}: {type(inner).__name__} does not report the characters of its tokens, so the assistant's tokens cannot be "
            "found. Use a model with a fast tokenizer (tokenizer.json), or mark them in its chat template with "
            "{% generation %}."
        )
    made = inner(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    trained = [any(start <= first < stop for start, stop in spans) for first, _ in made["offset_mapping"]]
    return Encoded([int(i) for i in made["input_ids"]], trained)


def fingerprint(tokenizer: Tokenizer) -> str:
    """A digest of all that decides the ids of a text or a conversation."""
    inner = tokenizer.inner
    fast = getattr(inner, "backend_tokenizer", None)
    facts = {
        "class": type(inner).__name__,
        "model": fast.to_str() if fast is not None else sorted(inner.get_vocab().items()),
        "settings": {k: repr(v) for k, v in sorted(inner.init_kwargs.items()) if "path" not in k and "file" not in k},
        "template": getattr(inner, "chat_template", None),
        "ends": sorted(tokenizer.eos_ids),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
