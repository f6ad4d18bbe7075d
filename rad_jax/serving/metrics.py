"""Numbers for Prometheus; none of them knows a patient."""

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
# Of `Engine.stats`: what each is, and whether it only grows.
STATS = {
    "queued": ("Requests that wait.", False),
    "running": ("Requests that are being written.", False),
    "kv_tokens_used": ("Tokens held in the cache.", False),
    "kv_tokens_total": ("Tokens that the cache can hold.", False),
    "tokens_total": ("Tokens written.", True),
    "requests_total": ("Requests taken into the queue.", True),
}


class Metrics:
    """Of one server.

    Args:
        stats: `Engine.stats`.
    """

    def __init__(self, stats: Callable[[], Mapping[str, float]]):
        self._registry = CollectorRegistry()
        names = ("route", "status")
        self._requests = Counter("rad_jax_http_requests", "Requests answered.", names, registry=self._registry)
        self._seconds = Histogram(
            "rad_jax_http_seconds",
            "Until the answer was whole.",
            ("route",),
            buckets=SECONDS,
            registry=self._registry,
        )
        self.first_token = Histogram(
            "rad_jax_first_token_seconds", "Until the first token.", buckets=SECONDS, registry=self._registry
        )
        self.full = Counter("rad_jax_queue_full", "Requests refused by the full queue.", registry=self._registry)
        self._registry.register(_EngineStats(stats))
        ProcessCollector(registry=self._registry)

    def seen(self, route: str, status: int, seconds: float) -> None:
        """One request answered."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _EngineStats(Collector):
    def __init__(self, stats: Callable[[], Mapping[str, float]]):
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        for name, (what, grows) in STATS.items():
            kind = CounterMetricFamily if grows else GaugeMetricFamily
            yield kind(f"rad_jax_{name}", what, value=stats[name])
        if (used := device_bytes()) is not None:
            yield GaugeMetricFamily("rad_jax_device_memory_bytes", "Held on the card.", value=used)


def device_bytes() -> int | None:
    """Memory that torch holds on the card; None without one."""
    import sys

    torch = sys.modules.get("torch")
    return torch.cuda.memory_reserved() if torch and torch.cuda.is_initialized() else None
