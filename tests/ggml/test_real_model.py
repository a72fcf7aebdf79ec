"""SmolLM2-135M-Instruct from its GGUF file: the same sensible answer on every mesh, and transformers' values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from partita.checkpoint.find import find_model
from partita.cli.sample_model import sample_model
from partita.errors import ModelError
from partita.generation import load_tokenizer
from partita.torch import Sampling, generate
from partita.torch.load import load
from tests.support.ranks import on

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

QUESTIONS = ("What is the capital of France?", "Count from 1 to 5.")


@pytest.fixture(scope="module")
def file() -> Path:
    try:
        return sample_model()
    except ModelError as error:
        pytest.skip(f"SmolLM2 is not on this machine and cannot be fetched: {error}")


def _answers(file: str, split: dict[str, int]) -> list[tuple[int, ...]]:
    tokenizer = load_tokenizer(find_model(file))
    model = load(file, **split)
    prompts = [tokenizer.encode_chat(question) for question in QUESTIONS]
    made = generate(model, prompts, Sampling(temperature=0.0, max_new_tokens=24), tokenizer=tokenizer)
    return [tuple(one.tokens) for one in made]


def test_every_mesh_gives_the_same_sensible_answer(file: Path) -> None:
    tokenizer = load_tokenizer(find_model(file))
    [expected] = on(1, _answers, str(file), {"tp": 1})
    texts = [tokenizer.decode(list(tokens)) for tokens in expected]
    assert "Paris" in texts[0]
    assert all(number in texts[1] for number in "12345")
    for split in ({"tp": 2}, {"tp": 3}, {"pp": 2}):
        assert on(max(split.values()), _answers, str(file), split) == [expected] * max(split.values()), split


def test_logits_are_those_of_transformers(file: Path) -> None:
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    ids = torch.tensor([load_tokenizer(find_model(file)).encode("The quick brown fox jumps over the lazy dog.")])
    with torch.no_grad():
        expected, found = other(input_ids=ids).logits, load(file)(input_ids=ids).logits
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_tokenizer_is_that_of_transformers_but_for_digits(file: Path) -> None:
    from transformers import AutoTokenizer

    mine, other = load_tokenizer(find_model(file)), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in ("Hello  world\n\n  I'm <|im_start|>user", "Zoë's naïve 東京", "def f(x):\n    return x"):
        assert mine.encode(text) == other.encode(text)
    # The published tokenizer of SmolLM2 takes every digit alone, as the file says; transformers overlooks it.
    assert len(mine.encode("2024")) == 4
    assert mine.encode_chat("Hi", "Be brief.") == list(
        other.apply_chat_template(
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
            add_generation_prompt=True, return_dict=False,
        )
    )  # fmt: skip
