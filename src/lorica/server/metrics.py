"""Numbers for Prometheus: what each metric of the server is called, and where it comes from.

In: what an observer hears, and at a scrape the engines' and the journal's present state. Out: the text format. Every
name is explained in docs/guides/operate.md. Labels are bounded: routes are templates, codes are Lorica's own, and after
`TENANTS` tenants the rest count as one. Refuses to know who scrapes.
"""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from lorica import __version__

# else every counter has a second series, which only tells when the process began
disable_created_metrics()  # type: ignore[no-untyped-call]

TENANTS = 200
"""How many tenants have a label of their own."""
OTHERS = "(others)"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

WAITS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Seconds that separate the buckets of every histogram: from a warm small request to a queue of minutes."""

GAUGES = {  # of an engine's reports → metric, its labels
    "queue_depth": ("queue_depth", {"work": "train"}),
    "sampler_waiting": ("queue_depth", {"work": "sample"}),
    "queue_tokens": ("queue_tokens", {}),
    "resident_runs": ("runs", {"state": "resident"}),
    "spilled_runs": ("runs", {"state": "spilled"}),
    "sampler_adapters": ("sampler_adapters", {}),
    "sampler_live": ("samples_live", {}),
    "kv_positions": ("kv_positions", {}),
    "kv_bytes": ("kv_bytes", {}),
}
COUNTERS = {"rounds": "rounds", "batch_tokens": "batch_tokens", "recomputed": "recomputed"}
"""Of an engine's reports, which begin at zero in each of its lives."""


class Metrics:
    """One registry: two servers in one process do not mix their numbers."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._tenants: set[str] = set()
        self._last: dict[str, dict[str, float]] = {}
        self._restarts: dict[str, int] = {}

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"lorica_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"lorica_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(f"lorica_{name}", text, labels, registry=registry, buckets=WAITS)

        gauge("info", "Version of the server.", "version").labels(__version__).set(1)
        self.http_seconds = histogram("http_request_seconds", "Until an answer begins.", "method", "route")
        self.http = counter("http_requests", "Answers.", "method", "route", "status")
        self.open = gauge("requests_open", "Requests that were acknowledged and have no result yet.")
        self.requests = counter("requests", "Requests that have a result.", "kind", "outcome")
        self.errors = counter("errors", "Requests that failed.", "category", "code")
        self.wait = histogram("queue_wait_seconds", "From the acknowledgement until the engine has it.", "kind")
        self.engine_seconds = histogram("engine_seconds", "From then until the engine's reply.", "model", "command")
        self.tokens = counter("tokens", "Tokens that were computed.", "kind", "tenant")
        self.snapshots = counter("snapshots", "States of runs that were written.", "model")
        self.snapshot_bytes = counter("snapshot_bytes", "Bytes of these.", "model")
        self.up = gauge("engine_up", "Whether the engine works.", "model")
        self.restarts = counter("engine_restarts", "How often an engine was started again.", "model")
        self.journal_entries = gauge("journal_entries", "Requests in the journal that no snapshot covers.")
        self.journal_bytes = gauge("journal_bytes", "Bytes of these.")
        self.of_engine: Mapping[str, Gauge] = {
            "queue_depth": gauge("queue_depth", "Requests that wait in the engine.", "model", "work"),
            "queue_tokens": gauge("queue_tokens", "Training tokens that wait in the engine.", "model"),
            "runs": gauge("runs", "Runs that the engine knows.", "model", "state"),
            "sampler_adapters": gauge("sampler_adapters", "Adapters in memory for sampling.", "model"),
            "samples_live": gauge("samples_live", "Samples that are being drawn.", "model"),
            "kv_positions": gauge("kv_positions", "Positions in the key-value cache.", "model"),
            "kv_bytes": gauge("kv_bytes", "Bytes of the key-value cache.", "model"),
        }
        self.occupancy = gauge("batch_occupancy", "Tokens of a micro-batch over the most that fit, lately.", "model")
        self.grown: Mapping[str, Counter] = {
            "rounds": counter("rounds", "Turns of the scheduler.", "model"),
            "batch_tokens": counter("batch_tokens", "Tokens in joint micro-batches.", "model"),
            "recomputed": counter("recomputed", "Requests that left a micro-batch which failed.", "model"),
        }

    def tenant(self, name: str) -> str:
        """A tenant's label."""
        if name not in self._tenants:
            if len(self._tenants) >= TENANTS:
                return OTHERS
            self._tenants.add(name)
        return name

    def count_tokens(self, kind: str, tenant: str, count: int) -> None:
        if count > 0:
            self.tokens.labels(kind, self.tenant(tenant)).inc(count)

    def report(self, model: str, values: Mapping[str, float], budget: int) -> float | None:
        """Take an engine's numbers over; the batch occupancy since its last report, where it computed something."""
        for key, (name, labels) in GAUGES.items():
            if key in values:
                self.of_engine[name].labels(model=model, **labels).set(values[key])
        before = self._last.get(model, {})
        if any(values.get(key, 0.0) < before.get(key, 0.0) for key in COUNTERS):
            before = {}  # a new life
        grown = {key: values.get(key, 0.0) - before.get(key, 0.0) for key in COUNTERS}
        for key, name in COUNTERS.items():
            self.grown[name].labels(model).inc(grown[key])
        self._last[model] = {key: values.get(key, 0.0) for key in COUNTERS}
        if not grown["rounds"]:
            return None
        occupancy = grown["batch_tokens"] / grown["rounds"] / budget
        self.occupancy.labels(model).set(occupancy)
        return occupancy

    def set_restarts(self, model: str, count: int) -> None:
        """How often an engine was started again until now."""
        self.restarts.labels(model).inc(max(0, count - self._restarts.get(model, 0)))
        self._restarts[model] = max(count, self._restarts.get(model, 0))

    def gone(self, model: str) -> None:
        """An engine died: what it held is not there."""
        for name, labels in GAUGES.values():
            self.of_engine[name].labels(model=model, **labels).set(0)

    def render(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)

    def names(self) -> list[str]:
        """Every `lorica_…` name as it is exposed, without the suffixes of histograms."""
        return sorted(
            f"{metric.name}_total" if metric.type == "counter" else metric.name
            for metric in self.registry.collect()
            if metric.name.startswith("lorica_")
        )
