"""With NaN among its logits a model wrote the last token for ever while sampling, and top-k failed inside of numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from partita.errors import ModelError
from partita.generation import Sampling
from tests.bad_input.models import LLAMA, weights, write
from tests.bugs.test_generation_config import CONFIG, PROMPT
from tests.cli.conftest import Run, partita
from tests.support.loaded import random_model
from tests.support.mlx_ranks import mlx_ranks
from tests.support.ranks import ranks

__all__ = ["partita"]

GREEDY = Sampling(8, ignore_eos=True)
SAMPLINGS = [
    GREEDY,
    Sampling(8, temperature=1.0, top_k=0, ignore_eos=True),
    Sampling(8, temperature=1.0, top_k=5, ignore_eos=True),
    Sampling(8, temperature=1.0, xtc_probability=1.0, ignore_eos=True),
    Sampling(8, repetition_penalty=1.1, ignore_eos=True),
]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def spoilt(folder: Path, name: str, row: int, value: float) -> None:
    """A model on disk, one row of whose tensor `name` has this value."""
    random_model(transformers.LlamaForCausalLM, transformers.LlamaConfig(**CONFIG)).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name][row] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def errors(
    engine: str, folder: str, where: dict[str, int], prompts: list[list[int]], samplings: list[Sampling]
) -> list[str]:
    """What each way of choosing tokens ends with on this rank."""
    if engine == "torch":
        from partita.torch import generate, load
    else:
        from partita.mlx import generate, load  # type: ignore[assignment]
    model, found = load(folder, **where), []  # type: ignore[arg-type]
    for sampling in samplings:
        try:
            found.append(str([g.tokens for g in generate(model, prompts, sampling)]))  # type: ignore[arg-type]
        except ModelError as error:
            found.append(str(error))
    return found


def on_all(
    engine: str, folder: Path, where: dict[str, int], prompts: list[list[int]], samplings: list[Sampling]
) -> list[str]:
    """The same, which must be the same on two ranks."""
    pool: Any = ranks(2) if engine == "torch" else mlx_ranks(2)
    first, second = pool.run(errors, engine, str(folder), where, prompts, samplings)
    assert first == second
    return list(first)


def message(step: int, rank: int) -> str:
    return (
        f"at step {step} logits of rank {rank} are NaN or infinite, so no token can be chosen. Check the weights, or compute "
        "in a wider dtype (--dtype float32)."
    )


@pytest.mark.parametrize("engine", ["torch", "mlx"])
def test_the_step_and_the_rank_are_named(engine: str, tmp_path: Path) -> None:
    spoilt(tmp_path / "nan", HEAD, 25, torch.nan)
    # Of two ranks the second one has row 25 over tp, and all rows over pp.
    for where in ({"tp": 2}, {"pp": 2}):
        prompts = [PROMPT, [2, 7], [1, 8]]
        assert on_all(engine, tmp_path / "nan", where, prompts, SAMPLINGS) == [message(1, 1)] * len(SAMPLINGS)


@pytest.mark.parametrize("engine", ["torch", "mlx"])
def test_a_later_step_of_one_sequence_of_several(engine: str, tmp_path: Path) -> None:
    prompts = [PROMPT, [2, 7, 1, 8, 2], [6, 6, 2, 6, 0]]
    spoilt(tmp_path / "clean", EMBEDDING, 25, 0.0)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "clean").eval()
    ids = torch.tensor(prompts)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, do_sample=False).tolist()
    # The first token that only the first sequence has, behind its first.
    place = next(i for i in range(6, 12) if out[0][i] not in out[0][:i] + out[1][:i] + out[2][:i])
    tensors = load_file(tmp_path / "clean" / "model.safetensors")
    tensors[EMBEDDING][out[0][place]] = torch.nan
    save_file(tensors, tmp_path / "clean" / "model.safetensors", {"format": "pt"})
    for where, rank in (({"tp": 2}, 0), ({"pp": 2}, 1), ({"dp": 2}, 0)):
        assert on_all(engine, tmp_path / "clean", where, prompts, [GREEDY]) == [message(place - 5 + 2, rank)]


@pytest.mark.parametrize("engine", ["torch", "mlx"])
def test_minus_infinity_excludes_tokens_but_not_all(engine: str, tmp_path: Path) -> None:
    spoilt(tmp_path / "clean", HEAD, 25, 0.0)
    some, every = tuple(range(30)), tuple(range(31))
    settings = [
        Sampling(3, suppress_tokens=ids, temperature=t, top_k=0, ignore_eos=True)
        for ids in (some, every)
        for t in (0.0, 1.0)
    ]
    for where in ({"tp": 2}, {"pp": 2}):
        found = on_all(engine, tmp_path / "clean", where, [PROMPT], settings)
        assert found[:2] == ["[(30, 30, 30)]"] * 2
        assert all(text.startswith("at step 1 every logit is minus infinity") for text in found[2:])


@pytest.mark.fresh
@pytest.mark.timeout(120)
@pytest.mark.parametrize("engine", ["torch", "mlx"])
def test_the_command_ends_with_one_error(engine: str, tmp_path: Path, partita: Run) -> None:
    tensors = weights()
    tensors["lm_head.weight"][-1] = torch.nan
    folder = str(write(tmp_path / "model", LLAMA, tensors))
    said = partita("generate", folder, "hi", "--max-new-tokens", "4", "--tp", "2", "--engine", engine)
    assert said.code == 2, said.err
    assert said.err.count("error: ") == 1, said.err
    assert message(1, 1) in " ".join(said.err.split())
