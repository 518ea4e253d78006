"""What a server measures, in the format of Prometheus."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from calm.serving.batcher import Batcher

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 600)
GAUGES = {"running": "Texts that are being written.", "waiting": "Texts that wait for a row."}
COUNTERS = {
    "finished": "Texts written to their end.",
    "cancelled": "Texts whose client left.",
    "failed": "Texts that ended with an error.",
    "steps": "Steps of the batcher.",
    "patches": "Patches written.",
    "prompt_tokens": "Prompt tokens read.",
    "new_tokens": "Tokens written.",
    "busy_seconds": "Seconds in which there was a text to write.",
}


class BatcherCollector(Collector):
    """The batcher's own counts, read when they are asked for."""

    def __init__(self, batcher: Batcher):
        self.batcher = batcher

    def collect(self) -> Iterator[Metric]:
        stats = self.batcher.stats()
        for name, meaning in GAUGES.items():
            yield GaugeMetricFamily(f"calm_{name}", meaning, getattr(stats, name))
        for name, meaning in COUNTERS.items():
            yield CounterMetricFamily(f"calm_{name}", meaning, getattr(stats, name))


class Metrics:
    """The counts of one server."""

    def __init__(self, batcher: Batcher):
        self.registry = CollectorRegistry()
        self.registry.register(BatcherCollector(batcher))
        self.requests = Counter("calm_requests", "Requests answered.", ("path", "status"), registry=self.registry)
        self.first_piece = Histogram(
            "calm_first_token_seconds",
            "From a request to the first tokens of a text.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.whole = Histogram(
            "calm_request_seconds", "From a request to its last text's end.", buckets=SECONDS, registry=self.registry
        )

    def page(self) -> bytes:
        return generate_latest(self.registry)
