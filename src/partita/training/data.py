"""Training text: files as tokens, and the tokens of each step, independent of mesh and engine."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from partita.errors import ModelError
from partita.generation import Tokenizer

TEXT_ENDINGS = (".txt", ".md", ".py", ".rst", ".jsonl", ".json", ".c", ".h", ".html")

if TYPE_CHECKING:
    import numpy as np

    Ids = np.ndarray[tuple[int], np.dtype[np.int64]]


def read_ids(source: str, tokenizer: Tokenizer, *, limit_bytes: int = 64 << 20) -> Ids:
    """Read all text of a source as one row of ids, with the end token after each file.

    Args:
        source: A text file, a folder of text files, or `stdlib`: the sources of the running Python's standard library.
        tokenizer: The tokenizer that encodes the text.
        limit_bytes: Total size after which further files, in the order of their paths, are left out.

    Returns:
        int64 ids `[tokens]`, the same on every machine that has the same files.

    Raises:
        ModelError: As `texts` does.
    """
    import numpy as np  # imported late to keep the command line fast

    ids: list[Ids] = []
    end = np.array(sorted(tokenizer.eos_ids)[:1], np.int64)
    for text in texts(source, limit_bytes=limit_bytes):
        ids += [np.array(tokenizer.inner.encode(text, verbose=False), np.int64), end]
    return np.concatenate(ids)


def texts(source: str, *, limit_bytes: int = 64 << 20) -> Iterator[str]:
    """The texts of a source that are not empty, at least one. The arguments are those of `read_ids`.

    Raises:
        ModelError: The source does not exist, has no text, or has a text that is not UTF-8.
    """
    total, found = 0, False
    for file in _files(source):
        try:
            raw = file.read_bytes()
        except OSError as error:
            raise ModelError(
                f"--data {source}: {file} cannot be read: {error.strerror}. Leave it out, or fix it."
            ) from error
        total += len(raw)
        if found and total > limit_bytes:
            break
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(
                f"--data {source}: {file} must be text in UTF-8, but its byte {error.start} is 0x{raw[error.start]:02x}. "
                "Convert it (iconv -t utf-8), or leave it out."
            ) from error
        if text:
            found = True
            yield text
    if not found:
        raise ModelError(
            f"--data {source}: there is no text in it. Give a text file, or a folder with {', '.join(TEXT_ENDINGS)}."
        )


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


def row_starts(tokens: int, step: int, batch_size: int, sequence_length: int, seed: int) -> list[int]:
    """The start positions, in a text of `tokens` ids, of the sequences of one step. They depend on seed and step only.

    An epoch is a random order of the positions `0, sequence_length, 2 * sequence_length, ...` of the text, new for each epoch.

    Raises:
        ModelError: The text is shorter than a sequence and its last target.
    """
    places = (tokens - 1) // sequence_length
    if places < 1:
        raise ModelError(
            f"the text has {tokens} tokens, which is less than one sequence of {sequence_length} + 1. "
            "Give more text or a smaller --sequence-length."
        )
    indices = (divmod(index, places) for index in range(step * batch_size, (step + 1) * batch_size))
    return [order(places, seed * 1_000_003 + epoch)[place] * sequence_length for epoch, place in indices]


@lru_cache(maxsize=2)
def order(count: int, seed: int) -> tuple[int, ...]:
    """A random permutation of `count` positions, equal to `torch.randperm` with a CPU generator of this seed.

    It swaps each position with itself or a later one (Durstenfeld 1964, algorithm 235), sampled by a Mersenne twister.
    """
    import numpy as np

    draws = np.random.RandomState(seed & 0xFFFFFFFF).randint(0, 1 << 32, size=max(0, count - 1), dtype=np.uint32)
    places = list(range(count))
    for i, draw in enumerate(draws.tolist()):
        other = i + draw % (count - i)
        places[i], places[other] = places[other], places[i]
    return tuple(places)
