"""Decisions of a step as plain data: admission, chunks, blocks, prefixes, and the message to the other ranks."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partita.errors import PlanError
from partita.generation import Sampling
from partita.serving import ServeRequest, ServeSettings
from partita.serving.blocks import BlockPool, CacheLayout, Held
from partita.serving.message import Admission, Row, Step, decode, encode
from partita.serving.scheduler import Scheduler


def _scheduler(blocks: int, *, groups: int = 1, batched: bool = True, **settings: int) -> Scheduler:
    pool = BlockPool(CacheLayout(blocks, 4, batched=batched, chunked=batched, reused=batched), keeps_prefixes=True)
    return Scheduler(ServeSettings(block_tokens=4, **settings), pool, groups=groups)


def _rows(step: Step) -> list[list[tuple[int, int, int, bool]]]:
    return [[(row.id, row.start, row.count, row.chooses) for row in batch] for batch in step.batches]


def test_prompts_are_computed_in_chunks_between_tokens() -> None:
    scheduler = _scheduler(100, prefill_chunk=4)
    scheduler.submit(ServeRequest(1, (5, 6)), 3)
    scheduler.submit(ServeRequest(2, tuple(range(9))), 3)
    # Request 1 gets a token in every step, while the prompt of request 2 is computed. Equal parts share a forward.
    assert _rows(scheduler.plan()) == [[(1, 0, 2, True), (2, 0, 2, False)]]
    scheduler.took(1, 7)
    assert _rows(scheduler.plan()) == [[(1, 2, 1, True)], [(2, 2, 4, False)]]
    scheduler.took(1, 8)
    assert _rows(scheduler.plan()) == [[(1, 3, 1, True)], [(2, 6, 3, True)]]


def test_running_requests_form_a_group_for_each_stage() -> None:
    scheduler = _scheduler(100, groups=2)
    for number in range(3):
        scheduler.submit(ServeRequest(number, (number, 1)), 4)
    # Prompts of the same length share a forward.
    assert _rows(scheduler.plan()) == [[(n, 0, 2, True) for n in range(3)]]
    for number in range(3):
        scheduler.took(number, 9)
    assert _rows(scheduler.plan()) == [[(0, 2, 1, True)], [(1, 2, 1, True), (2, 2, 1, True)]]


def test_prompts_of_about_the_same_length_share_a_forward() -> None:
    scheduler = _scheduler(100, prefill_chunk=100)
    for number, length in enumerate((20, 31, 12, 23, 11)):
        scheduler.submit(ServeRequest(number, tuple(range(100 * number, 100 * number + length))), 3)
    whole = [(1, 0, 31, True), (3, 0, 23, True), (0, 0, 20, True), (2, 0, 12, True), (4, 0, 11, True)]
    assert _rows(scheduler.plan()) == [whole[:2], whole[2:4], whole[4:]]


def test_a_prompt_that_fits_a_chunk_waits_for_one_of_its_own() -> None:
    scheduler = _scheduler(100, prefill_chunk=16)
    for number, length in enumerate((12, 10, 4, 30)):
        scheduler.submit(ServeRequest(number, tuple(range(100 * number, 100 * number + length))), 1)
    # Request 1 is not divided, and what it leaves is for request 2. Request 3 needs several chunks, and takes what is left.
    assert _rows(scheduler.plan()) == [[(0, 0, 12, True), (2, 0, 4, True)]]
    for number in (0, 2):
        scheduler.end(number)
    assert _rows(scheduler.plan()) == [[(1, 0, 10, True), (3, 0, 6, False)]]


def test_prompts_are_divided_over_pipeline_stages() -> None:
    scheduler = _scheduler(100, groups=2, prefill_chunk=100)
    scheduler.submit(ServeRequest(0, tuple(range(150))), 1)
    # The parts of a prompt follow each other through the stages.
    assert _rows(scheduler.plan()) == [[(0, start, 25, False)] for start in (0, 25, 50, 75)]
    scheduler.submit(ServeRequest(1, tuple(range(200, 240))), 1)
    assert _rows(scheduler.plan()) == [
        [(0, 100, 25, False)], [(0, 125, 25, True)], [(1, 0, 20, False)], [(1, 20, 20, True)]
    ]  # fmt: skip
    scheduler.end(0)
    scheduler.end(1)
    for number in (2, 3, 4):
        scheduler.submit(ServeRequest(number, tuple(range(300 * number, 300 * number + 20))), 1)
    assert _rows(scheduler.plan()) == [[(number, 0, 20, True)] for number in (2, 3, 4)]


def test_requests_that_cannot_share_forwards_run_alone() -> None:
    scheduler = _scheduler(100, batched=False, prefill_chunk=2)
    for number in range(2):
        scheduler.submit(ServeRequest(number, (1, 2, 3)), 4)
    assert _rows(scheduler.plan()) == [[(0, 0, 3, True)]]
    scheduler.took(0, 9)
    assert _rows(scheduler.plan()) == [[(0, 3, 1, True)], [(1, 0, 3, True)]]


def test_requests_wait_in_order_while_the_cache_is_full() -> None:
    scheduler = _scheduler(3)
    for number in range(3):
        scheduler.submit(ServeRequest(number, (number, 1, 2, 3, 4)), 2)
    assert [one.request.id for one in scheduler.plan().admitted] == [0]
    assert scheduler.pool.used == 2
    scheduler.end(0)
    step = scheduler.plan()
    assert step.ended == (0,)
    assert [one.request.id for one in step.admitted] == [1]


def test_a_prompt_that_begins_like_an_earlier_text_computes_the_rest_alone() -> None:
    scheduler = _scheduler(10)
    scheduler.submit(ServeRequest(0, tuple(range(8))), 3)
    scheduler.plan()
    for token in (50, 51):
        scheduler.took(0, token)
        scheduler.plan()
    scheduler.took(0, 52)
    scheduler.end(0)
    # 10 tokens are in the cache, of which two blocks are full; 52 was never computed.
    scheduler.submit(ServeRequest(1, (*range(8), 50, 51, 52)), 3)
    assert _rows(scheduler.plan()) == [[(1, 8, 3, True)]]
    scheduler.took(1, 53)
    # At least one token of a prompt is computed, and another text shares nothing.
    scheduler.submit(ServeRequest(2, tuple(range(8))), 1)
    scheduler.submit(ServeRequest(3, (9, *range(1, 8))), 1)
    assert _rows(scheduler.plan())[1:] == [[(3, 0, 8, True), (2, 4, 4, True)]]


@given(st.integers(0, 1 << 30), st.integers(1, 12))
def test_no_block_is_lost_or_given_twice(seed: int, blocks: int) -> None:
    rng = random.Random(seed)
    pool = BlockPool(CacheLayout(blocks, 2), keeps_prefixes=True)
    texts: dict[int, tuple[list[int], list[int], int]] = {}
    for number in range(40):
        if texts and rng.random() < 0.5:
            ids, held, shared = texts.pop(rng.choice(list(texts)))
            pool.keep(ids[: rng.randint(2 * shared, len(ids))], held)
            left = pool.truncate(held, rng.randint(0, len(ids)))
            pool.release(held if left is None else left.blocks)
        ids = [rng.randrange(2) for _ in range(rng.randint(1, 8))]
        found = pool.match(ids)
        held_now = pool.take(pool.layout.blocks_for(len(ids)), found)
        if held_now is not None:
            others = {block for _, held, _ in texts.values() for block in held}
            assert not others & set(held_now[len(found) :])
            assert 0 not in held_now
            texts[number] = ids, held_now, len(found)
        assert pool.used == len({block for _, held, _ in texts.values() for block in held})
        assert pool.used + pool.available == blocks


def test_a_truncated_text_may_continue_differently() -> None:
    pool = BlockPool(CacheLayout(6, 2), keeps_prefixes=True)
    ids = [1, 2, 3, 4, 5, 6]
    first = pool.take(3) or []
    pool.keep(ids, first)
    # A full block stays what it is; one that is not full keeps no text any more.
    assert pool.truncate(first, 4) == Held(first[:2])
    assert pool.match([*ids, 7]) == first
    assert pool.truncate(first[:2], 3) == Held(first[:2])
    assert pool.match([*ids, 7]) == first[:1]
    assert pool.used == 2


def test_a_copied_text_shares_full_blocks_and_copies_the_rest() -> None:
    pool = BlockPool(CacheLayout(4, 2), keeps_prefixes=True)
    first = pool.take(2) or []
    copied = pool.copy(first, 3, 3)
    assert copied is not None
    assert copied.blocks[0] == first[0]
    assert copied.copied == (first[1], copied.blocks[1])
    assert (pool.used, pool.available) == (4, 0)
    assert pool.copy(first, 3, 2) is None
    # The first block is shared, so a text that writes into it needs its own; the block that it gives back is enough.
    cut = pool.truncate(first, 1)
    assert cut == Held([first[1]], (first[0], first[1]))
    assert pool.truncate(copied.blocks, 1) == Held(copied.blocks[:1])
    assert (pool.used, pool.available) == (2, 2)
    pool.release(cut.blocks)
    pool.release(copied.blocks[:1])
    assert (pool.used, pool.available) == (0, 4)


def test_state_of_fixed_size_is_not_truncated() -> None:
    pool = BlockPool(CacheLayout(4, 2, state_blocks=1, batched=False), keeps_prefixes=True)
    for change in (lambda: pool.truncate([1, 2], 1), lambda: pool.copy([1, 2], 1, 2)):
        with pytest.raises(PlanError, match="keeps no list of tokens"):
            change()


def test_the_blocks_used_longest_ago_are_evicted_from_the_end_of_their_text() -> None:
    pool = BlockPool(CacheLayout(3, 1), keeps_prefixes=True)
    held = pool.take(3)
    assert held is not None
    pool.keep([7, 8, 9], held)
    pool.release(held)
    assert pool.match([7, 8, 9, 1]) == held
    assert pool.take(1) == [held[2]]
    assert pool.match([7, 8, 9, 1]) == held[:2]


def test_a_step_reads_back_from_its_message() -> None:
    sampling = Sampling(
        5,
        temperature=0.1 + 0.2,
        stop=("😀", "é\n"),
        logit_bias={3: -1.5},
        bad_words_ids=((1, 2), (3,)),
        seed=1 << 40,
    )
    request = ServeRequest(3, (1, 2, 3), sampling, logprobs=True, top_logprobs=4)
    step = Step((1, 2), ((4, 77),), (Admission(request, (4, 5)),), ((Row(3, 0, 3, True),),), ends=True)
    assert [decode(encode(one)) for one in (step, Step())] == [step, Step()]


def test_wrong_values_name_themselves() -> None:
    with pytest.raises(PlanError, match="the prompt is empty"):
        ServeRequest(0, ())
    with pytest.raises(PlanError, match="top_logprobs must be from 0 to 20, but is 21"):
        ServeRequest(0, (1,), top_logprobs=21)
    with pytest.raises(PlanError, match="prefill_chunk must be a whole number of at least 1, but is 0"):
        ServeSettings(prefill_chunk=0)
