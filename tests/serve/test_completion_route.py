"""The official client's completions, models and tokens."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.served import Served


@pytest.mark.parametrize("prompt", ["Once", [79, 110], ["One", "Two"], [[1, 2], [3]]])
def test_prompts_of_every_form(served: Served, prompt: str | list[int] | list[str] | list[list[int]]) -> None:
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        ids = [served.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt]
    else:
        ids = [served.tokenizer.encode(one) if isinstance(one, str) else one for one in prompt]  # type: ignore[misc]
    alone = [
        served.alone(one, max_new_tokens=9, temperature=1.0, seed=4 + i) for one in ids for i in range(2)  # type: ignore[arg-type]
    ]  # fmt: skip
    settings = {"model": "tiny", "prompt": prompt, "max_tokens": 9, "temperature": 1.0, "seed": 4, "n": 2}
    answer = served.client().completions.create(**settings)  # type: ignore[call-overload]
    assert [choice.text for choice in answer.choices] == [one.text for one in alone]
    assert answer.usage.prompt_tokens == sum(map(len, ids))  # type: ignore[arg-type]
    assert answer.usage.completion_tokens == sum(len(one.tokens) for one in alone)
    texts = [""] * len(alone)
    for chunk in served.client().completions.create(**settings, stream=True):  # type: ignore[call-overload]
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [one.text for one in alone]


def test_the_default_is_sixteen_tokens(served: Served) -> None:
    answer = served.client().completions.create(model="tiny", prompt="Once", extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (16, "length")


def test_logprobs_and_offsets(served: Served) -> None:
    bias = {str(i): -100 for i in range(257) if not 32 <= i < 127}
    settings = {"model": "tiny", "prompt": "Once", "max_tokens": 6, "logprobs": 2, "logit_bias": bias}
    (choice,) = served.client().completions.create(**settings).choices  # type: ignore[call-overload]
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset == list(range(6))
    streamed = [
        chunk.choices[0].logprobs
        for chunk in served.client().completions.create(**settings, stream=True)  # type: ignore[call-overload]
        if chunk.choices[0].logprobs and chunk.choices[0].logprobs.tokens
    ]
    assert [token for one in streamed for token in one.tokens] == choice.logprobs.tokens
    assert [offset for one in streamed for offset in one.text_offset] == choice.logprobs.text_offset
    np.testing.assert_allclose([p for one in streamed for p in one.token_logprobs], choice.logprobs.token_logprobs)
    assert [len(top) for top in choice.logprobs.top_logprobs] == [2] * 6


def test_echo(served: Served) -> None:
    for stream in (False, True):
        answer = served.client().completions.create(model="tiny", prompt="Once", max_tokens=5, echo=True, stream=stream)  # type: ignore[call-overload]
        text = "".join(chunk.choices[0].text for chunk in answer) if stream else answer.choices[0].text
        assert text == "Once" + served.alone(list(b"Once"), max_new_tokens=5).text


def test_models_and_tokens(served: Served) -> None:
    (model,) = served.client().models.list().data
    assert model.id == "tiny"
    assert served.client().models.retrieve("tiny").id == "tiny"
    assert served.call("/tokenize", {"prompt": "Hé"}) == (
        200,
        {"tokens": list("Hé".encode()), "count": 3, "max_model_len": 1024},
    )
    messages = [{"role": "user", "content": "Hi"}]
    _, found = served.call("/tokenize", {"messages": messages})
    assert bytes(found["tokens"]) == b"<user>Hi\n<assistant>"
    _, found = served.call("/tokenize", {"messages": messages, "add_generation_prompt": False})
    assert bytes(found["tokens"]) == b"<user>Hi\n"


def test_metrics_count_what_was_answered(served: Served) -> None:
    def value(name: str) -> float:
        lines = served.call("/metrics")[1].splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    names = (
        "partita_prompt_tokens_total",
        "partita_completion_tokens_total",
        "partita_time_to_first_token_seconds_count",
    )
    before = [value(name) for name in names]
    served.client().completions.create(model="tiny", prompt="Once", max_tokens=5, extra_body={"ignore_eos": True})
    assert [value(name) for name in names] == [before[0] + 4, before[1] + 5, before[2] + 1]
    assert value("partita_up") == 1
