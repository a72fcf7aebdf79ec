"""Rows of a micro-batch, and the samples that they are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from partita.errors import ModelError
from partita.training.data.order import places_in
from partita.training.data.packing import packed, pieces_of
from partita.training.data.store import Store

if TYPE_CHECKING:
    import numpy as np

    Ints = np.ndarray[Any, Any]

IGNORED = -100
"""A label that does not count."""


@dataclass(frozen=True)
class Rows:
    """The rows of a micro-batch, in the form of transformers: the model predicts `labels[:, i + 1]` at position i.

    Attributes:
        ids: int64 `[n, length + 1]`.
        labels: int64 `[n, length + 1]`, -100 where an id is not trained on.
        mask: bool `[n, length + 1]`, False for padding; None without padding, and for packed rows.
        positions: int64 `[n, length + 1]`, which begin at 0 with each packed document; None if they count from 0.
        is_masked: Whether a masked language model predicts `labels[:, i]` at position i, instead of ids that are sampled.
    """

    ids: Ints
    labels: Ints
    mask: Ints | None = None
    positions: Ints | None = None
    is_masked: bool = False

    @property
    def targets(self) -> int:
        """Number of labels that count, for a causal model."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    @property
    def tokens(self) -> int:
        """Number of ids that another id of the row follows, whatever the padding."""
        return int((self.mask[:, :-1] & self.mask[:, 1:]).sum()) if self.mask is not None else self.ids[:, :-1].size

    def take(self, start: int, stop: int) -> Rows:
        """Some of the rows."""
        parts = {
            name: value[start:stop]
            for name in ("ids", "labels", "mask", "positions")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, **parts)

    def split(self, count: int) -> list[Rows]:
        """The rows in `count` equal parts."""
        size = len(self.ids) // count
        return [self.take(size * i, size * (i + 1)) for i in range(count)]


@dataclass(frozen=True)
class Sample:
    """One row: ids and labels `[m]`, and for a packed row the positions."""

    ids: Ints
    labels: Ints
    positions: Ints | None = None


def plain_rows(rows: Ints) -> Rows:
    """Rows of which every id is trained on, int `[n, length + 1]`."""
    import numpy as np

    ids = np.ascontiguousarray(rows, np.int64)
    return Rows(ids, ids)


def stacked(samples: Sequence[Sample]) -> Rows:
    """The samples as rows, padded behind to the longest with id 0, label -100."""
    import numpy as np

    longest = max(2, *(len(one.ids) for one in samples))
    if all(len(one.ids) == longest for one in samples):
        ids = np.stack([one.ids for one in samples])
        labels = ids if all(one.labels is one.ids for one in samples) else np.stack([one.labels for one in samples])
        positions = [one.positions for one in samples]
        return Rows(ids, labels, None, np.stack(positions) if positions[0] is not None else None)  # type: ignore[arg-type]
    ids = np.zeros((len(samples), longest), np.int64)
    labels, mask = np.full_like(ids, IGNORED), np.zeros(ids.shape, bool)
    for row, one in enumerate(samples):
        size = len(one.ids)
        ids[row, :size], labels[row, :size], mask[row, :size] = one.ids, one.labels, True
    return Rows(ids, labels, mask)


class Part(ABC):
    """Samples of one kind."""

    tokens: int
    digest: str
    largest: int

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def __getitem__(self, place: int) -> Sample:
        """The sample at a place."""

    def note(self) -> str:
        """What of the data is not trained on, for the user; empty if nothing."""
        return ""


class TextPart(Part):
    """Texts one behind the other, divided into rows of equal length without regard to where a text ends."""

    def __init__(self, ids: Ints, length: int, digest: str, largest: int) -> None:
        """Divide `ids` `[tokens]` into rows of `length` ids and a last target.

        Raises:
            ModelError: There is less than one row.
        """
        self.ids, self.length, self.digest, self.largest, self.tokens = ids, length, digest, largest, len(ids)
        self.places = places_in(self.tokens, length)

    def __len__(self) -> int:
        return self.places

    def __getitem__(self, place: int) -> Sample:
        import numpy as np

        ids = np.asarray(self.ids[place * self.length : (place + 1) * self.length + 1], np.int64)
        return Sample(ids, ids)


