"""The reasons why the gateway does the workers' jobs, for `docker info`, log and metric."""

from __future__ import annotations

from collections.abc import Mapping

import structlog

from plugin_gateway.metrics import GatewayMetrics

_log = structlog.stdlib.get_logger(__name__)

WORKERS = ("import", "push")
"""The kinds of workers of a node: import workers do heavy jobs, push workers do maintenance."""
NOT_TAKEN = "no worker takes tasks"
SILENT = "no worker answers"


class Health:
    """Holds for each kind of worker the reason why it is not available."""

    def __init__(self, metrics: GatewayMetrics) -> None:
        self._reasons: dict[str, str] = {}
        self._metrics = metrics

    def reason(self, worker: str) -> str:
        """Return the reason; empty if the worker is available."""
        return self._reasons.get(worker, "")

    def summary(self) -> str:
        """Return the text for `docker info`."""
        if not self._reasons:
            return "no"
        return "yes: " + "; ".join(f"{worker}: {reason}" for worker, reason in sorted(self._reasons.items()))

    def reset(self) -> None:
        """Forget all reasons; for a new broker."""
        self._reasons.clear()
        self._metrics.degraded.set(False)

    def update(self, reasons: Mapping[str, str]) -> None:
        """Apply the results of a query of Redis and the workers.

        They do not clear NOT_TAKEN, since a worker that answers may still take no tasks. Only a taken task clears it.
        """
        for worker, reason in reasons.items():
            if reason or self.reason(worker) != NOT_TAKEN:
                self.note(worker, reason)

    def note(self, worker: str, reason: str) -> None:
        """Set the reason of one worker, empty if it is available; log changes."""
        if reason == self.reason(worker) or (reason, self.reason(worker)) == (NOT_TAKEN, SILENT):
            return
        if reason:
            self._reasons[worker] = reason
            _log.warning("degraded: the gateway does the workers' jobs", kind=worker, reason=reason)
        else:
            del self._reasons[worker]
            _log.info("no longer degraded", kind=worker)
        self._metrics.degraded.set(bool(self._reasons))
