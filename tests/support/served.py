"""A tiny model behind a real HTTP server, and what each request is compared with: `generate` for that request alone."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from partita.generation import Generation, Sampling, Tokenizer
from partita.serving import Inbox, ServeSettings
from partita.serving.embedding import EmbeddingInbox
from partita.serving.http.app import make_app
from partita.serving.http.server import Server, bind, url_of
from partita.serving.http.service import Service
from partita.serving.pooling import read_pooling

TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 257,
    "max_position_embeddings": 1024, "eos_token_id": 256, "bos_token_id": None, "dtype": "float64",
}  # fmt: skip
TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% for message in messages %}{% if message.role == 'function' %}{{ raise_exception('no functions') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}{% for call in message.tool_calls or [] %}"
    "({{ call.function.name }} {{ call.function.arguments.city }}){% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking %}<think>{% endif %}{% endif %}"
)


def save_model(folder: Path, template: str | None = TEMPLATE, config: dict[str, Any] = TINY) -> Path:
    """Save a randomly initialized model with a byte-level tokenizer."""
    from partita.generation import byte_tokenizer
    from partita.torch.collectives.groups import single_groups
    from partita.torch.new import fresh
    from partita.torch.weights.save import save

    tokenizer = byte_tokenizer()
    tokenizer.inner.chat_template = template
    save(fresh(config, seed=3, groups=single_groups()), folder, tokenizer=tokenizer)
    return folder


@dataclass
class Served:
    """A server, and the model behind it."""

    url: str
    model: Any
    tokenizer: Tokenizer
    inbox: Inbox | EmbeddingInbox
    service: Service

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        """An official client of this server."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **options)

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=60)

    def call(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """The status and the body of one request; bytes are sent as they are."""
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        with contextlib.closing(self.connection()) as connection:
            connection.request("GET" if data is None else "POST", path, data, headers or {})
            response = connection.getresponse()
            text = response.read()
            is_json = (response.getheader("content-type") or "").startswith("application/json")
            return response.status, json.loads(text) if is_json else text.decode()

    def alone(self, prompt: list[int], **sampling: Any) -> Generation:
        """What `generate` answers to a request alone."""
        from partita.torch.generate import generate

        (generation,) = generate(self.model, [prompt], Sampling(**sampling), tokenizer=self.tokenizer)
        return generation

    def chat_ids(self, text: str, **settings: Any) -> list[int]:
        return self.tokenizer.encode_messages([{"role": "user", "content": text}], settings=settings)


@contextlib.contextmanager
def serving(
    folder: Path, settings: ServeSettings | None = None, adapters: dict[str, Path] | None = None, **options: Any
) -> Iterator[Served]:
    """A running server of the model in `folder`, also with each of `adapters`."""
    from partita.generation import load_tokenizer
    from partita.torch.collectives.groups import single_groups
    from partita.torch.load import load
    from partita.torch.model.parts import plan_of
    from partita.torch.serving import embedding_loop, serving_loop

    model, tokenizer = load(folder, groups=single_groups()), load_tokenizer(folder)
    settings = settings or ServeSettings(cache_bytes=16 << 20)
    encodes = embedding_loop(model, read_pooling(folder), settings)
    loop = encodes or serving_loop(model, settings, tokenizer=load_tokenizer(folder), adapters=adapters)
    context = TINY["max_position_embeddings"]
    if encodes is not None:
        context = encodes.most_tokens or context
        options |= {"embeddings": encodes.inbox, "width": encodes.inbox.width, "pooling": encodes.pooling}
    thread = threading.Thread(target=loop.run)
    thread.start()
    service = Service(
        loop.inbox, tokenizer, "tiny", context, plan_of(model)[0].spec.vocab_size,
        adapters=tuple(adapters or ()), **options,
    )  # fmt: skip
    bound = bind("127.0.0.1", 0)
    server = Server(make_app(service), bound)
    url = url_of(bound)
    server.start()
    try:
        yield Served(url, model, load_tokenizer(folder), loop.inbox, service)
    finally:
        loop.inbox.shutdown(drain=False)
        thread.join()
        server.close()
