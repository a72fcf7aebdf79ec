"""Training text: files as tokens, and which of them each step sees, whatever the mesh."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from partita.errors import ModelError
from partita.text import Tokenizer

TEXT_ENDINGS = (".txt", ".md", ".py", ".rst", ".jsonl", ".json", ".c", ".h", ".html")


def load_tokens(source: str, tokenizer: Tokenizer, *, limit_bytes: int = 64 << 20) -> Tensor:
    """All text of a source as one row of ids, each file ended by the end token.

    Args:
        source: A text file, a folder of text files, or `stdlib`: the sources of the running Python's standard library.
        tokenizer: Makes the ids.
        limit_bytes: Files beyond this many bytes in all are left out, in the order of their paths.

    Returns:
        int64 ids `[tokens]`, the same on every machine that has the same files.

    Raises:
        ModelError: There is no such source, or no text in it.
    """
    ids: list[Tensor] = []
    end = torch.tensor(sorted(tokenizer.eos_ids)[:1], dtype=torch.long)
    total = 0
    for file in _files(source):
        text = file.read_bytes()
        total += len(text)
        if ids and total > limit_bytes:
            break
        decoded = text.decode("utf-8", errors="replace")
        if decoded:
            ids += [torch.tensor(tokenizer.inner.encode(decoded, verbose=False), dtype=torch.long), end]
    if not ids:
        raise ModelError(
            f"--data {source}: there is no text in it. Give a text file, or a folder with {', '.join(TEXT_ENDINGS)}."
        )
    return torch.cat(ids)


def _files(source: str) -> Iterator[Path]:
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        yield from sorted(file for file in root.glob("*.py") if file.is_file())
        return
    path = Path(source)
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in TEXT_ENDINGS)
    else:
        raise ModelError(f"--data {source}: there is no such file or folder. Give one, or `stdlib`.")


def batch(tokens: Tensor, step: int, batch_size: int, sequence_length: int, seed: int) -> Tensor:
    """The sequences of one step: it depends on the seed and the step, and on nothing of the mesh.

    An epoch is a random order of the places `0, sequence_length, 2 * sequence_length, ...` of the text; each has its own.

    Returns:
        int64 ids `[batch_size, sequence_length + 1]`: inputs, and one behind them the targets.
    """
    places = (len(tokens) - 1) // sequence_length
    if places < 1:
        raise ModelError(
            f"the text has {len(tokens)} tokens, which is less than one sequence of {sequence_length} + 1. "
            "Give more text or a smaller --sequence-length."
        )
    first = step * batch_size
    rows = []
    order: Tensor | None = None
    order_of = -1
    for index in range(first, first + batch_size):
        epoch, place = divmod(index, places)
        if order is None or epoch != order_of:
            order = torch.randperm(places, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
            order_of = epoch
        start = int(order[place]) * sequence_length
        rows.append(tokens[start : start + sequence_length + 1])
    return torch.stack(rows)
