"""`/v1/embeddings`: each vector is what transformers' model and the folder's pooling give for the text alone."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from partita.core.mesh import Mesh
from partita.errors import ModelError
from partita.generation import load_tokenizer
from partita.serving.pooling import Pooling, read_pooling
from tests.serve.test_errors import JSON
from tests.support.ranks import on
from tests.support.sample_encoder import sample_encoder
from tests.support.served import TINY, Served, save_model, serving

BERT: dict[str, Any] = {
    "architectures": ["BertModel"], "model_type": "bert", "hidden_size": 24, "intermediate_size": 40,
    "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 257, "max_position_embeddings": 64,
    "initializer_range": 0.4, "dtype": "float64",
}  # fmt: skip
ROBERTA = {
    **BERT, "architectures": ["RobertaForMaskedLM"], "model_type": "roberta", "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 2, "type_vocab_size": 1, "num_attention_heads": 4,
}  # fmt: skip
MODES = {
    "cls": "cls_token", "max": "max_tokens", "mean": "mean_tokens", "mean_sqrt_len": "mean_sqrt_len_tokens",
    "weightedmean": "weightedmean_tokens", "lasttoken": "lasttoken",
}  # fmt: skip
TEXTS = ["What is a fugue?", "Hello", "A", "hello", "The quick brown fox jumps over the lazy dog.", "Hullo"] * 3
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-12}


def with_modules(folder: Path, *kinds: str, normalizes: bool = True, **more: Any) -> Path:
    """Write the files of sentence-transformers into a model's folder."""
    types = ["Transformer", "Pooling", *(["Normalize"] if normalizes else [])]
    modules = [
        {"type": f"sentence_transformers.models.{kind}", "path": "1_Pooling" if i == 1 else ""}
        for i, kind in enumerate(types)
    ]
    (folder / "1_Pooling").mkdir(exist_ok=True)
    pooling = {f"pooling_mode_{MODES[kind]}": kind in kinds for kind in MODES}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 24, **pooling}))
    (folder / "modules.json").write_text(json.dumps(modules))
    for name, data in more.items():
        (folder / f"{name}.json").write_text(json.dumps(data))
    return folder


def alone(folder: Path, texts: list[str], pool: Any) -> np.ndarray[Any, Any]:
    """What transformers' own model gives for each text by itself, pooled."""
    from transformers import AutoModel

    model, tokenizer = AutoModel.from_pretrained(folder).eval(), load_tokenizer(folder)
    with torch.no_grad():
        found = [model(input_ids=torch.tensor([tokenizer.encode(text)])).last_hidden_state[0] for text in texts]
    return np.stack([pool(states).numpy() for states in found])


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.norm()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("bert") / "model", None, BERT)


@pytest.fixture(scope="module")
def encoder(bert: Path) -> Iterator[Served]:
    with serving(bert) as one:
        yield one


def embed(served: Served, texts: Any, **settings: Any) -> Any:
    with served.client() as client:
        return client.embeddings.create(model="tiny", input=texts, **settings)


def vectors(answer: Any) -> np.ndarray[Any, Any]:
    assert [one.index for one in answer.data] == list(range(len(answer.data)))
    return np.array([one.embedding for one in answer.data])


def test_vectors_are_those_of_each_text_alone(encoder: Served, bert: Path) -> None:
    expected = alone(bert, TEXTS, lambda states: states.mean(0))
    answer = embed(encoder, TEXTS, encoding_format="float")
    np.testing.assert_allclose(vectors(answer), expected, **CLOSE)
    tokens = sum(len(text) for text in TEXTS)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens, answer.model) == (tokens, tokens, "tiny")
    # The official client asks for base64 unless it is told not to, which has float32.
    np.testing.assert_array_equal(vectors(embed(encoder, TEXTS)), expected.astype(np.float32))
    ids = [list(text.encode()) for text in TEXTS]
    np.testing.assert_allclose(vectors(embed(encoder, ids, encoding_format="float")), expected, **CLOSE)
    np.testing.assert_allclose(vectors(embed(encoder, ids[0], encoding_format="float"))[0], expected[0], **CLOSE)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda text: embed(encoder, text, encoding_format="float"), TEXTS))
    np.testing.assert_allclose(np.concatenate([vectors(one) for one in answers]), expected, **CLOSE)
    assert encoder.service.metrics.embeddings._value.get() >= 3 * len(TEXTS)


