"""A full cache, requests that never fit, log probabilities, bad logits, raising clients, and memory over many requests."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch

from partita.core.mesh import Mesh
from partita.core.model.spec import longest_text
from partita.errors import ModelError, PlanError
from partita.generation import Sampling
from partita.ranks.memory import machine_bytes, share_of
from partita.serving import Finished, ServeRequest, ServeSettings, ServingLoop, Token
from partita.torch import byte_tokenizer
from partita.torch.serving import measure, serving_loop
from tests.support.ranks import on
from tests.support.serving import Heard, alone, random_requests, served, split_model, unsplit_model

GREEDY = {"use_generation_config": False, "ignore_eos": True}


def _loop(where: dict[str, int], **settings: Any) -> ServingLoop:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = split_model(unsplit_model("qwen2", {}, torch.float64), where)
        return serving_loop(
            model, ServeSettings(**{"block_tokens": 4, "cache_bytes": 1 << 24, **settings}), tokenizer=byte_tokenizer()
        )


def test_requests_wait_for_a_full_cache_and_what_never_fits_is_refused() -> None:
    loop = _loop({}, cache_bytes=200_000, max_sequences=50)
    assert loop.rows.layout.num_blocks == 5
    refusal = (
        r"a prompt of 15 tokens with 9 new ones needs 6 cache blocks, but the cache has 5 blocks of 4 tokens \(32768 bytes a "
        r"block, 200000 bytes on each rank\)\. Ask for fewer"
    )
    with pytest.raises(PlanError, match=refusal):
        loop.inbox.submit(ServeRequest(0, tuple(range(15)), Sampling(9, **GREEDY)), Heard())
    requests = [ServeRequest(i, tuple(range(i, i + 9)), Sampling(4, **GREEDY)) for i in range(8)]
    heard = served(loop, requests, pause_s=0)
    assert all(one.finished.reason == "length" and len(one.tokens) == 4 for one in heard.values())
    assert loop.inbox.stats().blocks_used == 0
    with pytest.raises(ModelError, match="no request is accepted any more: the server is shutting down"):
        loop.inbox.submit(requests[0], Heard())


def test_a_budget_without_a_block_is_refused() -> None:
    with pytest.raises(ModelError, match=r"cache_bytes=1000 has no room for a request: .* Give at least 65536 bytes"):
        _loop({}, cache_bytes=1000)


def test_the_budget_is_what_is_free_and_at_most_what_requests_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = _loop({}, max_sequences=2, cache_bytes=None).rows.layout
    assert layout.is_measured
    spec = _loop({}, max_sequences=2).rows.plan.spec
    assert layout.num_blocks == 2 * -(-longest_text(spec) // 4)
    assert layout.budget_bytes == (layout.num_blocks + 1) * layout.block_bytes
    # Two ranks share 1,000,000 bytes, of which 100,000 are reserved; each has room for 13 blocks, the first for padding.
    monkeypatch.setattr(measure, "machine_bytes", lambda: (1_000_000, 1_000_000))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    layout = _loop({}, max_sequences=2, cache_bytes=None).rows.layout
    assert (layout.num_blocks, layout.block_bytes) == (12, 32768)
    assert str(layout).endswith(
        "(32768 bytes a block, 425984 bytes of the memory that was free after loading on each rank)"
    )
    monkeypatch.setattr(measure, "machine_bytes", lambda: (120_000, 1_000_000))
    with pytest.raises(ModelError, match="the free memory of 10000 bytes a rank has no room for a request"):
        _loop({}, cache_bytes=None)


def test_free_memory_is_a_part_of_all() -> None:
    free, total = machine_bytes()
    assert 0 < free <= total
    assert share_of(100, 200, 2) == 40
    assert share_of(10, 200, 2) == 0


def test_prefixes_are_reused_and_counted() -> None:
    loop = _loop({}, max_sequences=1)
    prompt = tuple(range(10, 23))
    heard = served(loop, [ServeRequest(i, prompt, Sampling(4, **GREEDY)) for i in range(3)])
    assert [heard[i].finished.cached_tokens for i in range(3)] == [0, 12, 12]
    assert len({one.tokens for one in heard.values()}) == 1


def _logprobs(where: dict[str, int]) -> list[tuple[tuple[int, ...], list[float | None], list[Any]]]:
    loop = _loop(where)
    requests = [
        ServeRequest(0, (3, 1, 4), Sampling(4, **GREEDY), logprobs=True, top_logprobs=3),
        ServeRequest(1, (3, 1, 4), Sampling(4, **GREEDY)),
        ServeRequest(2, (9, 9), Sampling(4, temperature=1.5, **GREEDY), logprobs=True),
    ]
    heard = served(loop, requests)
    rows = []
    for number in range(3) if loop.rows.decides else ():
        tokens = [event for event in heard[number].events if isinstance(event, Token)]
        rows.append((heard[number].tokens, [event.logprob for event in tokens], [event.top for event in tokens]))
    return rows


@pytest.mark.parametrize("where", [{}, {"tp": 2}, {"pp": 2}])
def test_log_probabilities_are_those_of_the_model(where: dict[str, int]) -> None:
    (rows,) = [rows for rows in on(Mesh(**where).size, _logprobs, where) if rows]
    model = unsplit_model("qwen2", {}, torch.float64)
    for (tokens, logprobs, tops), prompt, count in zip(rows, [(3, 1, 4), (3, 1, 4), (9, 9)], [3, None, 0], strict=True):
        text = torch.tensor([[*prompt, *tokens]])
        with torch.no_grad():
            expected = model(text).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        for token, logprob, top, row in zip(tokens, logprobs, tops, expected, strict=True):
            if count is None:
                assert (logprob, top) == (None, ())
                continue
            assert logprob == pytest.approx(float(row[token]), abs=1e-10)
            values, ids = row.topk(count)
            assert [name for name, _ in top] == ids.tolist()
            assert [value for _, value in top] == pytest.approx(values.tolist(), abs=1e-10)


def test_logits_that_are_not_finite_end_only_their_request() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unsplit = unsplit_model("qwen2", {}, torch.float64)
    with torch.no_grad():
        unsplit.get_input_embeddings().weight[100] = float("nan")  # type: ignore[operator]
    loop = serving_loop(split_model(unsplit, {}), ServeSettings(block_tokens=4), tokenizer=byte_tokenizer())
    sampling = Sampling(5, temperature=1.0, logit_bias={100: -1e9}, **GREEDY)
    requests = [ServeRequest(i, (5, 6, 100 if i == 2 else i), sampling) for i in range(5)]
    heard = served(loop, requests, pause_s=0)
    assert heard[2].finished.reason == "error"
    assert "at step 1 logits of rank 0 are NaN or infinite" in heard[2].finished.error
    with torch.no_grad():
        unsplit.get_input_embeddings().weight[100] = 0  # type: ignore[operator]
    model = split_model(unsplit, {})
    for request in (one for one in requests if one.id != 2):
        assert heard[request.id].tokens == alone(model, request)[0]


def test_a_client_that_raises_ends_only_its_request() -> None:
    loop = _loop({})
    heard = Heard()

    def broken(event: object) -> None:
        if isinstance(event, Token):
            raise RuntimeError("gone")
        assert isinstance(event, Finished)
        assert event.reason == "cancelled"
        loop.inbox.submit(ServeRequest(1, (4, 5), Sampling(3, **GREEDY)), heard)
        loop.inbox.shutdown()

    loop.inbox.submit(ServeRequest(0, (4, 5), Sampling(30, **GREEDY)), broken)
    loop.run()
    assert len(heard.tokens) == 3


def test_shutdown_without_draining_cancels() -> None:
    loop = _loop({})
    heard = Heard()

    def on_event(event: Any) -> None:
        heard(event)
        loop.inbox.shutdown(drain=False)

    loop.inbox.submit(ServeRequest(0, (4, 5), Sampling(30, **GREEDY)), on_event)
    loop.run()
    assert heard.finished.reason == "cancelled"
    assert len(heard.tokens) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_is_flat_over_thousands_of_requests() -> None:
    loop = _loop({}, max_sequences=16, cache_bytes=1 << 22)
    seen: list[tuple[int, int]] = []
    requests = [ServeRequest(one.id, one.prompt, one.sampling) for one in random_requests(3000, 3, longest=8, most=4)]

    def count(event: object) -> None:
        if isinstance(event, Finished) and event.id % 750 == 749:
            gc.collect()
            tensors = sum(o.numel() * o.itemsize for o in gc.get_objects() if issubclass(type(o), torch.Tensor))
            seen.append((tensors, len(gc.get_objects())))

    for request in requests:
        loop.inbox.submit(request, count)
    loop.inbox.shutdown()
    loop.run()
    assert loop.inbox.stats().finished == 3000
    assert len(seen) == 4
    tensors, objects = zip(*seen, strict=True)
    assert max(tensors) < 1.05 * min(tensors)
    # Requests that wait are objects too, so their number falls.
    assert objects[-1] < 1.05 * objects[0]
