"""16 greedy answers at once beside each alone, in narrow dtypes: bit by bit the same with `exact_rows`."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from partita.core.mesh import Mesh
from partita.generation import Sampling
from partita.serving import ServeRequest, ServeSettings
from partita.serving.blocks import BlockPool, CacheLayout
from partita.serving.scheduler import Scheduler
from partita.torch import generate
from partita.torch.collectives.groups import make_groups, single_groups
from partita.torch.load import load
from partita.torch.new import fresh
from partita.torch.serving import serving_loop
from tests.support.gguf_files import CONFIGS, VOCAB, random_model, write_model
from tests.support.ranks import on
from tests.support.serving import served

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 344,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 997,
    "max_position_embeddings": 512,
}  # fmt: skip
EXACT = ServeSettings(cache_bytes=64 << 20, prefill_chunk=40, exact_rows=True)
GREEDY = Sampling(max_new_tokens=32, temperature=0.0, ignore_eos=True, use_generation_config=False)


def different(model: nn.Module, vocabulary: int, settings: ServeSettings, texts: int) -> list[int]:
    """The requests whose served tokens are not those of `generate` for the request alone with the same split."""
    rng = random.Random(0)
    prompts = [[rng.randrange(vocabulary) for _ in range(rng.choice([2, 9, 17, 40, 70]))] for _ in range(texts)]
    prompts[1] = prompts[0] + prompts[1]
    alone = [one.tokens for prompt in prompts for one in generate(model, [prompt], GREEDY)]
    loop = serving_loop(model, settings)
    assert 1 <= loop.rows.layout.exact_rows <= settings.max_sequences
    heard = served(loop, [ServeRequest(i, tuple(prompt), GREEDY) for i, prompt in enumerate(prompts)], pause_s=0)
    return [i for i, tokens in enumerate(alone) if heard[i].tokens != tokens] if loop.rows.decides else []


def _different(where: dict[str, int], dtype: str, texts: int) -> list[int]:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        groups = make_groups(Mesh(**where)) if where else single_groups()
        model = fresh(CONFIG | {"dtype": dtype}, seed=3, groups=groups, **where)
        return different(model, CONFIG["vocab_size"], EXACT, texts)


@pytest.mark.parametrize(
    ("where", "dtype"),
    [
        ({}, "bfloat16"),
        *(
            pytest.param(where, dtype, marks=pytest.mark.slow)
            for where, dtype in (
                ({}, "float32"), ({"tp": 2}, "bfloat16"), ({"tp": 2}, "float32"), ({"pp": 2}, "bfloat16"),
                ({"pp": 2}, "float32"),
            )
        ),
    ],
)  # fmt: skip
def test_other_requests_do_not_change_an_answer(where: dict[str, int], dtype: str) -> None:
    assert on(Mesh(**where).size, _different, where, dtype, 16) == [[]] * Mesh(**where).size


def _different_quantized(file: str, dtype: str, where: dict[str, int]) -> list[int]:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        groups = make_groups(Mesh(**where)) if where else single_groups()
        return different(load(file, dtype=dtype, groups=groups, **where), VOCAB, EXACT, 16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("where", [{}, {"tp": 2}, {"pp": 2}])
def test_other_requests_do_not_change_an_answer_of_q4_1(where: dict[str, int], dtype: str, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_model(file, random_model(CONFIGS["llama"]), ("Q4_1",))
    size = Mesh(**where).size
    assert on(size, _different_quantized, str(file), dtype, where) == [[]] * size


def test_rows_of_a_step_are_at_most_the_exact_ones_and_prompts_are_unsplit() -> None:
    layout = CacheLayout(100, 4, exact_rows=2, chunked=False, reused=False)
    scheduler = Scheduler(
        ServeSettings(block_tokens=4, prefill_chunk=4, exact_rows=True), BlockPool(layout, keeps_prefixes=True)
    )
    for i in range(5):
        scheduler.submit(ServeRequest(i, tuple(range(6))), 3)
    for _ in range(5):
        (prompt,) = [batch for batch in scheduler.plan().batches if batch[0].count > 1]
        assert [(row.start, row.count) for row in prompt] == [(0, 6)]
    assert [len(batch) for batch in scheduler.plan().batches] == [1, 2, 2]
    assert not scheduler.pool.match(range(6))