@pytest.mark.parametrize(
    ("kinds", "pool"),
    [
        (["cls"], lambda h: h[0]), (["max"], lambda h: h.max(0).values), (["lasttoken"], lambda h: h[-1]),
        (["mean_sqrt_len"], lambda h: h.sum(0) / len(h) ** 0.5),
        (["weightedmean"], lambda h: (h * torch.arange(1, len(h) + 1)[:, None]).sum(0) / sum(range(1, len(h) + 1))),
        (["mean", "cls"], lambda h: torch.cat([h[0], h.mean(0)])),
    ],
)  # fmt: skip
def test_poolings(tmp_path: Path, kinds: list[str], pool: Any) -> None:
    pooling = read_pooling(with_modules(tmp_path, *kinds))
    hidden = torch.randn(3, 7, 5, dtype=torch.float64)
    expected = np.stack([unit(pool(row)).numpy() for row in hidden])
    np.testing.assert_allclose(pooling.pool(hidden.numpy()), expected, **CLOSE)


def test_what_the_folder_says(tmp_path: Path) -> None:
    folder = with_modules(
        save_model(tmp_path / "roberta", None, ROBERTA), "mean",
        sentence_bert_config={"max_seq_length": 70, "do_lower_case": True},
        config_sentence_transformers={"prompts": {"q": "Query: "}, "default_prompt_name": "q"},
    )  # fmt: skip
    with serving(folder) as one:
        texts = [f"query: {text.lower()}" for text in TEXTS[:3]]
        expected = alone(folder, texts, lambda states: unit(states.mean(0)))
        np.testing.assert_allclose(vectors(embed(one, TEXTS[:3], encoding_format="float")), expected, **CLOSE)
        short = vectors(embed(one, TEXTS[:3], encoding_format="float", dimensions=5))
        cut = expected[:, :5]
        np.testing.assert_allclose(short, cut / np.linalg.norm(cut, axis=1, keepdims=True), **CLOSE)
        # Two of the table's 64 positions are for padding.
        assert one.call("/v1/embeddings", {"input": [[5] * 62]})[0] == 200
        status, body = one.call("/v1/embeddings", {"input": [[5], [5] * 63]})
        assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
        assert body["error"]["message"].startswith("input.1 has 63 tokens, but this model takes at most 62.")


def test_a_decoder_with_a_pooling(tmp_path: Path) -> None:
    folder = with_modules(save_model(tmp_path / "llama", None, TINY), "lasttoken")
    with serving(folder) as one:
        expected = alone(folder, TEXTS, lambda states: unit(states[-1]))
        np.testing.assert_allclose(vectors(embed(one, TEXTS, encoding_format="float")), expected, **CLOSE)