class DocumentPart(Part):
    """Documents with a row each, of which only the marked ids are trained on. A row ends after `length` + 1 ids."""

    def __init__(self, store: Store, length: int) -> None:
        """Use the documents of `store`.

        Raises:
            ModelError: No document has an id to train on in its first `length` + 1 ids.
        """
        import numpy as np

        self.store, self.length, self.digest, self.largest = store, length, store.documents_digest, store.largest
        ends = np.asarray(store.ends)
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        self.cut = int((ends - starts > length + 1).sum())
        self.cut_tokens = int(np.maximum(0, ends - starts - length - 1).sum())
        stops = np.minimum(ends, starts + length + 1)
        # An id counts unless it is the first of its document, which nothing predicts.
        marks = np.concatenate([[0], np.cumsum(store.trained, dtype=np.int64)])
        has_target = marks[stops] - marks[np.minimum(starts + 1, stops)] > 0
        self.left_out = int((~has_target).sum())
        self.starts, self.stops = starts[has_target], stops[has_target]
        self.tokens = int((self.stops - self.starts).sum())
        if not len(self):
            raise ModelError(
                f"no document has a token to train on within its first {length + 1} tokens. Use a larger --sequence-length."
            )

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, place: int) -> Sample:
        import numpy as np

        where = slice(int(self.starts[place]), int(self.stops[place]))
        ids = np.asarray(self.store.documents[where], np.int64)
        return Sample(ids, np.where(self.store.trained[where], ids, IGNORED))

    def note(self) -> str:
        """How many documents are cut or left out."""
        said = []
        if self.cut:
            said.append(
                f"{self.cut:,} of {len(self) + self.left_out:,} documents are longer than --sequence-length "
                f"{self.length}: their last "
                f"{self.cut_tokens:,} tokens are not used"
            )
        if self.left_out:
            said.append(f"{self.left_out:,} documents have no token to train on within that length, and are not used")
        return "; ".join(said)


class PackedPart(Part):
    """Rows of `length` + 1 ids with several documents in each; see `packing`.

    Positions begin at 0 with each document, and its first id has no label. What is left of a row is a document without labels.
    """

    def __init__(self, store: Store, documents: DocumentPart | None, length: int) -> None:
        """Pack the texts of `store`, each a document, and `documents`."""
        import numpy as np

        self.store, self.documents, self.length, self.largest = store, documents, length, store.largest
        self.digest = f"{store.texts_digest} {store.documents_digest} packed"
        starts, sizes = pieces_of(np.asarray(store.text_ends), length)
        starts, sizes = starts[sizes > 1], sizes[sizes > 1]
        self.texts = len(starts)
        if documents is not None:
            starts = np.concatenate([starts, documents.starts])
            sizes = np.concatenate([sizes, documents.stops - documents.starts])
        if not len(starts):
            raise ModelError("no text has more than one token, so there is nothing to predict. Give longer texts.")
        self.starts, self.sizes, self.tokens = starts, sizes, int(sizes.sum())
        self.order, self.ends = packed(sizes, length + 1)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, place: int) -> Sample:
        import numpy as np

        ids = np.zeros(self.length + 1, np.int64)
        labels, positions = np.full_like(ids, IGNORED), np.zeros_like(ids)
        at = 0
        for piece in self.order[self.ends[place - 1] if place else 0 : self.ends[place]].tolist():
            start, size = int(self.starts[piece]), int(self.sizes[piece])
            where, here = slice(start, start + size), slice(at, at + size)
            if piece < self.texts:
                ids[here] = labels[here] = self.store.texts[where]
            else:
                ids[here] = self.store.documents[where]
                labels[here] = np.where(self.store.trained[where], ids[here], IGNORED)
            labels[at] = IGNORED
            positions[here] = np.arange(size)
            at += size
        positions[at:] = np.arange(self.length + 1 - at)
        return Sample(ids, labels, positions)

    def note(self) -> str:
        """How full the rows are, and which documents are cut or left out."""
        full = self.tokens / (len(self) * (self.length + 1))
        said = [f"{len(self.starts):,} documents are packed into {len(self):,} rows, which are {full:.0%} full"]
        if self.documents is not None and self.documents.note():
            said.append(self.documents.note())
        return "; ".join(said)


def parts_of(store: Store, length: int, *, is_packed: bool) -> list[Part]:
    """The samples of a store in rows of `length` ids and a last target."""
    documents = DocumentPart(store, length) if len(store.ends) else None
    if is_packed:
        return [PackedPart(store, documents, length)]
    parts: list[Part] = []
    if len(store.texts) or documents is None:
        parts.append(TextPart(store.texts, length, store.texts_digest, store.largest))
    return [*parts, documents] if documents is not None else parts
