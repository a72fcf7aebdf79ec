"""Serving over context parallel ranks: what each holds and computes, reused prompts, log probabilities, and refusals."""

from __future__ import annotations

import json
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from partita.errors import ModelError, PlanError
from partita.generation import Sampling
from partita.serving import ServeRequest, ServeSettings
from partita.serving.requests import Input
from partita.torch import byte_tokenizer
from partita.torch.serving import serving_loop
from partita.torch.serving.forwards import BlockForward
from tests.support.ranks import on
from tests.support.serve_command import PARTITA
from tests.support.serving import Heard, split_model, unsplit_model

GREEDY = {"use_generation_config": False, "ignore_eos": True, "temperature": 0.0}
PROMPT = tuple((7 * i * i + 3 * i) % 120 + 1 for i in range(101))


def _loop(where: dict[str, int], family: str = "llama", **settings: Any) -> Any:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = split_model(unsplit_model(family, {}, torch.float64), where)
        given = ServeSettings(**{"block_tokens": 4, "cache_bytes": 2 << 20, "prefill_chunk": 32, **settings})
        return serving_loop(model, given, tokenizer=byte_tokenizer())


def _answers(where: dict[str, int]) -> dict[str, Any]:
    """Two requests one after the other, the second of which begins as the first; and what this rank held and computed."""
    loop = _loop(where)
    shapes: list[int] = []
    given = BlockForward.inputs

    def inputs(self: BlockForward, stage: int) -> dict[str, Any]:
        shapes.append(self.shape[1])
        return given(self, stage)

    requests = [
        ServeRequest(0, PROMPT, Sampling(9, **GREEDY), logprobs=True, top_logprobs=2),  # type: ignore[arg-type]
        ServeRequest(1, (*PROMPT[:70], 5, 6), Sampling(9, **GREEDY), logprobs=True),  # type: ignore[arg-type]
    ]
    first = Heard()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockForward, "inputs", inputs)
        heard = [first, Heard()]
        if loop.rows.decides:

            def then(event: Any) -> None:
                first(event)
                if first.ended.is_set():
                    loop.inbox.submit(requests[1], heard[1])
                    loop.inbox.shutdown()

            loop.inbox.submit(requests[0], then)
        loop.run()
    layout, pools = loop.rows.layout, loop.rows._pools
    held = sum(int((pool.abs().sum((1, 2)) > 0).sum()) for pool in pools.keys.values()) / len(pools.keys)
    return {
        "events": [[(e.token, e.logprob, e.top) for e in one.events[:-1]] for one in heard],
        "cached": [one.finished.cached_tokens for one in heard] if loop.rows.decides else [],
        "room": layout.num_blocks * layout.block_tokens, "slots": next(iter(pools.keys.values())).shape[0],
        "held": held, "shapes": shapes,
    }  # fmt: skip


def test_each_rank_holds_and_computes_its_part() -> None:
    ranks = [None, *on(2, _answers, {"cp": 2}), *on(3, _answers, {"cp": 3})]
    ranks[0] = _answers({})
    one = ranks[0]
    assert one is not None
    for place, size in ((1, 2), (3, 3)):
        first = ranks[place]
        assert first is not None
        for own, other in zip(one["events"], first["events"], strict=True):
            assert len(own) == len(other) == 9
            for (token, logprob, top), (same, close, tops) in zip(own, other, strict=True):
                assert token == same
                assert abs(logprob - close) < 1e-12
                assert [i for i, _ in top] == [i for i, _ in tops]
        # Full blocks of the first prompt: its 70 tokens in blocks of 4 tokens on each rank.
        assert first["cached"] == [0, 70 // (4 * size) * 4 * size]
        # The memory of a rank is that of one rank, and there is room for as many times as many tokens.
        assert abs(first["slots"] - one["slots"]) < 4
        assert size * one["room"] - 4 * size <= first["room"] <= size * one["room"]
        whole = one["held"]
        for rank in ranks[place : place + size]:
            assert rank is not None
            # The tokens after the shared beginning are held beside it; blocks of several ranks share less of it.
            assert rank["held"] <= whole / size + 4 + 1
            # Of a chunk of 32 tokens each rank computes its part; of few tokens, and of new ones, all.
            assert max(rank["shapes"]) == -(-32 // size)
            assert sum(rank["shapes"]) < sum(one["shapes"]) / size + 30


def test_few_tokens_are_computed_by_every_rank() -> None:
    assert on(2, _counts, {"cp": 2}) == [[1, 2, 3, 2, 3, 2, 4], [1, 2, 3, 2, 2, 3, 4]]


def _counts(where: dict[str, int]) -> list[int]:
    """How many tokens this rank computes of 1, 2, 3, 4, 5, 5 and 8 that begin at some place."""
    loop = _loop(where)
    pools, model, slots = loop.rows._pools, loop.rows.model, torch.arange(4, 24)
    pairs = ((1, 9), (2, 9), (3, 9), (4, 8), (5, 0), (5, 1), (8, 5))
    return [BlockForward(model, pools, [[3] * count], [(slots, start)]).shape[1] for count, start in pairs]


def _refused(where: dict[str, int], family: str, settings: dict[str, Any]) -> str:
    try:
        _loop(where, family, **settings)
    except ModelError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("family", "settings", "why"),
    [
        ("mamba2", {}, "cannot generate with cp=2: its layers keep a state that passes from token to token. Use cp=1."),
        ("llama4_text", {}, "cannot be served with cp=2: its layers attend within fixed chunks of a text"),
        ("llama", {"exact_rows": True}, "cannot be served with cp=2: exact_rows promises the bits of generate"),
    ],
)
def test_what_is_refused(family: str, settings: dict[str, Any], why: str) -> None:
    for found in on(2, _refused, {"cp": 2}, family, settings):
        assert why in found


def _with_an_image(where: dict[str, int]) -> str:
    loop = _loop(where)
    request = ServeRequest(0, PROMPT, inputs=(Input("pixel_values", "float32", (1,), bytes(4)),))
    try:
        loop.inbox.submit(request, Heard())
    except PlanError as error:
        return str(error)
    return ""


def test_images_are_refused() -> None:
    for found in on(2, _with_an_image, {"cp": 2}):
        assert found == (
            "a prompt with pixel_values is not served: prompts with other inputs than text are not split over ranks (cp=2)."
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "mamba2"}, "Mamba2ForCausalLM cannot generate with --cp 2: its layers keep a state"),
        ({"model_type": "llama4_text"}, "Llama4ForCausalLM cannot be served with --cp 2: its layers attend within fixed"),
        ({"model_type": "bert"}, "cannot be served with --cp 2: a model for embeddings continues no text"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", [["serve"], ["generate", "--prompts", "p.jsonl", "--out", "a.jsonl"]])
def test_a_command_refuses_before_ranks_start(
    tmp_path: Path, config: dict[str, Any], why: str, command: list[str]
) -> None:
    # There are no weights: a rank that loads them reports another error.
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    name, *more = command
    ended = subprocess.run(
        [*PARTITA, name, str(tmp_path / "config.json"), *more, "--cp", "2"],
        capture_output=True, text=True, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    assert why in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr
