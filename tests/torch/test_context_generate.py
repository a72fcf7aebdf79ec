"""Generating with context parallel ranks: the tokens and logits of one rank, from a cache of which each rank has a part."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from partita.core.mesh import Mesh
from partita.core.sharding.context import keepers_of
from partita.errors import ModelError, PlanError
from partita.generation import Sampling, Sequence
from partita.torch.collectives.comm import Communicator
from partita.torch.collectives.groups import single_groups
from partita.torch.collectives.threads import run_as_threads
from partita.torch.generate import generate
from partita.torch.layers.merged_attention import merged_attention
from partita.torch.model.context import context_of
from partita.torch.model.parts import plan_of
from partita.torch.model.sequences import SequenceGroup
from partita.torch.new import fresh
from partita.torch.proof.context import _continued
from tests.support.models import CONFIGS, UNMEASURED
from tests.support.ranks import ranks
from tests.torch.test_context import BLOOM, CONVOLUTIONS, LONG_ROPE

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [3, 1, 4, 1, 5, 9, 2, 6], [2]]
GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 0.9, "top_k": 20, "repetition_penalty": 1.2}


def _model(data: dict[str, Any], mesh: dict[str, int]) -> Any:
    where: dict[str, Any] = dict(mesh) if mesh else {"groups": single_groups()}
    return fresh(data, dtype="float64", seed=3, **where).eval()


def _tokens(
    data: dict[str, Any], mesh: dict[str, int], prompts: list[list[int]], more: dict[str, Any]
) -> list[tuple[int, ...]]:
    found = generate(_model(data, mesh), prompts, Sampling(10, ignore_eos=True, **more))
    return [tuple(generation.tokens) for generation in found]


CASES = {
    "cp 2": ("llama-7-heads-1-kv", {"cp": 2}, GREEDY),
    "cp 2, sampled": ("llama-7-heads-1-kv", {"cp": 2}, SAMPLED),
    "cp 3, a window": ("mistral", {"cp": 3}, GREEDY),
    "cp 2, a window over stages": ("mistral", {"cp": 2, "pp": 2}, GREEDY),
    "cp 2 x tp 2, experts": ("qwen3-moe", {"cp": 2, "tp": 2}, SAMPLED),
    "cp 2, experts over its ranks": ("qwen3-moe", {"cp": 2, "ep": 2}, GREEDY),
    "cp 2 x pp 2, learned positions": ("gpt2", {"cp": 2, "pp": 2}, SAMPLED),
    "cp 3, latent keys": ("deepseek-v3", {"cp": 3}, GREEDY),
    "cp 2 x tp 2, latent keys": ("deepseek-v3", {"cp": 2, "tp": 2}, GREEDY),
    "cp 2 x dp 2": ("llama-7-heads-1-kv", {"cp": 2, "dp": 2}, SAMPLED),
    "cp 2, soft caps": ("gemma2", {"cp": 2}, GREEDY),
    "cp 2 x tp 2, sinks": ("gpt-oss", {"cp": 2, "tp": 2}, GREEDY),
    "cp 4": ("gemma3", {"cp": 4}, GREEDY),
}


@pytest.mark.parametrize("case", CASES)
def test_generates_the_tokens_of_one_rank(case: str) -> None:
    name, mesh, more = CASES[case]
    data = {**CONFIGS, **UNMEASURED}[name]
    (expected,) = ranks(1).run(_tokens, data, {}, PROMPTS, more)
    for found in ranks(Mesh(**mesh).size).run(_tokens, data, mesh, PROMPTS, more):
        assert found == expected


@pytest.mark.parametrize("name", ["deepseek-v3", "mistral"])
def test_a_rank_without_a_key(name: str) -> None:
    (expected,) = ranks(1).run(_tokens, CONFIGS[name], {}, [[2]], GREEDY)
    for found in ranks(2).run(_tokens, CONFIGS[name], {"cp": 2}, [[2]], GREEDY):
        assert found == expected


def _logits(data: dict[str, Any], mesh: dict[str, int], length: int) -> list[torch.Tensor]:
    model = _model(data, mesh)
    prompts = [[(i * i + 3 * row) % 97 + 1 for i in range(length)] for row in range(2)]
    with torch.inference_mode():
        return _continued(model, prompts, plan_of(model)[1].cp)


@pytest.mark.parametrize("name", ["llama-7-heads-1-kv", "mistral", "gpt2", "deepseek-v3"])
def test_logits_are_those_of_one_rank(name: str) -> None:
    for length in (17, 3):
        (expected,) = ranks(1).run(_logits, CONFIGS[name], {}, length)
        for rank, found in enumerate(ranks(2).run(_logits, CONFIGS[name], {"cp": 2}, length)):
            # Of a prompt's parts, that of the first rank has the last token.
            for one, other in list(zip(expected, found, strict=True))[rank if length > 3 else 0 :]:
                assert float((one - other).abs().max() / one.abs().max()) < (1e-12 if name != "deepseek-v3" else 1e-6)


def _columns(data: dict[str, Any], prompt: int, new: int) -> list[tuple[int, int]]:
    """Columns and bytes of the cache of each layer on this rank, after a prompt and new tokens."""
    model = _model(data, {"cp": 2})
    sequence = Sequence(0, list(range(1, prompt + 1)), new)
    group = SequenceGroup(model, [sequence], torch.device("cpu"), context=plan_of(model)[1].cp)
    with torch.inference_mode():
        for _ in range(new):
            with context_of(group.inputs(0)) as given:
                output = model(**given)
            group.go_on(torch.tensor([7]), output)
    return [(e.keys.shape[2], e.keys.untyped_storage().nbytes() // e.keys.itemsize) for e in group.caches[0].layers]


def test_each_rank_keeps_its_part_of_the_keys() -> None:
    data = CONFIGS["llama-7-heads-1-kv"]
    first, second = ranks(2).run(_columns, data, 41, 8)
    width = data["hidden_size"] // 7
    for one, other in zip(first, second, strict=True):
        assert one[0] + other[0] == 48
        assert one[0] == other[0] == 24
        assert one[1] == 24 * width
    first, second = ranks(2).run(_columns, CONFIGS["mistral"], 41, 8)
    for one, other in zip(first, second, strict=True):
        assert one[0] + other[0] == CONFIGS["mistral"]["sliding_window"] - 1


def test_new_tokens_go_to_the_rank_with_the_fewest() -> None:
    assert keepers_of((3, 3, 2), 5) == [2, 0, 1, 2, 0]
    assert keepers_of((0, 0), 3) == [0, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("extra", [{}, {"softcap": 3.0}, {"sinks": torch.tensor([0.3, -1.0, 2.0, 0.1])}])
def test_merged_attention_is_attention(dtype: torch.dtype, extra: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 3, 8), (2, 2, 11, 8), (2, 2, 11, 8))
    query, key, value = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    mask = torch.arange(11) <= torch.tensor([[[[6], [8], [10]]], [[[2], [3], [4]]]])
    wide = [one.double() for one in (query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1))]
    scores = wide[0] @ wide[1].mT * 0.4
    cap, sinks = extra.get("softcap"), extra.get("sinks")
    scores = (scores if cap is None else (scores / cap).tanh() * cap).masked_fill(~mask, -torch.inf)
    total = scores.logsumexp(-1, keepdim=True)
    total = total if sinks is None else torch.logaddexp(total, sinks.double()[:, None, None])
    expected = ((scores - total).exp() @ wide[2]).transpose(1, 2)
    columns = ([0, 3, 4, 10], [1, 2, 5, 6, 7, 8, 9], [])

    def one(comm: Communicator) -> torch.Tensor:
        own = torch.tensor(columns[comm.rank], dtype=torch.int64)
        return merged_attention(query, key[:, :, own], value[:, :, own], mask[..., own], 0.4, comm, **extra)

    for found in run_as_threads(3, one):
        assert float((found.double() - expected).abs().max()) < (1e-12 if dtype == torch.float64 else 2e-2)


def _refused(data: dict[str, Any], prompts: list[list[int]], inputs: Any = None) -> str:
    try:
        generate(_model(data, {"cp": 2}), prompts, Sampling(12, ignore_eos=True, temperature=0.0), inputs=inputs)
    except (ModelError, PlanError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (CONVOLUTIONS, "cannot generate with cp=2: its layers keep other states than keys and values"),
        (BLOOM, "cannot generate with cp=2"),
        (LONG_ROPE, "sequences of 11 tokens are longer than 8"),
    ],
)
def test_refuses_what_it_cannot_compute(data: dict[str, Any], why: str) -> None:
    for found in ranks(2).run(_refused, data, PROMPTS):
        assert why in found


def test_frequencies_that_depend_on_the_length_change_with_new_tokens() -> None:
    (expected,) = ranks(1).run(_tokens, LONG_ROPE, {}, [[5, 6, 7, 8, 9, 1], [3]], GREEDY)
    for found in ranks(2).run(_tokens, LONG_ROPE, {"cp": 2}, [[5, 6, 7, 8, 9, 1], [3]], GREEDY):
        assert found == expected
