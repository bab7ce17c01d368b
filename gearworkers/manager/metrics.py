"""The manager's Prometheus metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class ManagerMetrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "gear_manager_requests", "Requests answered.", ["call", "status"], registry=self.registry
        )
        self.seconds = Histogram("gear_manager_seconds", "Time to answer.", ["call"], registry=self.registry)
        self.in_progress = Gauge("gear_manager_under_way", "Requests in progress.", registry=self.registry)
        self.connections = Gauge("gear_manager_connections", "Open connections.", registry=self.registry)
        self.received = Counter("gear_manager_received_bytes", "Bytes of bodies received.", registry=self.registry)
        self.sent = Counter("gear_manager_sent_bytes", "Bytes of blobs and objects sent.", registry=self.registry)
        self.stored = Counter("gear_manager_stored_blobs", "Blobs that were new.", registry=self.registry)
        self.refused = Counter(
            "gear_manager_refused_uploads", "Uploads that did not match their digest.", registry=self.registry
        )
        self.dropped = Counter("gear_manager_dropped_clients", "Clients that were too slow.", registry=self.registry)
        self.nodes = Gauge("gear_manager_nodes", "Nodes of the last ten minutes.", registry=self.registry)