def test_a_model_that_continues_text_is_refused(served: Served) -> None:
    status, body = served.call("/v1/embeddings", {"input": "Hi"})
    assert (status, body["error"]["param"]) == (400, "model")
    assert "continues text: each of its tokens sees only those before it" in body["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_an_encoder_continues_no_text(encoder: Served, path: str) -> None:
    status, body = encoder.call(path, {"prompt": "Hi", "messages": [{"role": "user", "content": "Hi"}], "input": "Hi"})
    assert status == 400
    assert body["error"]["message"] == "this model gives embeddings of texts and continues none. Use /v1/embeddings."
    assert encoder.call("/tokenize", {"prompt": "Hi"})[1]["tokens"] == [72, 105]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "input: Field required"), ({"input": []}, "from 1 to 2048 texts; got 0"),
        ({"input": ["a", ""]}, "input.1 is empty"), ({"input": [[]]}, "input.0 is empty"),
        ({"input": [[3, 900]]}, "ids 0 to 256; got 900"), ({"input": ["a"] * 2049}, "got 2049"),
        ({"input": "a", "dimensions": 25}, "at most 24, the width of this model's vectors; got 25"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a" * 65}, "input.0 has 65 tokens, but this model takes at most 64"),
        ({"input": "a", "model": "other"}, "'other' is not served here"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(encoder: Served, body: dict[str, Any], text: str) -> None:
    status, answer = encoder.call("/v1/embeddings", body)
    assert status == (404 if "model" in body else 400)
    assert text in answer["error"]["message"]


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["input", "model", "encoding_format", "dimensions"]), JSON)
def test_any_value_is_answered(encoder: Served, field: str, value: Any) -> None:
    status, answer = encoder.call("/v1/embeddings", {"input": "Hi", field: value})
    assert status in (200, 400, 404), answer
    if status != 200:
        assert set(answer["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"modules": [{"type": "x.Transformer"}, {"type": "x.Dense"}]}, "got 'Dense'. Use sentence-transformers"),
        ({"modules": [{"type": "x.Transformer"}]}, "need a module of the type Pooling"),
        ({"modules": [{"type": "x.Pooling", "path": "none"}]}, "config.json does not exist"),
    ],
)
def test_modules_that_are_refused(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    with pytest.raises(ModelError, match=text):
        read_pooling(with_modules(tmp_path, "mean", **change))
    with pytest.raises(ModelError, match="the pooling must be of cls, max"):
        read_pooling(with_modules(tmp_path))


def computed(folder: str, where: dict[str, int]) -> list[list[float]]:
    """The vectors of `TEXTS` with a model split over ranks, on the first rank of each replica; none on the other ranks."""
    from partita.torch import load
    from partita.torch.serving import embedding_loop

    torch.set_num_threads(1)
    tokenizer, found = load_tokenizer(Path(folder)), list[Any]()
    loop = embedding_loop(load(folder, **where), Pooling())
    assert loop is not None
    if loop.encoder.decides:
        loop.inbox.embed([tuple(tokenizer.encode(text)) for text in TEXTS], found.append)
        threading.Timer(0.3, loop.inbox.shutdown).start()
    loop.run()
    return [vector.tolist() for vector in found[0]] if found else []


@pytest.mark.parametrize("where", [{"tp": 2}, {"pp": 2}, {"dp": 2}])
def test_ranks(bert: Path, where: dict[str, int]) -> None:
    expected = alone(bert, TEXTS, lambda states: states.mean(0))
    replicas, others = 1 + ("dp" in where), int("dp" not in where)
    found = on(Mesh(**where).size, computed, str(bert), where)
    for one in found[:replicas]:
        np.testing.assert_allclose(np.array(one), expected, **CLOSE)
    assert found[replicas:] == [[]] * others


def test_an_error_reaches_the_client(bert: Path) -> None:
    with serving(bert) as one:
        one.inbox.shutdown()
        status, body = one.call("/v1/embeddings", {"input": "Hi"})
        assert (status, body["error"]["code"]) == (503, "unavailable")


@pytest.mark.slow
def test_a_real_encoder() -> None:
    folder = sample_encoder()
    texts = ["A man is eating food.", "A man eats something.", "The stock market fell today."]
    with serving(folder) as one:
        found = vectors(embed(one, texts))
        ids = one.tokenizer.encode(texts[0])
        data = one.call("/v1/embeddings", {"input": [ids], "encoding_format": "base64"})[1]["data"][0]["embedding"]
    # float32: the model's rounding.
    np.testing.assert_allclose(found, alone(folder, texts, lambda states: unit(states.mean(0))), rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(data), "<f4"), found[0], rtol=0, atol=1e-5)
    assert found[0] @ found[1] > found[0] @ found[2] + 0.2
