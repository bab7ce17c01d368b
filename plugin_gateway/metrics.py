"""What the gateway counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5, 30, 120)


class Metrics:
    """One gateway's figures, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.calls = Counter("gear_calls", "Calls of Docker", ["method", "outcome"], registry=self._registry)
        self.seconds = Histogram(
            "gear_call_seconds", "Duration of calls", ["method"], buckets=_SECONDS, registry=self._registry
        )
        self.orders = Counter(
            "gear_orders", "Heavy calls and upkeep, by who did them", ["call", "by"], registry=self._registry
        )
        self.serving = Gauge("gear_orders_in_progress", "Orders being done", ["by"], registry=self._registry)
        self.stalled = Gauge(
            "gear_orders_stalled", "Of them, those that wait for their caller", ["by"], registry=self._registry
        )
        self.pushed = Counter("gear_pushed_objects", "Objects that the remote has confirmed", registry=self._registry)
        self.refused = Gauge(
            "gear_push_refused_objects", "Objects that the last push could not push", registry=self._registry
        )
        self.degraded = Gauge("gear_degraded", "1 while the gateway works for the workers", registry=self._registry)

    def observe(self, method: str, seconds: float, failed: bool) -> None:
        """Count one call of Docker."""
        self.calls.labels(method, "error" if failed else "ok").inc()
        self.seconds.labels(method).observe(seconds)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
