"""The largest bytes of tensors at once, measured while ranks train and generate, are those that are predicted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import partita.torch as pt
from partita.core.mesh import Mesh
from partita.core.model.families import spec_from_config
from partita.cost.memory import memory
from partita.cost.model import ModelCost
from partita.cost.work import Arrangement, MemoryUse, Work
from tests.support.peaks import measured
from tests.support.ranks import on

MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 4, "vocab_size": 6000, "max_position_embeddings": 512, "tie_word_embeddings": False,
    },
}  # fmt: skip
LENGTH, BATCH, NEW_TOKENS = 128, 4, 4
TRAINING: dict[str, Arrangement] = {
    "one rank": Arrangement(),
    "tp 2": Arrangement(mesh=Mesh(tp=2)),
    "pp 2": Arrangement(mesh=Mesh(pp=2), microbatches=4),
    "zero 1": Arrangement(mesh=Mesh(dp=2), zero=1),
    "zero 2, two micro-batches": Arrangement(mesh=Mesh(dp=2), zero=2, microbatches=2),
    "recomputed": Arrangement(recompute="full"),
}
GENERATING: dict[str, Arrangement] = {
    "one rank": Arrangement(),
    "tp 2": Arrangement(mesh=Mesh(tp=2)),
    "pp 2": Arrangement(mesh=Mesh(pp=2), microbatches=2),
    "cp 2": Arrangement(mesh=Mesh(cp=2)),
}
LONG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 1 << 16,
}  # fmt: skip
CASES = [*(("train", name) for name in TRAINING), *(("generate", name) for name in GENERATING)]


def _run(config: dict[str, Any], dtype: str, arrangement: Arrangement, purpose: str) -> int:
    """On a rank: the largest bytes of its tensors at once."""
    mesh = arrangement.mesh

    def new() -> Any:
        return pt.fresh(
            {**config, "dtype": dtype},
            dtype=dtype,
            tp=mesh.tp,
            pp=mesh.pp,
            dp=mesh.dp,
            cp=mesh.cp,
            zero=arrangement.zero,
        )

    if mesh.cp > 1:
        _generate(new(), 1, 8)  # measures the family on a small model
    with measured() as peak:
        model = new()
        if purpose == "train":
            settings = pt.TrainSettings(
                steps=2, batch_size=BATCH, sequence_length=LENGTH, microbatches=arrangement.microbatches,
                zero=arrangement.zero, warmup_steps=0,
                checkpointing=False if arrangement.recompute == "none" else arrangement.recompute,
            )  # fmt: skip
            pt.train(model, torch.randint(6000, (BATCH * (LENGTH + 1) * 2,)), settings)
        else:
            _generate(model, BATCH, LENGTH)
    return peak[0]


def _generate(model: Any, count: int, length: int) -> None:
    prompts = [[1 + (i * k) % 250 for i in range(length)] for k in range(count)]
    pt.generate(model, prompts, pt.Sampling(max_new_tokens=NEW_TOKENS, ignore_eos=True))


def _of_prompt(cp: int, dtype: str, length: int) -> int:
    """The largest bytes at once of what a prompt and new tokens take beside the weights."""
    model = pt.fresh({**LONG, "dtype": dtype}, dtype=dtype, cp=cp)
    _generate(model, 1, 8)
    with measured() as peak:
        _generate(model, 1, length)
    return peak[0]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("dtype", "length"), [("float32", 1000), pytest.param("bfloat16", 4000, marks=pytest.mark.slow)]
)
def test_prompts_over_two_context_ranks_may_be_nearly_twice_as_long(dtype: str, length: int) -> None:
    (alone,) = on(1, _of_prompt, 1, dtype, length)
    for together in on(2, _of_prompt, 2, dtype, length * 19 // 10):
        assert together <= alone


def _predicted(config: dict[str, Any], dtype: str, arrangement: Arrangement, purpose: str) -> tuple[MemoryUse, ...]:
    model = ModelCost.of(spec_from_config({**config, "dtype": dtype}))
    if purpose == "train":
        return memory(model, Work(batch_size=BATCH, sequence_length=LENGTH), arrangement)
    work = Work(purpose="generate", sequences=BATCH, sequence_length=LENGTH, context=LENGTH + NEW_TOKENS)
    return memory(model, work, arrangement)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("purpose", "name"), CASES)
def test_tensors_take_what_is_predicted(purpose: str, name: str) -> None:
    arrangement = (TRAINING if purpose == "train" else GENERATING)[name]
    config = MODELS["llama"]
    measured = on(arrangement.mesh.size, _run, config, "float32", arrangement, purpose)
    predicted = [use.total for use in _predicted(config, "float32", arrangement, purpose)]
    assert predicted == pytest.approx(measured, rel=0.05)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_shards_of_weights_take_what_is_predicted() -> None:
    """From creating the model to the end of its training. A replica may hold a bucket more, which gloo has not released yet."""
    arrangement = Arrangement(mesh=Mesh(dp=2), zero=3)
    found = on(2, _run, MODELS["llama"], "float32", arrangement, "train")
    (predicted,) = {use.total for use in _predicted(MODELS["llama"], "float32", arrangement, "train")}
    assert predicted == pytest.approx(min(found), rel=0.05)
