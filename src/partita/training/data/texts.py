"""A source as one row of ids in memory, for callers from Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

from partita.errors import ModelError
from partita.generation import Tokenizer
from partita.training.data.encode import encode_files
from partita.training.data.files import DataFile, files_of

if TYPE_CHECKING:
    import numpy as np

    Ids = np.ndarray[tuple[int], np.dtype[np.int64]]


def read_ids(source: str, tokenizer: Tokenizer, *, limit_bytes: int | None = None) -> Ids:
    """Read all texts of a source as one row of ids, with the end token after each text.

    Args:
        source: A file, a folder, a glob, or `stdlib`: the sources of the running Python's standard library.
        tokenizer: The tokenizer that encodes the text.
        limit_bytes: Total size after which further files, in the order of their paths, are left out (default: none is).

    Returns:
        int64 ids `[tokens]`, the same on every machine that has the same files.

    Raises:
        ModelError: The source or a file of it cannot be read, or has no text of which all ids are trained on.
    """
    import numpy as np

    files: list[DataFile] = []
    total = 0
    for file in files_of(source):
        total += file.size_bytes
        if files and limit_bytes is not None and total > limit_bytes:
            break
        files.append(file)
    ids: list[Ids] = []
    for one in encode_files(files, tokenizer):
        if one.trained is not None:
            raise ModelError(
                f"{source} has prompts or conversations, of which only some tokens are trained on, so they are no row of ids. "
                "Give its rows to `train`, with a tokenizer."
            )
        ids.append(np.array(one.ids, np.int64))
    return np.concatenate(ids)
