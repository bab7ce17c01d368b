"""What the manager counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class Metrics:
    """One server's."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "gear_manager_requests", "Requests answered.", ["call", "status"], registry=self.registry
        )
        self.seconds = Histogram("gear_manager_seconds", "Time to answer.", ["call"], registry=self.registry)
        self.under_way = Gauge("gear_manager_under_way", "Requests under way.", registry=self.registry)
        self.connections = Gauge("gear_manager_connections", "Open connections.", registry=self.registry)
        self.received = Counter("gear_manager_received_bytes", "Bytes of bodies received.", registry=self.registry)
        self.sent = Counter("gear_manager_sent_bytes", "Bytes of blobs and objects sent.", registry=self.registry)
        self.stored = Counter("gear_manager_stored_blobs", "Blobs that were new.", registry=self.registry)
        self.refused = Counter(
            "gear_manager_refused_uploads", "Uploads that were not what they said.", registry=self.registry
        )
        self.dropped = Counter("gear_manager_dropped_clients", "Clients that were too slow.", registry=self.registry)
        self.nodes = Gauge("gear_manager_nodes", "Nodes heard of lately.", registry=self.registry)
