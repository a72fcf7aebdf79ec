"""Requests for a serving loop, and what `generate` gives for each alone."""

from __future__ import annotations

import copy
import random
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from partita.core.mesh import Mesh
from partita.serving import Event, Finished, ServeRequest, ServeSettings, ServingLoop, Token
from partita.torch import Sampling, byte_tokenizer, generate
from partita.torch.collectives.groups import make_groups, single_groups
from partita.torch.proof.family import plan_of_model, small_model
from partita.torch.serving import serving_loop
from partita.torch.split.apply import apply_plan
from partita.torch.split.finish import finish
from partita.torch.transformers_internals import quiet

VOCABULARY = 127
"""That of the small models: bytes that are characters by themselves."""


def unsplit_model(family: str, changes: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """A small model of a family over bytes; its large weights leave no doubt which token is the most likely."""
    config = AutoConfig.for_model(family, **changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    unsplit = small_model(model, plan_of_model(model, Mesh()).spec.num_heads, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in unsplit.named_parameters():
            if parameter.dim() > 1:
                std = 0.7 if "emb" in name or "wte" in name else 1.5 / parameter.shape[-1] ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return unsplit


def split_model(unsplit: nn.Module, where: dict[str, int]) -> nn.Module:
    plan = plan_of_model(unsplit, Mesh(**where))
    groups = make_groups(plan.mesh) if where else single_groups()
    return finish(apply_plan(copy.deepcopy(unsplit), plan, groups), plan, groups)


@dataclass
class Heard:
    """The events of one request."""

    events: list[Event] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: Event) -> None:
        assert not self.ended.is_set()
        self.events.append(event)
        if isinstance(event, Finished):
            self.ended.set()

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(event.token for event in self.events if isinstance(event, Token))

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Token))

    @property
    def finished(self) -> Finished:
        (last,) = [event for event in self.events if isinstance(event, Finished)]
        assert self.events[-1] is last
        return last


def random_requests(count: int, seed: int, *, longest: int = 24, most: int = 12) -> list[ServeRequest]:
    """Requests of random lengths and of every kind of sampling; some share a beginning."""
    rng = random.Random(seed)
    shared = [rng.randrange(VOCABULARY) for _ in range(longest)]
    kinds: list[dict[str, Any]] = [
        {}, {"temperature": 0.8}, {"temperature": 1.0, "top_p": 0.9, "top_k": 20}, {"temperature": 1.2, "min_p": 0.05},
        {"repetition_penalty": 1.3}, {"presence_penalty": 0.6, "frequency_penalty": 0.4, "temperature": 0.7},
        {"logit_bias": {65: 4.0, 66: -3.0}, "temperature": 1.0}, {"stop": ("e", "ab"), "temperature": 1.0},
        {"min_new_tokens": 3}, {"temperature": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.05},
    ]  # fmt: skip
    found = []
    for number in range(count):
        length = rng.randint(1, longest)
        own = [rng.randrange(VOCABULARY) for _ in range(length)]
        prompt = shared[: rng.randint(1, longest)] + own[:3] if rng.random() < 0.4 else own
        sampling = Sampling(
            rng.randint(1, most), seed=rng.randrange(1000), use_generation_config=False, **rng.choice(kinds)
        )
        found.append(ServeRequest(number, tuple(prompt), sampling, logprobs=rng.random() < 0.3, top_logprobs=0))
    return found


def served(
    loop: ServingLoop, requests: list[ServeRequest], *, pause_s: float = 0.004, cancelled: tuple[int, ...] = ()
) -> dict[int, Heard]:
    """Serve requests that arrive at random times; `cancelled` are cancelled after their first token. Every rank calls it."""
    heard = {request.id: Heard() for request in requests}

    def cancelling(event: Event) -> None:
        heard[event.id](event)
        loop.inbox.cancel(event.id)

    def arrive() -> None:
        rng = random.Random(7)
        try:
            for request in requests:
                time.sleep(rng.random() * pause_s)
                loop.inbox.submit(request, cancelling if request.id in cancelled else heard[request.id])
        finally:
            loop.inbox.shutdown()

    if not loop.rows.decides:
        loop.run()
        return heard
    with ThreadPoolExecutor(1) as pool:
        arriving = pool.submit(arrive)
        loop.run()
        arriving.result()
    return heard


def alone(model: nn.Module, request: ServeRequest) -> tuple[tuple[int, ...], str, str]:
    """The tokens, the text and the reason of a request in a call of `generate` of its own."""
    (one,) = generate(model, [request.prompt], request.sampling, tokenizer=byte_tokenizer())
    return one.tokens, one.text, {"eos": "stop"}.get(one.finish_reason, one.finish_reason)


def compare(
    family: str,
    changes: dict[str, Any],
    where: dict[str, int],
    settings: ServeSettings,
    count: int,
    seed: int,
    batched: bool,
    longest: int = 24,
) -> list[str]:
    """Serve random requests, and describe each whose answer is not the one that it gets alone; on the first rank only."""
    torch.set_num_threads(1)
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        unsplit = unsplit_model(family, changes, torch.float64)
        loop = serving_loop(split_model(unsplit, where), settings, tokenizer=byte_tokenizer())
        assert loop.rows.layout.batched == batched
        requests = random_requests(count, seed, longest=longest)
        cancelled = tuple(request.id for request in requests[::7])
        heard = served(loop, requests, cancelled=cancelled)
        if not loop.rows.decides:
            return []
        reference = split_model(unsplit, {})
        wrong = []
        for request in requests:
            tokens, text, reason = alone(reference, request)
            one = heard[request.id]
            end = one.finished
            if request.id in cancelled and end.reason == "cancelled":
                if one.tokens != tokens[: len(one.tokens)] or not text.startswith(one.text):
                    wrong.append(f"cancelled {request}: {one.tokens} instead of {tokens}")
            elif (one.tokens, one.text, end.reason) != (tokens, text, reason):
                wrong.append(f"{request}: {one.tokens} {one.text!r} {end} instead of {tokens} {text!r} {reason}")
    stats = loop.inbox.stats()
    if stats.running or stats.queued or stats.blocks_used:
        wrong.append(f"left behind: {stats}")
    return wrong
