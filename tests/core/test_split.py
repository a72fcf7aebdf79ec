"""Split: every size x parts x unit, and every heads x KV heads x ranks, against what each of them says of itself."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from partita.core.sharding.split import Range, Split, deal, kv_positions, merge
from partita.errors import PlanError


def elements(ranges: tuple[Range, ...]) -> list[int]:
    """The elements of ranges, in order."""
    return [index for start, stop in ranges for index in range(start, stop)]


def check_inverse(split: Split) -> None:
    """The queries agree with the ranges, element by element."""
    holders: dict[int, list[int]] = {index: [] for index in range(split.size)}
    owned: list[int] = []
    for rank in range(split.parts):
        mine = elements(split.ranges(rank))
        assert len(mine) == split.local_size(rank)
        assert [split.to_global(rank, local) for local in range(len(mine))] == mine
        places = {index: local for local, index in enumerate(mine)}
        assert [split.to_local(rank, index) for index in range(split.size)] == [
            places.get(index) for index in range(split.size)
        ]
        for index in mine:
            holders[index].append(rank)
        owned += (own := elements(split.owned_ranges(rank)))
        assert all(split.owner(index) == rank for index in own)
        assert all(start < stop for start, stop in split.owned_ranges(rank))
    assert sorted(owned) == list(range(split.size))
    assert all(split.holders(index) == tuple(ranks) for index, ranks in holders.items())
    assert elements(split.shared_ranges) == [index for index, ranks in holders.items() if len(ranks) > 1]
    assert split.is_partition == (max(map(len, holders.values())) == 1)
    held = [index for ranges in split.by_rank for index in elements(ranges)]
    assert split.is_in_order == (held == list(range(split.size)))


# --- even -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", range(1, 10))
def test_even_covers_in_order_and_balance(parts: int) -> None:
    for size in range(1, 131):
        for unit in (u for u in range(1, size + 1) if size % u == 0):
            if size // unit < parts:
                with pytest.raises(PlanError, match="every rank must hold one"):
                    Split.even(size, parts, unit=unit)
            split = Split.even(size, parts, unit=unit, allow_empty=True)
            assert split.parts == parts
            assert [index for ranges in split.by_rank for index in elements(ranges)] == list(range(size))
            units = [n // unit for n in split.local_sizes]
            assert [n * unit for n in units] == list(split.local_sizes)
            assert sorted(units, reverse=True) == units
            assert units[0] - units[-1] <= 1
            if 0 not in units:
                assert Split.even(size, parts, unit=unit) == split


@pytest.mark.parametrize("parts", range(1, 10))
def test_even_answers_for_every_element(parts: int) -> None:
    for size in range(parts, 131):
        check_inverse(Split.even(size, parts))
    for size in range(1, parts):
        check_inverse(Split.even(size, parts, allow_empty=True))


def test_the_pipeline_remainder_goes_to_the_first_ranks() -> None:
    # LocalAI's pipeline_auto_parallel deals layers in the same way.
    for total in range(1, 60):
        for world in range(1, min(total, 9) + 1):
            split = Split.even(total, world)
            for rank in range(world):
                per_rank, remainder = divmod(total, world)
                start = rank * per_rank + min(rank, remainder)
                assert split.ranges(rank) == ((start, start + per_rank + (rank < remainder)),)


def test_even_refuses() -> None:
    for arguments, match in (
        ((4, 0), "parts must be at least 1, but is 0"),
        ((-1, 1), "size must not be negative, but is -1"),
        ((1, 2), "1 unit cannot be distributed over 2 ranks.*Use at most 1 rank, or"),
        ((0, 1), "0 units cannot be distributed over 1 ranks"),
    ):
        with pytest.raises(PlanError, match=match):
            Split.even(*arguments)
    for unit in (0, -2, 3):
        with pytest.raises(PlanError, match=f"size 4 must be a whole number of units of {unit}"):
            Split.even(4, 2, unit=unit)
    for segments in ((3, 2), (4, 0), (5, -1), ()):
        with pytest.raises(PlanError, match="segments must be positive and add up to 4"):
            Split.even(4, 2, segments=segments)
    with pytest.raises(PlanError, match="1 unit cannot be distributed over 2 ranks"):
        Split.even(4, 2, segments=(3, 1))


# --- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1.0,), (1, 1), (3, 1), (1, 2, 3), (0.1, 0.2, 0.7), (1, 1000), (5, 5, 5, 1e-9)])
def test_weights_follow_the_largest_remainders(weights: tuple[float, ...]) -> None:
    for count in range(len(weights), 131):
        counts = deal(count, len(weights), weights)
        shares = [count * weight / sum(weights) for weight in weights]
        assert sum(counts) == count
        assert min(counts) >= 1
        taken = sum(share < 1 for share in shares)
        assert all(abs(n - share) < 1 + taken for n, share in zip(counts, shares, strict=True))
        assert deal(count, len(weights), [weight * 0.25 for weight in weights]) == counts


def test_weights_in_expected_rows() -> None:
    table = {
        (10, (1, 1)): [5, 5],
        (11, (1, 1)): [6, 5],  # a tie goes to the first rank
        (10, (3, 1)): [8, 2],  # 7.5 and 2.5: again
        (10, (1, 2, 3)): [2, 3, 5],  # 1.67, 3.33, 5
        (3, (100, 1, 1)): [1, 1, 1],  # none may be empty
        (7, (100, 1, 1)): [5, 1, 1],
    }
    for (count, weights), expected in table.items():
        assert deal(count, len(weights), weights) == expected
    assert deal(3, 3, (100, 1, 1), allow_empty=True) == [3, 0, 0]
    assert Split.even(24, 2, unit=4, weights=(2, 1)).by_rank == (((0, 16),), ((16, 24),))


@pytest.mark.parametrize("weights", [(1,), (1, 0), (1, -1), (1, float("inf")), (1, float("nan")), (1e308, 1e308), ()])
def test_weights_refuse(weights: tuple[float, ...]) -> None:
    if weights == (1e308, 1e308):  # legal numbers, whose sum is not
        assert deal(10, 2, weights) == [5, 5]
        return
    with pytest.raises(PlanError, match="weights must be 2 positive finite numbers"):
        deal(10, 2, weights)


# --- segments -------------------------------------------------------------------------------------------------------


def test_segments_are_each_split_by_themselves() -> None:
    for parts in range(1, 6):
        for segments in [(6, 6), (5, 7), (12, 5, 5), (9,), (5, 5, 5, 5), (8, 30)]:
            split = Split.even(sum(segments), parts, segments=segments)
            check_inverse(split)
            for rank in range(parts):
                expected, offset = [], 0
                for length in segments:
                    expected += [offset + i for i in elements(Split.even(length, parts).ranges(rank))]
                    offset += length
                assert elements(split.ranges(rank)) == expected


def test_segments_in_expected_rows() -> None:
    split = Split.even(12, 2, segments=(6, 6))
    assert split.by_rank == (((0, 3), (6, 9)), ((3, 6), (9, 12)))
    assert str(split) == "12 = [0: 0:3+6:9, 1: 3:6+9:12]"
    assert Split.even(12, 1, segments=(6, 6)).by_rank == (((0, 12),),)
    assert Split.even(16, 2, unit=4, segments=(8, 8)).by_rank == (((0, 4), (8, 12)), ((4, 8), (12, 16)))


# --- heads ----------------------------------------------------------------------------------------------------------


def grouped_heads() -> list[tuple[int, int]]:
    """Every number of heads up to 32 with every number of KV heads that divides it."""
    return [(heads, kv) for heads in range(1, 33) for kv in range(1, heads + 1) if heads % kv == 0]


@pytest.mark.parametrize("parts", range(1, 10))
def test_every_query_head_finds_its_kv_head(parts: int) -> None:
    for heads, kv_heads in grouped_heads():
        if heads < parts:
            for make in (Split.heads, Split.kv_heads):
                with pytest.raises(
                    PlanError, match=f"{heads} attention heads cannot be distributed over {parts} ranks"
                ):
                    make(heads, kv_heads, parts)
            continue
        group = heads // kv_heads
        queries, keys = Split.heads(heads, kv_heads, parts), Split.kv_heads(heads, kv_heads, parts)
        assert [head for ranges in queries.by_rank for head in elements(ranges)] == list(range(heads))
        assert min(queries.local_sizes) >= 1
        for rank in range(parts):
            mine, mine_kv = elements(queries.ranges(rank)), elements(keys.ranges(rank))
            # Those that are attended to, and no others.
            assert mine_kv == sorted({head // group for head in mine})
            positions = kv_positions(group, queries, rank)
            assert [mine_kv[position] for position in positions] == [head // group for head in mine]
        holders = {kv: sum(kv in elements(keys.ranges(rank)) for rank in range(parts)) for kv in range(kv_heads)}
        assert elements(keys.shared_ranges) == [kv for kv, count in holders.items() if count > 1]
        # No copies where they are not needed, and as few ranks a head as there can be.
        if kv_heads >= parts:
            assert keys.is_partition
        elif parts % kv_heads == 0:
            assert set(holders.values()) == {parts // kv_heads}
            assert set(keys.local_sizes) == {1}
        if kv_heads < parts:
            assert max(queries.local_sizes) - min(queries.local_sizes) <= 1


@pytest.mark.parametrize("width", [1, 3, 64])
def test_heads_are_as_wide_as_asked(width: int) -> None:
    for heads, kv_heads, parts in [(8, 2, 4), (14, 2, 3), (14, 2, 4), (7, 1, 3), (6, 6, 4), (32, 8, 5)]:
        for make in (Split.heads, Split.kv_heads):
            wide = make(heads, kv_heads, parts, width=width)
            assert wide == make(heads, kv_heads, parts).scaled(width)
            if width < 64:
                check_inverse(wide)


def test_heads_in_expected_rows() -> None:
    # Qwen2: 14 heads that share 2 KV heads. Over 3 ranks the middle one needs both.
    assert Split.heads(14, 2, 3).by_rank == (((0, 5),), ((5, 10),), ((10, 14),))
    assert Split.kv_heads(14, 2, 3).by_rank == (((0, 1),), ((0, 2),), ((1, 2),))
    assert kv_positions(7, Split.heads(14, 2, 3), 1) == (0, 0, 1, 1, 1)
    assert Split.kv_heads(14, 2, 3).shared_ranges == ((0, 2),)
    assert [Split.kv_heads(14, 2, 3).owned_ranges(r) for r in range(3)] == [((0, 1),), ((1, 2),), ()]
    # Over 4 ranks each KV head has two, and its 7 query heads are dealt 4 and 3.
    assert Split.heads(14, 2, 4).local_sizes == (4, 3, 4, 3)
    assert Split.kv_heads(14, 2, 4).by_rank == (((0, 1),), ((0, 1),), ((1, 2),), ((1, 2),))
    # 5 groups of 2 query heads over 2 ranks: whole groups, 3 and 2.
    assert Split.heads(10, 5, 2).local_sizes == (6, 4)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 3), (4, 8), (4, 0), (0, 1), (0, 0), (-4, -2)])
def test_heads_refuse(heads: int, kv_heads: int) -> None:
    with pytest.raises(PlanError, match=rf"num_heads \({heads}\) must be a multiple of num_kv_heads \({kv_heads}\)"):
        Split.heads(heads, kv_heads, 2)


# --- put together ---------------------------------------------------------------------------------------------------


def test_concat_is_the_parts_in_a_row() -> None:
    for parts in range(1, 5):
        queries, keys = Split.heads(8, 2, parts, width=4), Split.kv_heads(8, 2, parts, width=4)
        fused = Split.concat([queries, keys, keys])
        check_inverse(fused)
        assert fused.size == 48
        for rank in range(parts):
            q, k = elements(queries.ranges(rank)), elements(keys.ranges(rank))
            assert elements(fused.ranges(rank)) == [*q, *(32 + i for i in k), *(40 + i for i in k)]
    with pytest.raises(PlanError, match="at least one split"):
        Split.concat([])
    with pytest.raises(PlanError, match="the same number of ranks"):
        Split.concat([Split.even(4, 2), Split.even(4, 4)])


def test_replicated_is_held_by_all_and_owned_by_the_first() -> None:
    split = Split.replicated(5, 3)
    check_inverse(split)
    assert split.by_rank == (((0, 5),),) * 3
    assert [split.owned_ranges(rank) for rank in range(3)] == [((0, 5),), (), ()]
    assert split.shared_ranges == ((0, 5),)
    assert str(split) == "5 = [0-2: 0:5]"


def test_ranges_that_overlap_in_any_way_are_owned_once() -> None:
    for by_rank in (
        (((0, 6),), ((2, 4),), ((0, 6),)),
        (((2, 4),), ((0, 6),), ((5, 6), (0, 1))),
        (((4, 6), (0, 2)), ((1, 5),)),
        (((0, 1), (2, 3), (4, 5)), ((0, 6),)),
    ):
        check_inverse(Split(6, by_rank))


def test_merge_joins_what_adjoins() -> None:
    assert merge([(0, 2), (2, 4), (4, 4), (6, 7)]) == ((0, 4), (6, 7))
    assert merge([(4, 6), (0, 4)]) == ((4, 6), (0, 4))
    assert merge([]) == ()
    for split in (Split.even(20, 3, segments=(10, 10)), Split.even(6, 1, segments=(2, 2, 2))):
        assert all(a[1] != b[0] for ranges in split.by_rank for a, b in pairwise(ranges))


# --- as data --------------------------------------------------------------------------------------------------------


def test_data_round_trip() -> None:
    for split in (
        Split.even(13, 4), Split.even(2, 3, allow_empty=True), Split.kv_heads(14, 2, 3, width=8),
        Split.even(12, 2, segments=(4, 8)), Split.replicated(3, 2), Split.even(0, 2, allow_empty=True),
    ):  # fmt: skip
        assert Split.from_data(json.loads(json.dumps(split.to_data()))) == split


@pytest.mark.parametrize(
    "data",
    [
        None, 3, "4", [], {}, {"size": 4}, {"size": 4, "by_rank": []}, {"size": 4, "by_rank": 3},
        {"size": 4, "by_rank": [[[0, 4, 5]]]}, {"size": 4, "by_rank": [[[0]]]}, {"size": "4", "by_rank": [[[0, 4]]]},
        {"size": 4, "by_rank": [[[0, 4.0]]]}, {"size": 4, "by_rank": [[[False, 4]]]}, {"size": 4, "by_rank": [[["", 4]]]},
        {"size": 4, "by_rank": [[[0, 3]]]}, {"size": 4, "by_rank": [[[0, 5]]]}, {"size": 4, "by_rank": [[[-1, 4]]]},
        {"size": 4, "by_rank": [[[0, 4], [2, 2]]]}, {"size": 4, "by_rank": [[[0, 2]], [[3, 4]]]},
        {"size": -1, "by_rank": [[]]}, {"size": 4, "by_rank": [[[0, 4], [1, 2]]]}, {"size": 4, "by_rank": [[[2, 4], [0, 3]]]},
    ],
)  # fmt: skip
def test_data_refuses(data: object) -> None:
    with pytest.raises(PlanError):
        Split.from_data(data)


def test_queries_refuse_what_is_not_there() -> None:
    split = Split.even(5, 2)
    for index in (-1, 5):
        with pytest.raises(PlanError, match=rf"index must be in \[0, 5\), but is {index}"):
            split.owner(index)
    for local in (-1, 3):
        with pytest.raises(PlanError, match=rf"local_index must be in \[0, 3\), but is {local}"):
            split.to_global(0, local)
    assert split.to_local(0, 5) is None
