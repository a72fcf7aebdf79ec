"""Data that a caller passes from Python: ids, texts, rows with columns, or batches of a loader."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from partita.core.model.spec import ModelSpec
from partita.errors import ModelError, PlanError
from partita.generation import Tokenizer
from partita.ranks.groups import AxisGroups, Communicator
from partita.training.data.encode import Encoded, encode_all
from partita.training.data.records import Text, records_of
from partita.training.data.rows import IGNORED, Part, Rows, TextPart
from partita.training.data.samples import Samples
from partita.training.data.store import Store
from partita.training.settings import TrainSettings
from partita.training.state import digest_of

if TYPE_CHECKING:
    import numpy as np

    Ints = np.ndarray[Any, Any]

FORMS = "one row of ids, a list of texts or of ids, a datasets.Dataset, rows with `input_ids`, or a loader of batches of these"


@dataclass(frozen=True)
class Run:
    """What data is prepared for.

    Attributes:
        settings: The training settings.
        spec: The model.
        groups: The ranks.
        tokenizer: The tokenizer of texts.
    """

    settings: TrainSettings
    spec: ModelSpec
    groups: AxisGroups[Communicator]
    tokenizer: Tokenizer | None = None


def training_data(
    tokens: Any, eval_data: Any, run: Run
) -> tuple[Samples | Batches, Samples | Batches | None, TrainSettings]:
    """The data and the evaluation data that a caller passes, and the settings with the steps of their epochs.

    Raises:
        PlanError: The data has another form, or ids that are not in the vocabulary.
        ModelError: Texts need a tokenizer, or a row cannot be used.
    """
    data = data_of(tokens, run)
    evaluated = data_of(eval_data, run, "eval_data") if eval_data is not None else None
    settings = run.settings
    if settings.epochs is not None:
        settings = replace(settings, steps=data.steps(settings.epochs, settings.batch_size), epochs=None)
    return data, evaluated, settings


def data_of(given: Any, run: Run, name: str = "tokens") -> Samples | Batches:
    """The data that a caller passes as argument `name`.

    Args:
        given: One row of ids is a text, a list of texts is one behind the other, each with the end token. A list of ids, and
            rows with `input_ids` and perhaps `labels` and `attention_mask`, are documents with a row each. Rows with other
            columns are encoded as those of files are. If `input_ids` has two dimensions, each item is a complete batch.
        run: What the data is for.
        name: The name of the argument, for errors.

    Raises:
        PlanError: The data has another form, or ids that are not in the vocabulary.
        ModelError: Texts need a tokenizer, or a row cannot be used.
    """
    if isinstance(given, Samples):
        return _checked(given, run, name)
    if hasattr(given, "ndim"):
        given = _array(given)
        if given.ndim == 1:
            return _checked(_text(given, run, name), run, name)
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise PlanError(f"{name} must be {FORMS}, but is {type(given).__name__}.")
    items = iter(given)
    first = next(items, None)
    if first is None:
        raise PlanError(f"{name} is empty. Give {FORMS}.")
    if isinstance(first, Mapping) and "input_ids" in first and _array(first["input_ids"]).ndim == 2:
        return Batches(given, run, name, chain([first], items) if items is given else None)
    every = chain([first], items)
    if not isinstance(first, str | Mapping) and _array(first).ndim == 0:
        return _checked(_text(_array(list(every)), run, name), run, name)
    return _checked(Samples.of([Store.of(_encoded(every, first, run, name))], run.settings), run, name)


def _text(ids: Ints, run: Run, name: str) -> Samples:
    import numpy as np

    if not np.issubdtype(ids.dtype, np.integer):
        raise PlanError(f"{name} must be whole numbers [tokens], but are {ids.dtype} of shape {ids.shape}.")
    if len(ids) and int(ids.min()) < 0:
        raise PlanError(_outside(name, run.spec.vocab_size, int(ids.min()), int(ids.max())))
    if run.settings.packing:
        return Samples.of([Store.of(iter([Encoded(ids.tolist())]))], run.settings)
    part: Part = TextPart(ids, run.settings.sequence_length, digest_of(ids), int(ids.max(initial=0)))
    return Samples(((part,),))


def _outside(name: str, vocab_size: int, low: int, high: int) -> str:
    return f"{name} must be ids from 0 to {vocab_size - 1}, but one is {low if low < 0 else high}."


def _checked(samples: Samples, run: Run, name: str) -> Samples:
    if samples.largest >= (run.spec.vocab_size or 1 << 62):
        raise PlanError(_outside(name, run.spec.vocab_size, 0, samples.largest))
    return samples


def _array(value: Any) -> Ints:
    import numpy as np

    on_cpu = getattr(value, "cpu", None)
    return np.asarray(on_cpu() if callable(on_cpu) else value)


def _encoded(items: Iterable[Any], first: Any, run: Run, name: str) -> Iterator[Encoded]:
    if not isinstance(first, str) and not (isinstance(first, Mapping) and "input_ids" not in first):
        return (_document(item, f"{name}[{place}]") for place, item in enumerate(items))
    if run.tokenizer is None:
        raise ModelError(f"{name} has texts, which need a tokenizer. Give tokenizer=load_tokenizer(folder), or ids.")
    if isinstance(first, str):
        return encode_all((Text(str(text)) for text in items if text), run.tokenizer, name)
    rows = ((f"row {place}", row) for place, row in enumerate(items))
    return encode_all(records_of(rows, name), run.tokenizer, name)


def _document(item: Any, where: str) -> Encoded:
    import numpy as np

    row = item if isinstance(item, Mapping) else {"input_ids": item}
    if "input_ids" not in row:
        raise PlanError(f"{where} has no `input_ids`, which the first row has. Give {FORMS}.")
    ids = _array(row["input_ids"])
    if ids.ndim != 1 or not len(ids) or not np.issubdtype(ids.dtype, np.integer) or int(ids.min()) < 0:
        raise PlanError(f"{where}: input_ids must be ids [tokens], but are {ids.dtype} of shape {ids.shape}.")
    labels = _array(row["labels"]) if row.get("labels") is not None else ids
    kept = _array(row["attention_mask"]) != 0 if row.get("attention_mask") is not None else np.ones(len(ids), bool)
    if labels.shape != ids.shape or kept.shape != ids.shape:
        raise PlanError(f"{where}: labels {labels.shape} and attention_mask {kept.shape} must be of shape {ids.shape}.")
    trained = labels != IGNORED
    if (labels[trained & kept] != ids[trained & kept]).any():
        raise PlanError(
            f"{where}: labels must be the id itself or {IGNORED}, in the place of the id: the model is shifted, not they. Give "
            "batches of two dimensions for other labels."
        )
    return Encoded(ids[kept].tolist(), trained[kept].tolist())


@dataclass
class Batches:
    """Batches of a loader: each item is the complete batch of a step, the same on every rank.

    Replicas take equal parts; a batch that does not divide is filled up with rows without labels. After its last batch a loader
    begins again. A resumed run passes over the batches that it has seen.

    Attributes:
        loader: The loader.
        run: What the data is for.
        name: The name of the argument, for errors.
        once: The batches, if they can be read only once.
    """

    loader: Any
    run: Run
    name: str
    once: Iterator[Any] | None = None
    tokens: int = 0
    digest: str = "batches of a loader"
    _items: Iterator[Any] | None = field(default=None, init=False)
    _next: int = field(default=0, init=False)

    def rows(self, step: int, settings: TrainSettings, replicas: int, replica: int) -> list[Rows]:
        """The micro-batches of a replica in a step. Every rank must call it."""

        def read() -> Rows:
            item = self._take()
            while self._next <= step:
                item = self._take()
            return self._read(item)

        return self._divided(read, settings, replicas, replica)

    def in_order(self, settings: TrainSettings, replicas: int, replica: int) -> Iterator[list[Rows]]:
        """All batches once."""
        if self.once is not None:
            raise PlanError(f"{self.name} can be read only once. Give a list or a loader, which can be read again.")
        return (self._divided(partial(self._read, item), settings, replicas, replica) for item in iter(self.loader))

    def steps(self, epochs: int, batch_size: int) -> int:
        """The steps of some epochs."""
        if self.once is None and hasattr(self.loader, "__len__"):
            return epochs * len(self.loader)
        raise PlanError(f"epochs={epochs} needs data of known length, but {self.name} has none. Give steps instead.")

    @property
    def notes(self) -> list[str]:
        """Nothing of the batches is left out."""
        return []

    def _take(self) -> Any:
        if self._items is None:
            self._items = self.once if self.once is not None else iter(self.loader)
        item = next(self._items, None)
        if item is None and self.once is None:
            self._items = iter(self.loader)
            item = next(self._items, None)
        if item is None:
            raise PlanError(f"{self.name} ended after {self._next} batches. Give more of them, or fewer steps.")
        self._next += 1
        return item

    def _divided(self, read: Callable[[], Rows], settings: TrainSettings, replicas: int, replica: int) -> list[Rows]:
        parts = replicas * settings.microbatches
        rows = self._agreed(read)
        rows = _filled(rows, -(-len(rows.ids) // parts) * parts)
        return rows.split(replicas)[replica].split(settings.microbatches)

    def _agreed(self, read: Callable[[], Rows]) -> Rows:
        """What `read` returns. Raises an error on every rank if it does so on one, or if the ranks read different batches."""
        rows, failure = None, None
        try:
            rows = read()
        except Exception as error:
            failure = error
        mine = "" if rows is None else str(zlib.crc32(rows.ids.tobytes() + rows.labels.tobytes()))
        found = {mine}
        for comm in self.run.groups.axes:
            found = {one for others in comm.all_gather_object(sorted(found)) for one in others}
        if failure is not None:
            raise failure
        if len(found) > 1:
            raise ModelError(
                f"{self.name} differs between ranks, but every rank must be given the same batches. Shuffle with a seeded "
                "generator (torch.Generator().manual_seed(...)), and leave distributed samplers out."
            )
        assert rows is not None
        return rows

    def _read(self, item: Any) -> Rows:
        import numpy as np

        if not isinstance(item, Mapping) or "input_ids" not in item:
            raise PlanError(f"{self.name}: a batch must have `input_ids`, as the first one has.")
        given = {
            key: _array(item[key])
            for key in ("input_ids", "labels", "attention_mask", "position_ids")
            if item.get(key) is not None
        }
        ids = given["input_ids"]
        for key, value in given.items():
            if value.shape != ids.shape or ids.ndim != 2 or ids.shape[1] < 2 or value.dtype.kind not in "iub":
                raise PlanError(
                    f"{self.name}: {key} must be whole numbers [batch, tokens] of at least 2 tokens, as all of a batch, but is "
                    f"{value.dtype} of shape {value.shape}."
                )
        labels = given.get("labels", ids)
        self._refuse_unknown(np.concatenate([ids.ravel(), labels[labels != IGNORED]]), given.get("position_ids"))
        self.run.spec.refuse_beyond_positions(ids.shape[1] - 1, "a sequence")
        ids = ids.astype(np.int64)
        mask = given["attention_mask"] != 0 if "attention_mask" in given else None
        labels = labels.astype(np.int64)
        if mask is not None and "labels" not in given:
            labels = np.where(mask, ids, IGNORED)
        mask = None if mask is None or mask.all() else mask
        return Rows(ids, labels, mask, given.get("position_ids"), is_masked="labels" in given)

    def _refuse_unknown(self, ids: Ints, positions: Ints | None) -> None:
        vocabulary = self.run.spec.vocab_size
        low, high = int(ids.min()), int(ids.max())
        if not 0 <= low <= high < (vocabulary or 1 << 62):
            raise PlanError(_outside(self.name, vocabulary, low, high))
        if positions is not None and not self.run.settings.packing:
            raise PlanError(
                f"{self.name} has position_ids, which are for rows of several documents. Set packing=True, with "
                "which the model "
                "is tested for them first, or leave them out."
            )


def _filled(rows: Rows, count: int) -> Rows:
    """The rows with rows without labels behind, `count` in all."""
    import numpy as np

    missing = count - len(rows.ids)
    if not missing:
        return rows

    def more(value: Ints | None) -> Ints | None:
        return None if value is None else np.concatenate([value, np.repeat(value[-1:], missing, 0)])

    labels = np.concatenate([rows.labels, np.full((missing, rows.labels.shape[1]), IGNORED)])
    ids, mask = more(rows.ids), more(rows.mask)
    assert ids is not None
    return Rows(ids, labels, mask, more(rows.positions), rows.is_masked)
