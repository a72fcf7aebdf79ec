"""Which samples a step sees: each once an epoch, by weights in a mixture, on every replica its own; and how rows are packed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita.errors import ModelError
from partita.training import TrainSettings, row_starts
from partita.training.data.encode import Encoded
from partita.training.data.order import permuted
from partita.training.data.packing import packed, pieces_of
from partita.training.data.rows import IGNORED, Rows
from partita.training.data.samples import BLOCK, Samples
from partita.training.data.store import Store

SETTINGS = TrainSettings(batch_size=4, sequence_length=6, seed=3)


def _documents(*lengths: int, first: int = 1) -> Store:
    """Documents whose ids are all different; all but the first id of each are trained on."""
    starts = np.cumsum([first, *lengths])
    return Store.of(
        Encoded(list(range(s, s + n)), [i > 0 for i in range(n)]) for s, n in zip(starts, lengths, strict=False)
    )


def _text(length: int, first: int = 0) -> Store:
    return Store.of(iter([Encoded(list(range(first, first + length)))]))


def _whole(parts: list[Rows]) -> list[list[int]]:
    return [row for one in parts for row in one.ids.tolist()]


def test_one_text_is_divided_as_before() -> None:
    samples = Samples.of([_text(103)], SETTINGS)
    for step in range(10):
        starts = row_starts(103, step, 4, 6, SETTINGS.seed)
        (rows,) = samples.rows(step, SETTINGS, 1, 0)
        assert rows.ids.tolist() == [list(range(start, start + 7)) for start in starts]
        assert rows.labels is rows.ids
        assert rows.mask is None
        assert rows.positions is None


def test_documents_are_padded_and_cut() -> None:
    samples = Samples.of([_documents(3, 9, 5, 2)], SETTINGS)
    rows = samples.parts[0]
    assert [rows[i].ids.tolist() for i in range(4)] == [[1, 2, 3], list(range(4, 11)), list(range(13, 18)), [18, 19]]
    assert samples.notes == ["1 of 4 documents are longer than --sequence-length 6: their last 2 tokens are not used"]
    (batch,) = samples.rows(0, SETTINGS, 1, 0)
    assert batch.mask is not None
    assert (batch.labels[~batch.mask] == IGNORED).all()
    assert (batch.ids[~batch.mask] == 0).all()
    assert batch.tokens == batch.targets == 2 + 6 + 4 + 1


def test_a_document_without_a_label_within_the_length_is_reported() -> None:
    store = Store.of(iter([Encoded(list(range(9)), [False] * 8 + [True]), Encoded([1, 2], [False, True])]))
    samples = Samples.of([store], SETTINGS)
    assert len(samples) == 1
    assert samples.notes[0].endswith("1 documents have no token to train on within that length, and are not used")
    with pytest.raises(ModelError, match="no document has a token to train on within its first 7 tokens"):
        Samples.of([Store.of(iter([Encoded([1, 2, 3], [True, False, False])]))], SETTINGS)


@pytest.mark.parametrize("is_packed", [False, True])
def test_an_epoch_has_every_sample_once(is_packed: bool) -> None:
    settings = replace(SETTINGS, packing=is_packed)
    samples = Samples.of([_text(60), _documents(*range(2, 7), first=100)], settings)
    seen = [samples.sample(number, 3).ids.tolist() for number in range(2 * len(samples))]
    for epoch in (seen[: len(samples)], seen[len(samples) :]):
        assert sorted(epoch) == sorted(samples._at(place).ids.tolist() for place in range(len(samples)))
    assert seen[: len(samples)] != seen[len(samples) :]


def test_replicas_and_micro_batches_share_a_batch() -> None:
    samples = Samples.of([_text(200)], SETTINGS)
    for step in range(3):
        whole = _whole(samples.rows(step, SETTINGS, 1, 0))
        for replicas, count in ((2, 1), (1, 4), (2, 2)):
            settings = replace(SETTINGS, microbatches=count)
            parts = [part for r in range(replicas) for part in samples.rows(step, settings, replicas, r)]
            assert len(parts) == replicas * count
            assert _whole(parts) == whole


def test_a_replica_reads_its_own_samples_only(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = Samples.of([_text(200)], SETTINGS)
    read: list[int] = []
    inner = Samples.sample

    def sample(self: Samples, number: int, seed: int) -> Any:
        read.append(number)
        return inner(self, number, seed)

    monkeypatch.setattr(Samples, "sample", sample)
    samples.rows(2, SETTINGS, 2, 1)
    assert read == [10, 11]


def test_a_mixture_has_each_source_by_its_weight() -> None:
    stores = [_text(61, 0), _text(31, 1000), _text(600, 2000)]
    samples = Samples.of(stores, SETTINGS, [2, 1, 1])
    seen = [samples.sample(number, 5) for number in range(BLOCK)]
    counts = Counter(int(one.ids[0]) // 1000 for one in seen)
    assert counts == {0: BLOCK // 2, 1: BLOCK // 4, 2: BLOCK // 4}
    # Near any place too, and within a source every sample equally often.
    assert 60 <= sum(one.ids[0] < 1000 for one in seen[500:660]) <= 100
    by_sample = Counter(int(one.ids[0]) for one in seen if one.ids[0] < 1000)
    assert set(by_sample.values()) == {BLOCK // 2 // 10}
    again = Samples.of(stores, SETTINGS, [2, 1, 1])
    assert [again.sample(n, 5).ids[0] for n in (0, 777, BLOCK + 3)] == [
        samples.sample(n, 5).ids[0] for n in (0, 777, BLOCK + 3)
    ]
    assert samples.digest != Samples.of(stores, SETTINGS, [1, 1, 1]).digest != Samples.of(stores, SETTINGS).digest
    with pytest.raises(ModelError, match="give a source less than one in 10,000 samples"):
        Samples.of(stores, SETTINGS, [1, 1, 1e-6]).sample(0, 0)


def test_in_order_has_every_sample_once_and_blanks_behind() -> None:
    samples = Samples.of([_text(56)], SETTINGS)
    settings = replace(SETTINGS, microbatches=2)
    batches = [[list(samples.in_order(settings, 2, r)) for r in range(2)]]
    ids = [
        row
        for r in batches[0]
        for parts in r
        for part in parts
        for row in part.ids[part.labels[:, 1] != IGNORED].tolist()
    ]
    assert sorted(ids) == [list(range(6 * i, 6 * i + 7)) for i in range(9)]
    assert samples.steps(2, 4) == 5


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 12))
def test_pieces_train_on_every_id_once(sizes: list[int], length: int) -> None:
    ends = np.cumsum(sizes)
    starts, lengths = pieces_of(ends, length)
    targets = [int(t) for s, n in zip(starts, lengths, strict=True) for t in range(s + 1, s + n)]
    firsts = {0, *ends.tolist()}
    assert targets == [i for i in range(int(ends[-1])) if i not in firsts]
    assert lengths.max() <= length + 1


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(20, 50))
def test_packing_has_every_piece_once_in_rows_that_fit(sizes: list[int], capacity: int) -> None:
    order, ends = packed(np.array(sizes), capacity)
    assert sorted(order.tolist()) == list(range(len(sizes)))
    rows = np.split(np.array(sizes)[order], ends[:-1])
    filled = [int(row.sum()) for row in rows]
    assert max(filled) <= capacity
    # Of best fit at most one row is not more than half full.
    assert sum(2 * one <= capacity for one in filled) <= 1


def test_packed_rows_restart_positions_and_hide_first_ids() -> None:
    settings = replace(SETTINGS, packing=True, sequence_length=7)
    samples = Samples.of([_documents(3, 4, 6)], settings)
    rows = [samples._at(place) for place in range(len(samples))]
    assert [one.ids.tolist() for one in rows] == [[8, 9, 10, 11, 12, 13, 0, 0], [4, 5, 6, 7, 1, 2, 3, 0]]
    assert [one.positions.tolist() for one in rows if one.positions is not None] == [
        [0, 1, 2, 3, 4, 5, 0, 1], [0, 1, 2, 3, 0, 1, 2, 0],
    ]  # fmt: skip
    assert rows[1].labels.tolist() == [-100, 5, 6, 7, -100, 2, 3, -100]


@pytest.mark.parametrize("count", [1, 2, 7, 64, 1000])
def test_a_large_set_is_permuted_by_a_formula(count: int) -> None:
    images = [permuted(count, index, 5) for index in range(count)]
    assert sorted(images) == list(range(count))
    assert count < 7 or images != list(range(count))
    assert count < 64 or images != [permuted(count, index, 6) for index in range(count)]
