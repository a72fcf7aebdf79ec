"""What the server measures, in Prometheus's text format."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from partita.serving.http.inbox import Inbox

FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKEN_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5)
REQUEST_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Upper ends of the histograms' buckets, in seconds."""


class Metrics:
    """The counters and histograms of one server."""

    def __init__(self, inbox: Inbox) -> None:
        """Start at zero; the loop's own numbers are asked of `inbox` whenever the metrics are read."""
        self.registry = CollectorRegistry()
        name, registry = "partita", self.registry
        self.requests = Counter(
            f"{name}_http_requests", "HTTP requests by path and status.", ("path", "status"), registry=registry
        )
        self.finished = Counter(f"{name}_answers", "Answers by finish reason.", ("reason",), registry=registry)
        self.prompt_tokens = Counter(f"{name}_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.cached_tokens = Counter(
            f"{name}_cached_prompt_tokens", "Tokens of prompts that came from the prefix cache.", registry=registry
        )
        self.completion_tokens = Counter(f"{name}_completion_tokens", "Tokens of answers.", registry=registry)
        self.embeddings = Counter(f"{name}_embeddings", "Texts whose vectors were computed.", registry=registry)
        self.first_token = Histogram(
            f"{name}_time_to_first_token_seconds", "From the request to its first token.", buckets=FIRST_TOKEN_S,
            registry=registry,
        )  # fmt: skip
        self.per_token = Histogram(
            f"{name}_time_per_token_seconds", "From a token of an answer to the next one.", buckets=TOKEN_S,
            registry=registry,
        )  # fmt: skip
        self.duration = Histogram(
            f"{name}_answer_seconds", "From the request to the end of its answer.", buckets=REQUEST_S,
            registry=registry,
        )  # fmt: skip
        registry.register(_OfLoop(inbox))

    def text(self) -> bytes:
        """All metrics as text."""
        return generate_latest(self.registry)


class _OfLoop(Collector):
    """The numbers that the step loop counts itself."""

    def __init__(self, inbox: Inbox) -> None:
        self.inbox = inbox

    def collect(self) -> Iterator[Metric]:
        now = self.inbox.stats()
        for name, text, value in (
            ("up", "Whether a step can be made.", float(not self.inbox.closed)),
            ("queued_requests", "Requests that wait.", now.queued),
            ("running_requests", "Requests that are being answered.", now.running),
            ("cache_blocks_used", "Blocks of the KV cache that running requests hold.", now.blocks_used),
            ("cache_blocks_kept", "Blocks of the KV cache that keep the beginning of earlier texts.", now.blocks_kept),
            ("cache_blocks_free", "Empty blocks of the KV cache.", now.blocks_free),
        ):
            yield GaugeMetricFamily(f"partita_{name}", text, value)
        yield CounterMetricFamily("partita_steps", "Steps of the loop.", now.steps)
        yield CounterMetricFamily("partita_generated_tokens", "Tokens that the loop has generated.", now.tokens)
